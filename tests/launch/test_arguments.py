"""A command line and a DeepSpeed JSON agree, or the user is told how they do not."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import yaml
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from ds_mofa.optimizers import registry
from launch.arguments import Parser, TrainingArguments, parse_arguments
from launch.deepspeed_json import check_optimizer, deepspeed_config_path, defaults_from_deepspeed
from launch.engines import Engine
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
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def parse(*words: str):
    return parse_arguments([*words, "--output_dir", "out"])


BAD_LINES = {
    "two models": ([*MODEL, "--model_name_or_path", "x", *DATA, *CONFIG], "both given.*Keep the first"),
    "no model": (DATA + CONFIG, "No model. Give --model_name_or_path"),
    "no data": (MODEL + CONFIG, "No training data"),
    "two sources": (MODEL + DATA + CONFIG + ["--dataset_name", "x"], "Keep one source of data"),
    "evaluation of nothing": (MODEL + DATA + CONFIG + ["--eval_on_start"], "nothing to evaluate on"),
    "unknown option": (
        MODEL + DATA + CONFIG + ["--lerning_rate", "1"],
        "unknown options: --lerning_rate 1; did you mean --learning_rate.*--help_all",
    ),
    "not a number": (MODEL + DATA + CONFIG + ["--learning_rate", "fast"], "invalid float value: 'fast'.*--help"),
    "packing without borders": (
        MODEL + DATA + CONFIG + ["--packing", "--packing_strategy", "wrapped"],
        "wrapped runs examples together.*Take bfd",
    ),
    "packed evaluation": (MODEL + DATA + CONFIG + ["--eval_packing"], "count some examples twice"),
    "no optimizer": (MODEL + DATA, "which optimizer to train with. Give --optimizer MoFaSGD .*or a DeepSpeed config"),
    "an optimizer beside a JSON": (MODEL + DATA + CONFIG + ["--rank", "8"], "--rank: under --deepspeed the JSON names"),
    "weights' dtype beside a JSON": (MODEL + DATA + CONFIG + ["--dtype", "float32"], "--dtype: under --deepspeed"),
    "fp16 without DeepSpeed": (
        MODEL + DATA + ["--optimizer", "AdamW", "--fp16"],
        "--fp16: its loss scaling is DeepSpeed",
    ),
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


def test_there_is_a_loss_before_training_where_there_is_data_for_it():
    held_out = ["--eval_file", "b.jsonl"]
    assert not parse(*MODEL, *DATA, *CONFIG)[2].eval_on_start
    assert parse(*MODEL, *DATA, *CONFIG, *held_out)[2].eval_on_start
    assert not parse(*MODEL, *DATA, *CONFIG, *held_out, "--eval_on_start", "false")[2].eval_on_start
    assert not parse(*MODEL, *DATA, *CONFIG, "--eval_file=b.jsonl", "--resume_from_checkpoint", "x")[2].eval_on_start


@pytest.mark.parametrize(("name", "rate"), [("MoFaSGD", 1e-4), ("mofasgd", 1e-4), ("GaLore", 4.8e-4), ("AdamW", 2e-5)])
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


def config_file(tmp_path, **content) -> list[str]:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    return [*MODEL, *DATA, "--deepspeed", str(file)]


@pytest.mark.parametrize(("ranks", "fits"), [(1, 12), (4, 48)])
def test_the_batch_of_all_ranks_is_the_product_of_its_parts(tmp_path, monkeypatch, ranks, fits):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    parts = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": "auto"}
    times = ["--gradient_accumulation_steps", "4"]
    for right in (fits, "auto"):
        parse(*config_file(tmp_path, train_batch_size=right, **parts), *times)
    for wrong in (fits + 1, str(fits), True):
        with pytest.raises(UserError, match=f"train_batch_size. is .*size 3 on {ranks} rank.*4 times, make {fits}"):
            parse(*config_file(tmp_path, train_batch_size=wrong, **parts), *times)


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_a_scheduler_s_warm_up_has_steps(tmp_path, name):
    def words(steps: object) -> list[str]:
        return config_file(tmp_path, scheduler={"type": name, "params": {"warmup_num_steps": steps}})

    with pytest.raises(UserError, match='a.json: .*"warmup_num_steps" is "auto" there, and no --warmup_steps'):
        parse(*words("auto"))
    assert parse(*words("auto"), "--warmup_steps", "2")[2].warmup_steps == 2
    assert parse(*words("auto"), "--warmup_steps", "0.1")[2].warmup_steps == 0.1  # HF's: a part of all steps
    assert parse(*words(5))[2].warmup_steps == 5
    for wrong in (0, -1, 2.5):
        with pytest.raises(UserError, match=f'a.json: .*"warmup_num_steps" is {wrong}; {name} needs a whole number'):
            parse(*words(wrong))


def test_a_scheduler_without_a_warm_up_needs_none(tmp_path):
    parse(*config_file(tmp_path, scheduler={"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1}}))


def test_the_command_line_s_optimizer_comes_with_its_options_and_the_flags():
    words = [*MODEL, *DATA, "--optimizer", "mofasgd", "--rank", "16", "--optimizer_args", '{"explore": 4, "lr": 5e-4}']
    args = parse(*words, "--weight_decay", "0.25", "--adam_beta2", "0.75")[2]
    assert args.engine is Engine.DDP and args.learning_rate == 5e-4 and args.max_grad_norm == 1.0
    fixed = {"rank": 16, "explore": 4, "lr": 5e-4}
    assert args.optimizer_options == fixed | {"weight_decay": 0.25, "adamw_betas": [0.9, 0.75], "adamw_eps": 1e-8}
    with pytest.raises(UserError, match='"lr" is 0.0005 there, and --learning_rate says 0.25'):
        parse(*words, "--learning_rate", "0.25")
    assert parse(*MODEL, *DATA, *CONFIG)[2].optimizer_options is None


@pytest.mark.parametrize(
    ("words", "launched", "weights", "mixed"),
    [
        (["--bf16"], "no", None, "no"),  # load_model takes --bf16's dtype
        (["--bf16", "--dtype", "float32"], "no", "float32", "bf16"),
        (["--dtype", "bfloat16"], "no", "bfloat16", "no"),
        ([], "no", None, "no"),
        ([], "bf16", "float32", "bf16"),
        (["--bf16", "--dtype", "bfloat16"], "bf16", "bfloat16", "no"),
    ],
)
def test_bf16_weights_are_computed_with_as_they_are(monkeypatch, words, launched, weights, mixed):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    args = parse(*MODEL, *DATA, "--optimizer", "MoFaSGD", *words)[2]
    assert (args.dtype, args.mixed_precision) == (weights, mixed)


def test_another_precision_of_the_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="mixed_precision fp8 of accelerate launch"):
        parse(*MODEL, *DATA, "--optimizer", "MoFaSGD")


def test_answers_only_is_asked_of_the_records_and_not_of_trl():
    _, data, args = parse(*MODEL, *DATA, *CONFIG, "--assistant_only_loss")
    assert data.answers_only and not args.assistant_only_loss
    _, data, args = parse(*MODEL, *DATA, *CONFIG)
    assert not data.answers_only and not args.assistant_only_loss


@pytest.mark.parametrize(
    "words", [("--chat_template_path", "x.jinja"), ("--eos_token", "</s>"), ("--completion_only_loss", "false")]
)
def test_options_for_data_that_trl_encodes_itself_are_refused(words):
    with pytest.raises(UserError, match=f"^{words[0]}"):
        parse(*MODEL, *DATA, *CONFIG, *words)


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


PLUGIN = """
import dataclasses
from typing import ClassVar
from ds_mofa import Options
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.registry import register
from ds_mofa.rules.mofasgd import MoFaSGDRule

@dataclasses.dataclass(frozen=True, kw_only=True)
class PluggedOptions(Options):
    title: ClassVar[str] = "Plugged"
    lr: float = 1.25e-3

@register
class Plugged(MatrixOptimizer):
    options_class = PluggedOptions
    rule_class = MoFaSGDRule
"""


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "plugged_in.py"
    file.write_text(PLUGIN)
    yield file
    sys.modules.pop("plugged_in", None)
    entry = registry._entries.pop("Plugged", None)
    if entry is not None:
        DEEPSPEED_OPTIMIZERS.remove("plugged")
        ZERO_SUPPORTED_OPTIMIZERS.remove(entry.optimizer)


def test_an_optimizer_of_a_plugin_is_one_of_the_config_s(tmp_path, plugin):
    words = config_file(tmp_path, optimizer={"type": "Plugged", "params": {"lr": "auto", "rank": 4}})
    with pytest.raises(UserError, match='"Plugged" in "optimizer" is no optimizer'):
        parse(*words)
    named = [*MODEL, *DATA, "--optimizer", "plugged"]
    with pytest.raises(UserError, match="--optimizer plugged: no such optimizer. There are .*--plugins brings others"):
        parse(*named)
    for _ in range(2):  # importing it again registers nothing anew
        assert parse(*words, "--plugins", str(plugin))[2].learning_rate == 1.25e-3
    assert parse(*named, "--plugins", str(plugin))[2].optimizer_options["lr"] == 1.25e-3
    words = config_file(tmp_path, optimizer={"type": "plugged", "params": {"rnk": 4}})
    with pytest.raises(UserError, match="unknown option 'rnk' of Plugged; did you mean 'rank'"):
        parse(*words, "--plugins", str(plugin))


def test_a_plugin_that_cannot_be_imported_is_named_with_the_reason(tmp_path, plugin):
    words = [*MODEL, *DATA, *CONFIG]
    with pytest.raises(UserError, match="--plugins no.such.module: it could not be imported .ModuleNotFoundError"):
        parse(*words, "--plugins", "no.such.module")
    with pytest.raises(UserError, match="--plugins .*nowhere.py: it could not be imported .FileNotFoundError"):
        parse(*words, "--plugins", str(tmp_path / "nowhere.py"))
    plugin.write_text("1 / 0")
    with pytest.raises(UserError, match="plugged_in.py: it could not be imported .ZeroDivisionError"):
        parse(*words, "--plugins", str(plugin))
