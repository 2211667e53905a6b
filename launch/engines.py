"""Which engine trains: decided before all else, by the command line and by what the launcher has set."""

import argparse
import enum
import os
from collections.abc import Sequence

from launch.errors import UserError

__all__ = ["Engine", "chosen_engine", "ranks"]


class Engine(enum.Enum):
    """What shards the model and adds up over ranks; the value is its name."""

    DEEPSPEED = "DeepSpeed"  # --deepspeed, or a DeepSpeed config of `accelerate launch`
    FSDP2 = "FSDP2"  # --fsdp, or an FSDP config of `accelerate launch`
    DDP = "DDP"  # another launcher's ranks: torchrun, accelerate launch, deepspeed
    ONE = "one process"  # no launcher


def chosen_engine(argv: Sequence[str]) -> Engine:
    """The engine of this command line in this environment.

    Raises:
        UserError: two of them are asked for, or one that needs a launcher and has none.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deepspeed")
    parser.add_argument("--fsdp", nargs="?", const="true")
    given = parser.parse_known_args(argv)[0]
    asked = {
        "--deepspeed": (Engine.DEEPSPEED, given.deepspeed is not None),
        "--fsdp": (Engine.FSDP2, bool(given.fsdp)),
        "the DeepSpeed config of accelerate launch": (Engine.DEEPSPEED, _is_on("ACCELERATE_USE_DEEPSPEED")),
        "the FSDP config of accelerate launch": (Engine.FSDP2, _is_on("ACCELERATE_USE_FSDP")),
    }
    asked = {source: engine for source, (engine, wanted) in asked.items() if wanted}
    launched = "RANK" in os.environ
    if len(set(asked.values())) > 1 or list(asked.values()).count(Engine.FSDP2) > 1:
        raise UserError(f"{' and '.join(asked)} are both given. Keep one.")
    if not asked:
        return Engine.DDP if launched else Engine.ONE
    engine = next(iter(asked.values()))
    if not launched:
        raise UserError(_HOW_TO_LAUNCH[engine])
    return engine


_HOW_TO_LAUNCH = {
    Engine.DEEPSPEED: "No launcher started this process. Use `deepspeed launch/train.py ...` (one process per GPU), or "
    "`accelerate launch --config_file configs/accelerate_zero2.yaml launch/train.py ...`.",
    Engine.FSDP2: "--fsdp: no launcher started this process. Use `torchrun --nproc_per_node N launch/train.py --fsdp "
    "...` (one process per GPU), or `accelerate launch --config_file configs/fsdp2.yaml launch/train.py ...`.",
}


def ranks() -> int:
    """How many processes train, from the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
