"""The DeepSpeed JSON of a run: where it lies, what is wrong with it, and how it agrees with the command line.

It is read before the options: a number that it fixes becomes the default of the matching option, so that a JSON alone
fully describes a run, and a command line that contradicts it is refused.
"""

import argparse
import difflib
import json
import os
from pathlib import Path

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from transformers import TrainingArguments

from ds_mofa import OptionError
from ds_mofa.backends.deepspeed.build import read_options
from ds_mofa.optimizers import registry
from launch.errors import UserError
from launch.named_optimizer import ADAMW_LEARNING_RATE

# Those of ds_mofa's optimizers are in its registry.
ADAM_LEARNING_RATE = {"adamw": ADAMW_LEARNING_RATE, "adam": ADAMW_LEARNING_RATE}

# DeepSpeed JSON key -> the option that HF fills it from, or checks it against.
JSON_KEY_TO_OPTION = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}

FILLED_IN = ("lr", "weight_decay", "betas", "eps")  # HF's Trainer replaces an "auto" of these

# The keys of a DeepSpeed JSON that decide what is trained; a misspelt one would leave its default in force.
CONFIG_KEYS = (
    "optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "gradient_clipping", "gradient_accumulation_steps",
    "train_batch_size", "train_micro_batch_size_per_gpu",
)  # fmt: skip


def deepspeed_config_path(argv: list[str]) -> str:
    """The value of ``--deepspeed``, or the file that ``accelerate launch`` names in its place."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deepspeed", default=_config_of_accelerate())
    path = parser.parse_known_args(argv)[0].deepspeed
    if path is None:
        raise UserError(
            "No DeepSpeed config, so nothing says which optimizer to train with. Give accelerate's config a "
            "deepspeed_config_file, or --deepspeed one such as configs/zero2_mofasgd.json."
        )
    return path


def _config_of_accelerate() -> str | None:
    """The file that a config of ``accelerate launch`` names; configs/accelerate_zero2.yaml does from the repository."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is None or Path(path).is_file():
        return path
    shipped = Path(__file__).resolve().parents[1] / path
    return str(shipped) if shipped.is_file() else path


def defaults_from_deepspeed(config: dict) -> dict[str, object]:
    """Option defaults that a DeepSpeed config implies: its own numbers, and a learning rate for its optimizer."""
    defaults: dict[str, object] = {}
    optimizer = str(nested_value(config, "optimizer.type")).lower()
    ours = registry.find(optimizer)
    if ours is not None:
        defaults["learning_rate"] = ours.learning_rate
    elif optimizer in ADAM_LEARNING_RATE:
        defaults["learning_rate"] = ADAM_LEARNING_RATE[optimizer]
    for key, option in JSON_KEY_TO_OPTION.items():
        value = nested_value(config, key)
        if value not in (None, "auto"):
            defaults[option] = value
    betas = nested_value(config, "optimizer.params.betas")
    if isinstance(betas, list) and len(betas) == 2:
        defaults["adam_beta1"], defaults["adam_beta2"] = betas
    if defaults.get("fp16"):
        defaults["bf16"] = False
    return defaults


def nested_value(config: dict, dotted_key: str) -> object:
    """``config["a"]["b"]`` for ``"a.b"``, or None where any part is missing."""
    value: object = config
    for key in dotted_key.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def check_deepspeed_config(config: dict, path: str) -> None:
    """What DeepSpeed would pass over in silence, or find only once the model is loaded."""
    for key in config:
        close = [] if key in CONFIG_KEYS else difflib.get_close_matches(key, CONFIG_KEYS, n=1, cutoff=0.85)
        if close:  # DeepSpeed reads the keys that it knows, and no others
            raise UserError(f"{path}: unknown key {key!r}, which DeepSpeed leaves unread; did you mean {close[0]!r}?")
    for key in ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(
                f"{path}: {key!r} must be an object {{...}}, not {json.dumps(config[key])[:60]}. Correct it."
            )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(
            f'{path}: "stage": {json.dumps(stage)} in "zero_optimization" must be 0, 1, 2 or 3. Correct it.'
        )
    gathers = nested_value(config, "zero_optimization.stage3_gather_16bit_weights_on_model_save")
    if stage == 3 and gathers is not True:
        raise UserError(
            f'{path}: stage 3 without "stage3_gather_16bit_weights_on_model_save": true in "zero_optimization", so the '
            "trained model could not be saved. Add it."
        )
    check_optimizer(config.get("optimizer", {}), path)


def check_optimizer(section: dict, path: str) -> None:
    """The optimizer's name, and this package's own options, which need no model to be checked."""
    if not section:
        return  # HF makes the one that --optim names
    name = str(section.get("type", "")).lower()
    known = {*DEEPSPEED_OPTIMIZERS, *(key.lower() for key in vars(torch.optim))}
    if name not in known:
        close = difflib.get_close_matches(name, DEEPSPEED_OPTIMIZERS, n=1)
        raise UserError(
            f'{path}: "type": {json.dumps(section.get("type"))} in "optimizer" is no optimizer of DeepSpeed, PyTorch '
            "or ds_mofa" + (f"; did you mean {close[0]!r}?" if close else ".") + ' Write "type": "MoFaSGD".'
        )
    betas = nested_value(section, "params.betas")
    if betas not in (None, "auto") and not (isinstance(betas, list) and len(betas) == 2):
        raise UserError(f'{path}: "optimizer": betas={json.dumps(betas)} must be two numbers, such as [0.9, 0.999].')
    if registry.find(name) is not None:
        params = section.get("params")
        if isinstance(params, dict):  # HF fills these in from the command line
            params = {key: value for key, value in params.items() if key not in FILLED_IN or value != "auto"}
        try:
            read_options({**section, "params": params})
        except OptionError as error:
            raise UserError(f'{path}: "optimizer": {error}') from None


def check_agreement(config: dict, path: str, args: TrainingArguments) -> None:
    """No option may contradict a number in the JSON; HF refuses that too, but only once the model is loaded."""
    for key, option in JSON_KEY_TO_OPTION.items():
        written, given = nested_value(config, key), getattr(args, option)
        if written not in (None, "auto") and written != given:
            raise UserError(
                f'{path}: "{key}" is {json.dumps(written)} there, and --{option} is {given}. Give one of them alone, '
                'or write "auto" in the JSON.'
            )
    check_filled_in(config, path, args)
    check_batch_size(config, path, args)
    check_warmup(config, path, args)


def check_filled_in(config: dict, path: str, args: TrainingArguments) -> None:
    """What the command line makes of "auto" in the optimizer's options; the engine would check it once the model is loaded."""
    params = nested_value(config, "optimizer.params")
    if not isinstance(params, dict):
        return
    flags = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": [args.adam_beta1, args.adam_beta2],
        "eps": args.adam_epsilon,
    }
    filled = {key: flags[key] for key in FILLED_IN if params.get(key) == "auto"}
    check_optimizer({**config["optimizer"], "params": {**params, **filled}}, path)


def check_batch_size(config: dict, path: str, args: TrainingArguments) -> None:
    """DeepSpeed wants the batch of all ranks to be the product of its parts."""
    written = config.get("train_batch_size")
    each, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if written in (None, "auto") or args.auto_find_batch_size or written == each * times * ranks:
        return
    raise UserError(
        f'{path}: "train_batch_size" is {json.dumps(written)} there, and --per_device_train_batch_size {each} on '
        f"{ranks} rank{'s' * (ranks > 1)}, --gradient_accumulation_steps {times} times, make {each * times * ranks}. Write "
        '"auto" in the JSON, or change one of the others.'
    )


def check_warmup(config: dict, path: str, args: TrainingArguments) -> None:
    """DeepSpeed's schedulers with a warm-up take no warm-up of 0 steps, which HF's --warmup_steps is by default."""
    params = nested_value(config, "scheduler.params")
    name = nested_value(config, "scheduler.type")
    if not isinstance(params, dict) or not str(name).startswith("Warmup"):
        return
    steps = params.get("warmup_num_steps", 1000)  # DeepSpeed's default
    if steps == "auto" and args.warmup_steps <= 0:
        raise UserError(
            f'{path}: "scheduler": "warmup_num_steps" is "auto" there, and no --warmup_steps says how many; {name} '
            'needs at least 1. Give --warmup_steps, or leave "scheduler" out of the JSON for --lr_scheduler_type.'
        )
    if steps != "auto" and (isinstance(steps, bool) or not isinstance(steps, int) or steps <= 0):
        raise UserError(
            f'{path}: "scheduler": "warmup_num_steps" is {json.dumps(steps)}; {name} needs a whole number of '
            "at least 1."
        )
