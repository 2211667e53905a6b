"""What pip installs: a wheel that knows nothing of the clone it was made from, and the command that comes with it."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ds_mofa.commands import main, scripts, shipped
from tests.launch.commands import command_environment, losses_in, make_inputs
from tests.wheel import install

ROOT = Path(__file__).resolve().parents[1]


def test_names_lead_to_files_and_what_is_at_hand_goes_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.path_of("zero2") == shipped.path_of("zero2_mofasgd") == str(ROOT / "configs/zero2_mofasgd.json")
    assert shipped.path_of("llama-tiny") == shipped.path_of("configs/models/llama-tiny.json")
    assert shipped.path_of("no-such-model") is None and shipped.path_of("configs/no_such.json") is None
    (tmp_path / "zero2").touch()
    assert shipped.path_of("zero2") is None


def test_only_values_of_files_are_names():
    words = ["--deepspeed", "zero3", "--run_name", "zero3", "--model_config=llama-tiny", "--deepspeed=no.json"]
    zero3, tiny = (str(ROOT / "configs" / name) for name in ("zero3_mofasgd.json", "models/llama-tiny.json"))
    expected = ["--deepspeed", zero3, "--run_name", "zero3", f"--model_config={tiny}", "--deepspeed=no.json"]
    assert scripts._with_shipped(words) == expected


def test_gpus_are_taken_out_of_the_words():
    assert scripts._gpus(["--rank", "8", "--gpus", "2", "--bf16"]) == (["--rank", "8", "--bf16"], 2)
    assert scripts._gpus(["--gpus=4"]) == ([], 4) and scripts._gpus(["--rank"]) == (["--rank"], None)
    for wrong in (["--gpus"], ["--gpus", "0"], ["--gpus=two"]):
        with pytest.raises(SystemExit, match="--gpus"):
            scripts._gpus(wrong)


@pytest.mark.parametrize(("visible", "left"), [(None, "0"), ("2,3", "2"), ("", "")])
def test_one_process_on_one_gpu_of_several_sees_no_other(monkeypatch, visible, left):
    for variable in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")  # so that it is put back
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(scripts.torch.cuda, "device_count", lambda: 4)
    seen = []
    monkeypatch.setattr(scripts, "_run", lambda script, words: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    scripts.train(["--optimizer", "MoFaSGD", "--gpus", "1"])
    assert seen == [left]


def test_config_prints_json_and_knows_what_there_is(capsys):
    main(["config", "zero2"])
    assert json.loads(capsys.readouterr().out)["optimizer"]["type"] == "MoFaSGD"
    main(["config"])
    assert {"zero2_mofasgd", "zero3_adamw", "llama-3.1-8b"} <= set(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="no 'zero9'; there are .*zero2_mofasgd"):
        main(["config", "zero9"])


def test_a_command_that_there_is_not_is_answered_by_those_that_there_are(capsys):
    with pytest.raises(SystemExit, match="no command 'tarin'(.|\n)*train "):
        main(["tarin"])
    main([])
    assert "predict" in capsys.readouterr().out


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A wheel of the files that git knows, unpacked by pip; (its folder, an environment that has it)."""
    wheel, site = install(tmp_path_factory.mktemp("source"), folder := tmp_path_factory.mktemp("installed"))
    environment = command_environment(folder)
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    paths = [path for path in paths if Path(path).resolve() != ROOT]
    return wheel, environment | {"PYTHONPATH": os.pathsep.join(paths)}


def ran(environment: dict[str, str], folder: Path, *words: str) -> str:
    command = [sys.executable, str(Path(environment["PYTHONPATH"].split(os.pathsep)[0]) / "bin/ds-mofa"), *words]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
def test_a_wheel_brings_the_package_and_its_files_and_no_name_more(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ds_mofa", "ds_mofa_autoload"}
    clone = {name.removeprefix("ds_mofa/commands/clone/") for name in names if "/clone/" in name}
    files = {str(path.relative_to(ROOT)) for path in [*shipped.names().values(), ROOT / "launch/train.py"]}
    assert files <= clone and not [name for name in clone if "results" in name]


@pytest.mark.slow
def test_the_description_has_no_link_that_a_package_index_cannot_follow(installed):
    wheel = zipfile.ZipFile(installed[0])
    [metadata] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    description = wheel.read(metadata).decode().partition("\n\n")[2]
    links, here = (re.findall(r"\]\(([^)]*)\)", text) for text in (description, (ROOT / "README.md").read_text()))
    assert links and all(link.startswith("https://") for link in links) and len(here) > len(links)
    assert "![" not in description and "| four H200s, the same |" in description and "## Install" in description


@pytest.mark.slow
def test_what_is_installed_splits_predicts_and_trains_away_from_the_clone(installed, tmp_path):
    _, environment = installed
    where = subprocess.run(
        [sys.executable, "-c", "import ds_mofa; print(ds_mofa.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert where.stdout.startswith(environment["PYTHONPATH"].split(os.pathsep)[0])
    assert json.loads(ran(environment, tmp_path, "config", "zero2"))["zero_optimization"]["stage"] == 2
    assert json.loads(ran(environment, tmp_path, "split", "llama-tiny", "--json"))["matrices"] == 28
    assert "**on the device**" in ran(environment, tmp_path, "predict", "--model_config", "llama-tiny", "--seq", "64")
    make_inputs(tmp_path)
    words = ["--model_config", "shape.json", "--train_file", "train.txt", "--eval_file", "eval.jsonl"]
    words += ["--max_length", "64", "--per_device_train_batch_size", "2", "--max_steps", "6", "--eval_on_start"]
    words += ["--learning_rate", "1.2e-3"]  # the default is for fine-tuning
    said = ran(environment, tmp_path, "train", "--gpus", "2", "--deepspeed", "zero2", *words, "--output_dir", "model")
    first, last = losses_in(said)
    assert last < first - 0.1 and (tmp_path / "model/model.safetensors").is_file()
