"""A command line and a DeepSpeed JSON agree, or the user is told how they do not."""

import json
import pickle
from pathlib import Path

import pytest
import yaml

from launch.arguments import (
    Parser,
    TrainingArguments,
    check_optimizer,
    deepspeed_config_path,
    defaults_from_deepspeed,
    parse_arguments,
)
from launch.errors import UserError
from launch.json_files import read_json

ROOT = Path(__file__).resolve().parents[2]
MODEL = ["--model_config", "configs/models/llama-tiny.json"]
DATA = ["--train_file", "train.txt"]
CONFIG = ["--deepspeed", "configs/zero2_adamw.json"]


@pytest.fixture(autouse=True)
def one_rank_without_a_launcher(monkeypatch, tmp_path):
    """What TrainingArguments needs of a launcher: nothing, once there is no DeepSpeed engine to start."""
    monkeypatch.setattr("launch.arguments.TrainingArguments.__post_init__", lambda self: None)


def parse(*words: str):
    return parse_arguments([*words, "--output_dir", "out"])


BAD_LINES = {
    "two models": (MODEL + ["--model_name_or_path", "x"] + DATA + CONFIG, "both given.*Keep the first"),
    "no model": (DATA + CONFIG, "No model. Give --model_name_or_path"),
    "no data": (MODEL + CONFIG, "No training data"),
    "two sources": (MODEL + DATA + CONFIG + ["--dataset_name", "x"], "Keep one source of data"),
    "evaluation of nothing": (MODEL + DATA + CONFIG + ["--eval_on_start"], "nothing to evaluate on"),
    "unknown option": (MODEL + DATA + CONFIG + ["--lerning_rate", "1"], "unknown options: --lerning_rate 1.*--help"),
    "not a number": (MODEL + DATA + CONFIG + ["--learning_rate", "fast"], "invalid float value: 'fast'.*--help"),
    "packing without borders": (
        MODEL + DATA + CONFIG + ["--packing", "--packing_strategy", "wrapped"],
        "wrapped runs examples together.*Take bfd",
    ),
    "packed evaluation": (MODEL + DATA + CONFIG + ["--eval_packing"], "count some examples twice"),
    "no DeepSpeed config": (MODEL + DATA, "which optimizer to train with"),
    "a config that is not there": (MODEL + DATA + ["--deepspeed", "nowhere.json"], "nowhere.json: no such file"),
}


@pytest.mark.parametrize(("words", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_command_line_says_what_to_do(words, message):
    with pytest.raises(UserError, match=message):
        parse(*words)


def test_liger_kernel_is_passed_on_or_said_to_be_missing(monkeypatch):
    words = [*MODEL, *DATA, *CONFIG]
    assert parse(*words)[2].use_liger_kernel is False
    monkeypatch.setattr("launch.arguments.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"liger-kernel is not installed. `pip install 'ds_mofa\[liger\]'`"):
        parse(*words, "--use_liger_kernel")
    monkeypatch.setattr("launch.arguments.importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("launch.arguments.torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="its kernels need a GPU, and there is none"):
        parse(*words, "--use_liger_kernel")
    monkeypatch.setattr("launch.arguments.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("launch.arguments.hardware_defaults", lambda: {"use_cpu": True, "bf16": False})
    assert parse(*words, "--use_liger_kernel")[2].use_liger_kernel is True


def test_a_broken_json_is_named_with_its_line(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{\n  "a": 1,\n  "b" 2\n}')
    with pytest.raises(UserError, match="a.json:3: the config is not valid JSON"):
        read_json(str(file), "the config")
    file.write_text("[1]")
    with pytest.raises(UserError, match="a.json: the config must be a JSON object"):
        read_json(str(file), "the config")


def test_stage_3_must_gather_for_saving(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(UserError, match="a.json: stage 3 without .*Add it"):
        parse(*MODEL, *DATA, "--deepspeed", str(file))


def test_numbers_in_the_json_become_defaults(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 3,
                "gradient_accumulation_steps": 5,
                "gradient_clipping": "auto",
                "optimizer": {"type": "AdamW", "params": {"lr": 0.25, "betas": [0.5, 0.75], "eps": "auto"}},
            }
        )
    )
    _, _, args = parse(*MODEL, *DATA, "--deepspeed", str(file))
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (3, 5)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (0.25, 0.5, 0.75)
    assert args.max_grad_norm == 1.0  # HF's own default
    with pytest.raises(UserError, match='"optimizer.params.lr" is 0.25 there, and --learning_rate is 0.5'):
        parse(*MODEL, *DATA, "--deepspeed", str(file), "--learning_rate", "0.5")


@pytest.mark.parametrize(("name", "rate"), [("MoFaSGD", 6e-3), ("mofasgd", 6e-3), ("GaLore", 4.8e-4), ("AdamW", 2e-5)])
def test_each_optimizer_has_its_own_learning_rate(name, rate):
    config = {"optimizer": {"type": name, "params": {"lr": "auto"}}}
    assert defaults_from_deepspeed(config)["learning_rate"] == rate


def test_galore_s_options_are_checked_before_a_model_is_loaded():
    fine = {"lr": "auto", "betas": "auto", "eps": "auto", "rank": 8, "refresh_every": 100, "torch_adam": True}
    check_optimizer({"type": "GaLore", "params": fine}, "a.json")
    with pytest.raises(UserError, match="a.json: \"optimizer\": unknown option 'beta' of GaLore"):
        check_optimizer({"type": "GaLore", "params": {"beta": 0.9}}, "a.json")
    with pytest.raises(UserError, match='a.json: "optimizer": refresh_every=0 must be'):
        check_optimizer({"type": "galore", "params": {"refresh_every": 0}}, "a.json")


def test_fp16_in_the_json_turns_bf16_off():
    assert defaults_from_deepspeed({"fp16": {"enabled": True}}) == {"fp16": True, "bf16": False}
    assert defaults_from_deepspeed({"fp16": {"enabled": "auto"}}) == {}


def test_accelerate_names_the_config_through_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "a.json")
    assert deepspeed_config_path([]) == "a.json"
    assert deepspeed_config_path(["--deepspeed", "b.json"]) == "b.json"
    assert deepspeed_config_path(["--deepspeed=b.json"]) == "b.json"


@pytest.mark.parametrize(
    ("words", "greater"),
    [
        (["--metric_for_best_model", "eval_perplexity"], False),
        (["--metric_for_best_model", "perplexity"], False),
        (["--metric_for_best_model", "eval_loss"], False),
        (["--metric_for_best_model", "eval_mean_token_accuracy"], True),
        (["--metric_for_best_model", "eval_perplexity", "--greater_is_better", "true"], True),
    ],
)
def test_a_smaller_perplexity_is_better(monkeypatch, tmp_path, words, greater):
    monkeypatch.undo()  # HF's own checks are what is tested
    args = Parser(TrainingArguments).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *words])
    assert args[0].greater_is_better is greater


def test_the_arguments_that_are_saved_beside_a_model_hold_no_token(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), hub_token="hf_SECRET", learning_rate=0.25)
    saved = pickle.dumps(args)
    assert b"hf_SECRET" not in saved and args.hub_token == "hf_SECRET"
    assert pickle.loads(saved).learning_rate == 0.25


def test_what_accelerate_s_config_names_is_found_from_any_folder(monkeypatch, tmp_path):
    named = yaml.safe_load((ROOT / "configs/accelerate_zero2.yaml").read_text())["deepspeed_config"]
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", named["deepspeed_config_file"])
    monkeypatch.chdir(tmp_path)
    assert deepspeed_config_path([]) == str(ROOT / "configs/zero2_mofasgd.json")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/zero2_mofasgd.json").write_text("{}")
    assert deepspeed_config_path([]) == "configs/zero2_mofasgd.json"  # one's own goes before
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json")
    with pytest.raises(UserError, match="nowhere.json: no such file"):
        read_json(deepspeed_config_path([]), "the --deepspeed config")
