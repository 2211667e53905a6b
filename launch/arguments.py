"""Command-line arguments, and how they agree with each other and with what else describes the run.

Three groups of options: which model, which data, and everything of TRL's ``SFTConfig`` (itself everything of HF's
``TrainingArguments``). What names the optimizer, a DeepSpeed JSON (``deepspeed_json.py``) or the command line
(``named_optimizer.py``), is read first: a number that it fixes becomes the default of the matching option.
"""

import argparse
import difflib
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import HfArgumentParser
from trl import SFTConfig

from launch.deepspeed_json import (
    check_agreement,
    check_deepspeed_config,
    deepspeed_config_path,
    defaults_from_deepspeed,
)
from launch.engines import Engine, chosen_engine
from launch.errors import UserError
from launch.fsdp import check_fsdp
from launch.graphs import settle_graphs
from launch.json_files import read_json
from launch.named_optimizer import named_optimizer, refuse_names
from launch.plugins import import_plugins
from launch.profile import ProfileArguments


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
        metadata={
            "help": "Training data: .txt (a text), .jsonl (a record per line), .json (a list of records), .csv or "
            ".parquet; several may be given."
        },
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
    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "Without --deepspeed: MoFaSGD, GaLore or AdamW, or one of a plugin's. --optim names HF's others."
        },
    )
    rank: int | None = field(
        default=None, metadata={"help": "Of --optimizer: r, the momentum directions kept per matrix."}
    )
    optimizer_args: str | None = field(
        default=None,
        metadata={
            "help": "Other options of --optimizer (ds_mofa/options): a JSON object, such as "
            '\'{"explore": 32, "balance": 0.5}\', or a .json file with one.'
        },
    )
    dtype: Literal["bfloat16", "float32"] | None = field(
        default=None,
        metadata={
            "help": "Of the weights, without --deepspeed. Default: bfloat16 with --bf16, which then computes in it too; "
            "`--bf16 --dtype float32` keeps fp32 weights, at twice their memory, and computes in bf16."
        },
    )
    plugins: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Python files or modules to import first, which register optimizers of their own for --optimizer or "
            'the JSON\'s "type" (ds_mofa/optimizers/registry.py).'
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "With the whole model on each GPU: capture forward and backward in a CUDA graph for each shape of a batch, "
            "so that the GPU does not wait for the host. Batches are padded to multiples of 128 tokens."
        },
    )
    override_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "When resuming, take learning rates, weight decays, betas and eps from the command line and the "
            "JSON. Default: they are the checkpoint's, and a line names each that is another."
        },
    )
    engine: Engine = field(default=Engine.DEEPSPEED, init=False)
    # What --optimizer is built with; None where the JSON or --optim says it.
    optimizer_options: dict[str, Any] | None = field(default=None, init=False)

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
        raise UserError(f"{message}. --help lists the usual options, --help_all every one.")


def make_parser() -> Parser:
    groups: Any = (ModelArguments, DataArguments, TrainingArguments, ProfileArguments)
    return Parser(groups, prog="launch/train.py")


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse and check a command line.

    Args:
        argv: the words after the script's name, with the ``--local_rank`` that DeepSpeed's launcher adds.

    Raises:
        UserError: what is wrong with them, or with what they name.
    """
    import_plugins(argv)
    engine = chosen_engine(argv)
    check_fsdp(argv, engine is Engine.FSDP2)
    parser = make_parser()
    parser.set_defaults(eval_on_start=evaluates_before(argv))
    if engine is Engine.DEEPSPEED:
        refuse_names(argv)
        config_path = deepspeed_config_path(argv)
        config = read_json(config_path, "the --deepspeed config")
        check_deepspeed_config(config, config_path)
        parser.set_defaults(deepspeed=config_path, **(hardware_defaults() | defaults_from_deepspeed(config)))
    else:
        named = named_optimizer(argv)
        parser.set_defaults(**(hardware_defaults() | named.defaults()))
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except ValueError as error:  # options that TrainingArguments finds to contradict each other or the machine
        raise UserError(str(error)) from error
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        parser.error(f"unknown options: {' '.join(unknown)}{f'; did you mean {close[0]}?' if close else ''}")
    model_args, data_args, training_args, profile_args = groups
    training_args.engine = engine
    if engine is Engine.DEEPSPEED:
        check_agreement(config, config_path, training_args)
    else:
        training_args.optimizer_options = named.options(training_args)
    settle_precision(training_args)
    check_model_arguments(model_args)
    check_data_arguments(data_args, training_args)
    check_liger(training_args)
    if training_args.cuda_graphs:
        settle_graphs(training_args, profiled=profile_args.profile_memory)
    return model_args, data_args, training_args


def evaluates_before(argv: list[str]) -> bool:
    """Whether there is a loss before training to compare with at the end: by default, where there is data for it.

    A run that goes on has it in its history.
    """
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--eval_file", "--dataset_eval_split", "--resume_from_checkpoint"):
        words.add_argument(name, nargs="*")
    given = words.parse_known_args(argv)[0]
    return bool(given.eval_file or given.dataset_eval_split) and not given.resume_from_checkpoint


def settle_precision(args: TrainingArguments) -> None:
    """Without DeepSpeed: bf16 weights are computed with as they are, unless a mixed precision is asked for by name.

    Accelerate's mixed precision would keep them in fp32, at twice the memory. HF would ask for it with ``--bf16``.

    Raises:
        UserError: fp16 or fp8; ``--dtype`` where the JSON decides.
    """
    if args.engine is Engine.DEEPSPEED:
        if args.dtype is not None:
            raise UserError('--dtype: under --deepspeed "bf16" and "fp16" of the JSON decide. Leave it out.')
        return
    if args.fp16:
        raise UserError("--fp16: its loss scaling is DeepSpeed's here. Give --deepspeed, or --bf16.")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "bf16"):
        raise UserError(f"mixed_precision {launched} of accelerate launch: ds_mofa takes bf16 or no. Change it there.")
    if args.dtype is None and launched == "bf16":
        args.dtype, args.bf16 = "float32", True
    mixed = args.bf16 and args.dtype == "float32"
    args.mixed_precision = "bf16" if mixed else "no"


def hardware_defaults() -> dict[str, object]:
    """bf16 on GPUs that have it, and fp32 on a CPU, where bf16 is slow and saves nothing worth having."""
    on_gpu = torch.cuda.is_available()
    return {"use_cpu": not on_gpu, "bf16": on_gpu and torch.cuda.is_bf16_supported()}


def check_model_arguments(args: ModelArguments) -> None:
    if args.model_name_or_path and args.model_config:
        raise UserError(
            "--model_name_or_path and --model_config are both given. Keep the first to fine-tune a pretrained model, "
            "the second to build one with random weights."
        )
    if not args.model_name_or_path and not args.model_config:
        raise UserError(
            "No model. Give --model_name_or_path (a folder or a Hub name) or --model_config (a config.json, or to ds-mofa "
            "a name that `ds-mofa config` lists)."
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
        raise UserError(
            "No training data. Give --train_file (.txt, .jsonl, .json, .csv or .parquet) or --dataset_name."
        )
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
