"""Programs of other people, each as it was installed and without an import of ours, train a LLaMA of 0.1 M parameters.

A program is looked for in the environment that runs the tests, or in the one that its variable names:

    DS_MOFA_LLAMAFACTORY=/path/to/its/venv python -m pytest -m slow tests/tools
"""

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from launch.tokenizer import byte_tokenizer
from tests.homes import Home, home_of
from tests.launch.commands import MODEL, succeeded
from tests.ports import free_port
from tests.wheel import install

ROOT = Path(__file__).resolve().parents[2]
FSDP_ON_CPU = Path(__file__).with_name("fsdp_on_cpu.py")
RATE = 1e-3  # AdamW's for so small a model from random weights
STEPS = 10
MATRIX = "model.layers.0.mlp.up_proj.weight"
ANSWER = "the quick brown fox jumps over the lazy dog"
HUGGING_FACE = (
    *("--per_device_train_batch_size", "4", "--max_steps", str(STEPS), "--logging_steps", "1", "--bf16", "false"),
    *("--learning_rate", str(RATE), "--lr_scheduler_type", "constant", "--report_to", "none", "--output_dir", "out"),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"))[1]


def write_inputs(folder: Path, home: Home) -> None:
    """A model and data in each program's form; the configs are what `ds-mofa config` prints there."""
    byte_tokenizer().save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder / "model")
    questions = [f"Say the quick thing {i}." for i in range(200)]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": ANSWER}] for q in questions]
    records = {
        "chats": [{"messages": chat} for chat in chats],
        "pairs": [{"prompt": q, "chosen": ANSWER, "rejected": "no idea"} for q in questions],
        "marked": [
            {"prompt": q, "completion": (ANSWER, "no idea")[i % 2], "label": i % 2 == 0}
            for i, q in enumerate(questions)
        ],
    }
    for name, rows in records.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "data").mkdir()
    alpaca = [{"instruction": q, "input": "", "output": ANSWER} for q in questions]
    (folder / "data/toy.json").write_text(json.dumps(alpaca))
    (folder / "data/dataset_info.json").write_text(json.dumps({"toy": {"file_name": "toy.json"}}))
    (folder / "configs").mkdir()
    configs = {"zero2": "configs/zero2_mofasgd.json", "accelerate_zero2": "zero2.yaml", "fsdp2": "fsdp2.yaml"}
    for name, path in configs.items():
        printed = run(home, folder, [home.command("python"), "-m", "ds_mofa", "config", name])
        # Saved whole, as from_pretrained reads it.
        (folder / path).write_text(succeeded(printed).replace("SHARDED_STATE_DICT", "FULL_STATE_DICT"))


def run(home: Home, folder: Path, command: Sequence[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, env=home.environment, capture_output=True, text=True, timeout=900)


# What each is started by. ---------------------------------------------------------------------------------------------


def llamafactory(site: Path, folder: Path) -> tuple[Home, list[str]]:
    there = home_of("llamafactory", site, FORCE_TORCHRUN="1", NPROC_PER_NODE="2", MASTER_PORT=str(free_port()))
    settings = {
        "model_name_or_path": "model", "stage": "sft", "do_train": True, "finetuning_type": "full",
        "deepspeed": "configs/zero2_mofasgd.json", "dataset": "toy", "dataset_dir": "data", "template": "default",
        "cutoff_len": 128, "output_dir": "out", "per_device_train_batch_size": 4, "max_steps": STEPS,
        "logging_steps": 1, "save_strategy": "no", "learning_rate": RATE, "lr_scheduler_type": "constant",
        "report_to": "none",
    }  # fmt: skip
    (folder / "settings.yaml").write_text(json.dumps(settings))
    return there, [there.command("llamafactory-cli"), "train", "settings.yaml"]


def trl(site: Path, script: str, data: str) -> tuple[Home, list[str]]:
    there = home_of("trl", site)
    launcher = [there.command("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    return there, [*launcher, *trl_script(there, script, data), "--deepspeed", "configs/zero2_mofasgd.json"]


def trl_script(there: Home, script: str, data: str) -> list[str]:
    path = there.folder_of("trl") / f"scripts/{script}.py"
    return [str(path), "--model_name_or_path", "model", "--dataset_name", data, "--use_cpu", *HUGGING_FACE]


def axolotl(site: Path, folder: Path, **settings: object) -> tuple[Home, list[str]]:
    """In one process: with several CPU ranks Axolotl asks torch for the accelerator that there is not."""
    alone = {}
    if "deepspeed" in settings:  # which it starts by NCCL in one process, except when it prepares data
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        alone |= {"MASTER_PORT": str(free_port()), "AXOLOTL_IS_PREPROCESS": "1"}
    there = home_of("axolotl", site, AXOLOTL_DO_NOT_TRACK="1", **alone)
    settings = {
        "base_model": "model", "datasets": [{"path": "chats/train.jsonl", "ds_type": "json", "type": "chat_template"}],
        "sequence_len": 128, "sample_packing": False, "micro_batch_size": 4, "gradient_accumulation_steps": 1,
        "max_steps": STEPS, "learning_rate": RATE, "lr_scheduler": "constant", "logging_steps": 1, "bf16": False,
        "save_strategy": "no", "output_dir": "out", "dataset_prepared_path": "prepared", **settings,
    }  # fmt: skip
    (folder / "settings.yaml").write_text(json.dumps(settings))
    return there, [there.command("axolotl"), "train", "settings.yaml", "--launcher", "python"]


def accelerate(
    site: Path, config: str, program: Callable[[Home], list[str]], **variables: str
) -> tuple[Home, list[str]]:
    there = home_of("accelerate", site, **variables)
    launcher = [there.command("accelerate"), "launch", "--config_file", config, "--main_process_port", str(free_port())]
    return there, [*launcher, *program(there)]


PROGRAMS: dict[str, Callable[[Path, Path], tuple[Home, list[str]]]] = {
    "llamafactory": llamafactory,
    "trl-sft": lambda site, folder: trl(site, "sft", "chats"),
    "trl-dpo": lambda site, folder: trl(site, "dpo", "pairs"),
    "trl-kto": lambda site, folder: trl(site, "kto", "marked"),
    "axolotl-plugin": lambda site, folder: axolotl(
        site, folder, plugins=["ds_mofa.integrations.axolotl.Plugin"], mofasgd={"lr": RATE, "rank": 32}, use_cpu=True
    ),
    "axolotl-deepspeed": lambda site, folder: axolotl(site, folder, deepspeed="configs/zero2_mofasgd.json"),
    "accelerate-zero2": lambda site, folder: accelerate(
        site, "zero2.yaml", lambda there: trl_script(there, "sft", "chats")
    ),
    "accelerate-fsdp2": lambda site, folder: accelerate(
        site, "fsdp2.yaml", lambda there: [str(FSDP_ON_CPU), str(ROOT / "examples/hf_trainer.py")],
        ACCELERATE_USE_CPU="true",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_trains_with_mofasgd_and_what_it_saves_loads(site, tmp_path, name):
    there, command = PROGRAMS[name](site, tmp_path)
    write_inputs(tmp_path, there)
    ended = run(there, tmp_path, command)
    said = succeeded(ended) + ended.stderr
    assert "matrices on MoFaSGD" in said
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", said)]
    print(f"{name}: {losses[0]} -> {losses[-1]}")  # docs/tools.md has them
    assert losses[-1] < 0.95 * losses[0]
    assert name != "accelerate-fsdp2" or "trained under DistributedType.FSDP" in said
    saved = min((tmp_path / "out").rglob("model.safetensors"), key=lambda path: len(path.parts))  # not a checkpoint's
    weights = dict(AutoModelForCausalLM.from_pretrained(saved.parent).named_parameters())
    assert all(weight.isfinite().all() for weight in weights.values())
    assert not torch.equal(weights[MATRIX], load_file(tmp_path / "model/model.safetensors")[MATRIX])


@pytest.mark.slow
def test_without_the_entry_point_it_is_not_found(site, tmp_path):
    there, command = trl(site, "sft", "chats")
    there.environment["DS_MOFA_AUTOLOAD"] = "0"
    write_inputs(tmp_path, there)
    ended = run(there, tmp_path, command)
    assert ended.returncode != 0 and "MoFaSGD is not a supported DeepSpeed Optimizer" in ended.stdout + ended.stderr
