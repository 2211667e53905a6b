"""``ds-mofa split MODEL_OR_CONFIG``: how a model would be split, before a GPU is asked for."""

import argparse
import json
from typing import Any

import torch

from ds_mofa.commands import shipped
from ds_mofa.options import OptionError
from ds_mofa.split_model import build, described, shown

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="ds-mofa split",
        description="Say which parameters of a model are matrices, which are left to AdamW and why, and what stands in "
        "memory between two steps: from its config, without a GPU.",
    )
    parser.add_argument(
        "model",
        help="a config's file, a name of `ds-mofa config` such as llama-3.1-8b, a folder with a config, or a Hub name",
    )
    parser.add_argument("--optimizer", default="MoFaSGD", help="a name (MoFaSGD)")
    parser.add_argument("--rank", type=int, help="of the factors (the optimizer's default)")
    parser.add_argument("--include", nargs="+", help="regular expressions of names to make matrices")
    parser.add_argument("--exclude", nargs="+", help="and to leave to AdamW")
    parser.add_argument("--options", type=_object, default={}, help='others, as JSON: \'{"adamw_states": "8bit"}\'')
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (bf16)")
    parser.add_argument("--gpus", type=_positive, default=1, help="how many share the work (1)")
    parser.add_argument("--json", action="store_true", help="print JSON; sizes are bytes on each GPU")
    arguments = parser.parse_args(argv)
    given = {name: getattr(arguments, name) for name in ("rank", "include", "exclude")}
    params = arguments.options | {name: value for name, value in given.items() if value is not None}
    try:
        model = build(
            shipped.path_of(arguments.model) or arguments.model,
            torch.bfloat16 if arguments.dtype == "bf16" else torch.float32,
        )
        found = described(model, params, optimizer=arguments.optimizer, gpus=arguments.gpus)
    except OptionError as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps(found, indent=2) if arguments.json else shown(found))


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be an object")
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number
