"""The examples: short, and each trains where its framework is installed."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.homes import home_of

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# What each prints at its end must be below this. A constant output has ln 64 on the data of the first, 1 on the others'.
LOSS = {"hf_trainer": 3.2, "lightning_ddp": 0.9, "lightning_fsdp2": 0.9, "torchtitan_container": 0.9}
FRAMEWORK = {"hf_trainer": "transformers", "torchtitan_container": "torchtitan"}
NOT_ON_A_CPU = {"lightning_deepspeed"}  # Lightning refuses its DeepSpeedStrategy without a GPU


def test_each_is_short_and_in_the_list_and_is_known_here():
    files = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml"))
    assert [path.name for path in files if len(path.read_text().splitlines()) > 30] == []
    listed = set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {path.name for path in files}
    programs = {path.stem for path in files if path.suffix == ".py"}
    assert programs == LOSS.keys() | NOT_ON_A_CPU
    for path in files:
        if path.suffix == ".py":
            assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSS)
def test_it_trains(tmp_path, name):
    there = home_of(FRAMEWORK.get(name, "lightning"), ROOT)
    run = subprocess.run(
        [there.command("python"), str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path, env=there.environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"^loss ([\d.]+)$", run.stdout, flags=re.MULTILINE)]
    assert losses and max(losses) < LOSS[name]
    assert "MoFaSGD" in run.stdout + run.stderr


@pytest.mark.slow
def test_axolotl_s_plugin_hands_the_options_to_the_trainer():
    pytest.importorskip("axolotl")
    from types import SimpleNamespace

    import torch

    from ds_mofa import MoFaSGD, OptionError
    from ds_mofa.integrations.axolotl import Arguments, Plugin

    plugin, trainer = Plugin(), SimpleNamespace(optimizer_cls_and_kwargs=None)
    module, _, name = plugin.get_input_args().rpartition(".")
    assert (module, name) == (Arguments.__module__, "Arguments")
    plugin.post_trainer_create({}, trainer)
    assert trainer.optimizer_cls_and_kwargs is None
    # A YAML reader of version 1.1 takes 6e-4 for a string.
    plugin.post_trainer_create({"mofasgd": {"lr": "6e-4", "rank": 4}}, trainer)
    factory, options = trainer.optimizer_cls_and_kwargs
    optimizer = factory()(torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)), object(), **options)
    assert isinstance(optimizer, MoFaSGD) and (optimizer.options.lr, optimizer.options.rank) == (6e-4, 4)
    with pytest.raises(OptionError, match="write it into the JSON"):
        plugin.post_trainer_create({"mofasgd": {"lr": 6e-4}, "deepspeed": "zero2.json"}, trainer)
