"""Command-line arguments, and how they agree with the DeepSpeed JSON.

Three groups of options: which model, which data, and everything of TRL's ``SFTConfig`` (itself everything of HF's
``TrainingArguments``). The DeepSpeed JSON is read first: a number that it fixes becomes the default of the matching
option, so that a JSON alone fully describes a run, and HF raises when a command line contradicts it.
"""

import argparse
import difflib
import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from transformers import HfArgumentParser
from trl import SFTConfig

from ds_mofa import OptionError
from ds_mofa.deepspeed.build import read_options
from ds_mofa.optimizers import registry
from launch.errors import UserError
from launch.json_files import read_json
from launch.plugins import import_plugins
from launch.profile import ProfileArguments

# Starting points, not tuned values; those of ds_mofa's optimizers are in its registry.
ADAM_LEARNING_RATE = {"adamw": 2e-5, "adam": 2e-5}

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


@dataclass
class ModelArguments:
    """Which model and tokenizer to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained model: a local folder, or a name on the Hub."}
    )
    model_config: str | None = field(
        default=None,
        metadata={"help": "JSON with a model's shape (see configs/models): random weights, for measuring."},
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Tokenizer, if not the model's own. Default with --model_config: one token per byte."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention kernel: sdpa, flash_attention_2, flash_attention_3, eager. Default: sdpa, or eager for "
            "a model that has none."
        },
    )

    @property
    def tokenizer_source(self) -> str | None:
        """Where the tokenizer comes from; None for the byte-level one."""
        return self.tokenizer_name_or_path or self.model_name_or_path


@dataclass
class DataArguments:
    """Which data to train and evaluate on."""

    train_file: list[str] = field(
        default_factory=list,
        metadata={"help": "Training data: .txt (a text) or .jsonl (a record per line); several may be given."},
    )
    eval_file: list[str] = field(default_factory=list, metadata={"help": "Evaluation data, as --train_file."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset to load with `datasets.load_dataset`, instead of --train_file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    dataset_train_split: str = field(default="train", metadata={"help": "Training split of --dataset_name."})
    dataset_eval_split: str | None = field(
        default=None, metadata={"help": "Evaluation split of --dataset_name, such as `validation`."}
    )
    ignore_keys: list[str] = field(
        default_factory=list, metadata={"help": "Keys of the records to leave out, such as `id source`."}
    )
    answers_only: bool = field(default=False, init=False)  # --assistant_only_loss, an option of TRL's


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's ``SFTConfig`` with the defaults of a fine-tuning command that measures what it does."""

    output_dir: str = field(default="out/model", metadata={"help": "Checkpoints, logs and the final model go here."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in backward: less memory, more time."}
    )
    bf16: bool = field(
        default=False, metadata={"help": "Train in bf16. Default: where the GPU has it; `--bf16 false` for fp32."}
    )
    report_to: str = field(default="none", metadata={"help": "Where to log: none, tensorboard, wandb."})
    eval_packing: bool = field(
        default=False,
        metadata={"help": "Not supported: evaluation keeps to one example per row, so that each counts once."},
    )
    save_strategy: str = field(
        default="no", metadata={"help": "When to write checkpoints to resume from: no, steps, epoch."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep: the newest whole ones, and the best. 0 keeps all."}
    )
    plugins: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Python files or modules to import first, which register optimizers of their own for the JSON's "
            '"type" (ds_mofa/optimizers/registry.py).'
        },
    )
    override_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "When resuming, take learning rates, weight decays, betas and eps from the command line and the "
            "JSON. Default: they are the checkpoint's, and a line names each that is another."
        },
    )

    def __post_init__(self):
        # HF takes greater for better unless a name ends in "loss", and would keep the worst.
        if self.greater_is_better is None and str(self.metric_for_best_model).removeprefix("eval_") == "perplexity":
            self.greater_is_better = False
        super().__post_init__()

    def __getstate__(self) -> dict[str, object]:
        """What HF pickles into training_args.bin beside a model, which may be uploaded or handed on: no tokens."""
        return self.__dict__ | {"hub_token": None}


class Parser(HfArgumentParser):
    """Complains like the rest of the command, instead of with a page of usage from every rank."""

    def error(self, message: str):
        raise UserError(f"{message}. `python launch/train.py --help` lists all options.")


def make_parser() -> Parser:
    groups: Any = (ModelArguments, DataArguments, TrainingArguments, ProfileArguments)
    return Parser(groups, prog="deepspeed launch/train.py")


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse and check a command line.

    Args:
        argv: the words after the script's name, with the ``--local_rank`` that DeepSpeed's launcher adds.
    """
    import_plugins(argv)
    config_path = deepspeed_config_path(argv)
    config = read_json(config_path, "the --deepspeed config")
    check_deepspeed_config(config, config_path)
    parser = make_parser()
    parser.set_defaults(deepspeed=config_path, **(hardware_defaults() | defaults_from_deepspeed(config)))
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except ValueError as error:  # options that TrainingArguments finds to contradict each other or the machine
        raise UserError(str(error)) from error
    if unknown:
        parser.error(f"unknown options: {' '.join(unknown)}")
    model_args, data_args, training_args, _ = groups  # the last were read before: launch/profile.py
    check_agreement(config, config_path, training_args)
    check_model_arguments(model_args)
    check_data_arguments(data_args, training_args)
    check_liger(training_args)
    return model_args, data_args, training_args


def deepspeed_config_path(argv: list[str]) -> str:
    """The value of ``--deepspeed``, or the file that ``accelerate launch`` names in its place."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deepspeed", default=_config_of_accelerate())
    path = parser.parse_known_args(argv)[0].deepspeed
    if path is None:
        raise UserError(
            "No DeepSpeed config, so nothing says which optimizer to train with. Give one, such as "
            "--deepspeed configs/zero2_mofasgd.json."
        )
    return path


def _config_of_accelerate() -> str | None:
    """The file that a config of ``accelerate launch`` names; configs/accelerate_zero2.yaml does from the repository."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is None or Path(path).is_file():
        return path
    shipped = Path(__file__).resolve().parents[1] / path
    return str(shipped) if shipped.is_file() else path


def hardware_defaults() -> dict[str, object]:
    """bf16 on GPUs that have it, and fp32 on a CPU, where bf16 is slow and saves nothing worth having."""
    on_gpu = torch.cuda.is_available()
    return {"use_cpu": not on_gpu, "bf16": on_gpu and torch.cuda.is_bf16_supported()}


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
    check_batch_size(config, path, args)
    check_warmup(config, path, args)


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


def check_model_arguments(args: ModelArguments) -> None:
    if args.model_name_or_path and args.model_config:
        raise UserError(
            "--model_name_or_path and --model_config are both given. Keep the first to fine-tune a pretrained model, "
            "the second to build one with random weights."
        )
    if not args.model_name_or_path and not args.model_config:
        raise UserError(
            "No model. Give --model_name_or_path (a folder or a Hub name) or --model_config (configs/models/*.json)."
        )


def check_liger(args: TrainingArguments) -> None:
    """HF would find out on every rank, once the model is loaded."""
    if not args.use_liger_kernel:
        return
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "--use_liger_kernel: liger-kernel is not installed. `pip install 'ds_mofa[liger]'`, or leave the option out."
        )
    if not torch.cuda.is_available():
        raise UserError("--use_liger_kernel: its kernels need a GPU, and there is none. Leave the option out.")


def check_data_arguments(args: DataArguments, training_args: TrainingArguments) -> None:
    if args.dataset_name and (args.train_file or args.eval_file):
        raise UserError("--dataset_name and --train_file/--eval_file are both given. Keep one source of data.")
    if not args.dataset_name and not args.train_file:
        raise UserError("No training data. Give --train_file (.txt or .jsonl) or --dataset_name.")
    if training_args.eval_packing:
        raise UserError(
            "--eval_packing would count some examples twice. Leave it out; --packing is for training alone."
        )
    check_trl_data_options(args, training_args)
    if training_args.packing and training_args.packing_strategy == "wrapped":
        raise UserError(
            "--packing_strategy wrapped runs examples together, and each sees those before it in its row. Take bfd "
            "(the default) or bfd_split; a text to train on in blocks is a .txt file."
        )
    has_eval_data = bool(args.eval_file or args.dataset_eval_split)
    wants_eval = training_args.eval_strategy != "no" or training_args.eval_on_start
    if wants_eval and not has_eval_data:
        raise UserError(
            "Evaluation is asked for but there is nothing to evaluate on. Add --eval_file or --dataset_eval_split."
        )


def check_trl_data_options(args: DataArguments, training_args: TrainingArguments) -> None:
    """TRL's options for data that it encodes itself: ours reach it encoded, so they would do nothing, or too late."""
    for option in ("chat_template_path", "eos_token"):
        if getattr(training_args, option) is not None:
            raise UserError(
                f"--{option}: the data are encoded with the tokenizer as it is. Set it in the tokenizer's own folder, "
                "and give that as --tokenizer_name_or_path."
            )
    if training_args.completion_only_loss is False:
        raise UserError(
            "--completion_only_loss false: prompts are not learned here. Use records with 'text' to learn all of them."
        )
    # TRL would look for conversations in what is encoded already; here every record is asked.
    args.answers_only, training_args.assistant_only_loss = training_args.assistant_only_loss, False
