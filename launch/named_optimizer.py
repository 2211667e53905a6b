"""The optimizer that the command line names, where no DeepSpeed JSON does.

``--optimizer`` names one of ds_mofa's registry, with its options in ``--rank`` and ``--optimizer_args``, or AdamW.
Hugging Face's own flags hold for it too: ``--learning_rate``, ``--weight_decay``, ``--adam_beta1``, ``--adam_beta2`` and
``--adam_epsilon``. A value that ``--optimizer_args`` fixes becomes the default of its flag, and a flag that contradicts
it is refused.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ds_mofa import ForTrainer, OptionError
from ds_mofa.optimizers import registry
from ds_mofa.options import OptimizerOptions
from launch.errors import UserError
from launch.json_files import parse, read_json

__all__ = ["ADAMW", "ADAMW_LEARNING_RATE", "NamedOptimizer", "named_optimizer", "refuse_names", "trainer_s_optimizer"]

ADAMW = "AdamW"  # Hugging Face's default --optim
ADAMW_LEARNING_RATE = 2e-5  # a starting point, not a tuned value
_OWN = ("--optimizer", "--rank", "--optimizer_args")
_MOMENTS = ("betas", "eps")  # of the rule, where it has them, else of AdamW's part


@dataclasses.dataclass(frozen=True)
class NamedOptimizer:
    """What the command line says of its optimizer.

    Attributes:
        entry: of the registry; None where ``--optim`` makes it.
        given: of its options, those that ``--rank`` and ``--optimizer_args`` fix.
    """

    entry: registry.Entry | None
    given: dict[str, Any]

    def defaults(self) -> dict[str, object]:
        """Of Hugging Face's options, those that the optimizer has a default of its own for."""
        if self.entry is None:
            return {"learning_rate": ADAMW_LEARNING_RATE}
        options = self.entry.options.from_config(self.given)[0]
        return {flag: value for flags, values in _pairs(options) for flag, value in zip(flags, values)}

    def options(self, args: TrainingArguments) -> dict[str, Any] | None:
        """All that it is to be built with, the flags included; None where ``--optim`` makes it.

        Raises:
            UserError: a flag says something else than ``--optimizer_args``, or a value cannot be right.
        """
        if self.entry is None:
            return None
        options = dict(self.given)
        for name, flags in _flags(self.entry.options):
            values = [getattr(args, flag) for flag in flags]
            value = values if len(flags) > 1 else values[0]
            if name in self.given and self.given[name] != value:
                raise UserError(
                    f'--optimizer_args: "{name}" is {self.given[name]} there, and --{" --".join(flags)} says {value}. '
                    "Give one of them alone."
                )
            options[name] = value
        self._checked(options)
        return options

    def _checked(self, options: dict[str, Any]) -> None:
        assert self.entry is not None
        try:
            self.entry.options.from_config(options)
        except OptionError as error:
            raise UserError(f"--optimizer {self.entry.name}: {error}") from None


def named_optimizer(argv: Sequence[str]) -> NamedOptimizer:
    """What the words say; ``--optim`` alone is enough.

    Raises:
        UserError: nothing names an optimizer, or two do; an unknown name; an option that it does not take.
    """
    given = _given(argv)
    if given.optimizer is None:
        if given.optim is None:
            raise UserError(
                f"Nothing says which optimizer to train with. Give --optimizer MoFaSGD (or {', '.join(_others())}), with "
                "--rank and --optimizer_args for its options, or --optim for one of Hugging Face's; or a DeepSpeed "
                "config that names one, such as --deepspeed configs/zero2_mofasgd.json, to ds-mofa zero2."
            )
        _refuse(given, ("--rank", "--optimizer_args"), "without --optimizer there is nothing that it is an option of.")
        return NamedOptimizer(None, {})
    if given.optim is not None:
        raise UserError(f"--optimizer {given.optimizer} and --optim {given.optim} are both given. Keep one.")
    entry = registry.find(given.optimizer)
    if entry is None:
        if given.optimizer.lower() != ADAMW.lower():
            names = [*registry.OPTIMIZERS, ADAMW]
            close = difflib.get_close_matches(given.optimizer.lower(), [name.lower() for name in names], n=1)
            meant = next((name for name in names if close and name.lower() == close[0]), None)
            raise UserError(
                f"--optimizer {given.optimizer}: no such optimizer"
                + (f"; did you mean {meant}?" if meant else ".")
                + f" There are {', '.join(names)}; --plugins brings others, and --optim names Hugging Face's."
            )
        _refuse(
            given, ("--rank", "--optimizer_args"), "AdamW has no such option. Its own are --adam_beta1 and the like."
        )
        return NamedOptimizer(None, {})
    params = _params(given)
    NamedOptimizer(entry, params)._checked(params)
    return NamedOptimizer(entry, {entry.options.aliases.get(name, name): value for name, value in params.items()})


def trainer_s_optimizer(args: TrainingArguments) -> tuple[type[ForTrainer], dict[str, Any]] | None:
    """For the Trainer's ``optimizer_cls_and_kwargs``; None where DeepSpeed or ``--optim`` makes the optimizer."""
    if args.optimizer_options is None:
        return None
    return ForTrainer, {"optimizer": args.optimizer, **args.optimizer_options}


def refuse_names(argv: Sequence[str]) -> None:
    """Under DeepSpeed the JSON says it all.

    Raises:
        UserError: an option of this file is given.
    """
    _refuse(_given(argv), _OWN, 'under --deepspeed the JSON names the optimizer. Write it into "optimizer" there.')


def _given(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (*_OWN, "--optim"):
        parser.add_argument(flag)
    try:
        return parser.parse_known_args(argv)[0]
    except SystemExit:
        raise UserError(f"{', '.join(_OWN)} and --optim each take one value.") from None


def _refuse(given: argparse.Namespace, flags: Sequence[str], why: str) -> None:
    for flag in flags:
        if getattr(given, flag.removeprefix("--")) is not None:
            raise UserError(f"{flag}: {why}")


def _params(given: argparse.Namespace) -> dict[str, Any]:
    """The options in ``--optimizer_args`` and ``--rank``."""
    text = given.optimizer_args
    if text is None:
        params = {}
    elif text.lstrip().startswith("{"):
        params = parse(text, "--optimizer_args", 'It is a JSON object, such as {"explore": 32}.')
    elif Path(text).suffix == ".json":
        params = read_json(text, "the --optimizer_args file")
    else:
        raise UserError(
            f"--optimizer_args {text}: it must be a JSON object, such as '{{\"explore\": 32}}', or a .json file."
        )
    if given.rank is not None:
        if not given.rank.isdigit():
            raise UserError(f"--rank {given.rank}: it must be a whole number of at least 1.")
        rank = int(given.rank)
        if params.get("rank", rank) != rank:
            raise UserError(f'--optimizer_args: "rank" is {params["rank"]} there, and --rank is {rank}. Keep one.')
        params["rank"] = rank
    return params


def _others() -> list[str]:
    return [*(name for name in registry.OPTIMIZERS if name != "MoFaSGD"), ADAMW]


def _flags(options: type[OptimizerOptions] | OptimizerOptions) -> list[tuple[str, tuple[str, ...]]]:
    """Of each option that Hugging Face has flags for, its name and theirs."""
    known = {field.name for field in dataclasses.fields(options)}
    betas, eps = (name if name in known else f"adamw_{name}" for name in _MOMENTS)
    return [
        ("lr", ("learning_rate",)),
        ("weight_decay", ("weight_decay",)),
        (betas, ("adam_beta1", "adam_beta2")),
        (eps, ("adam_epsilon",)),
    ]


def _pairs(options: OptimizerOptions) -> list[tuple[tuple[str, ...], Sequence[float]]]:
    """Of each such option the flags, and a value for each."""
    pairs = []
    for name, flags in _flags(options):
        value = getattr(options, name)
        pairs.append((flags, value if len(flags) > 1 else [value]))
    return pairs
