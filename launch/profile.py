"""``--profile_memory``: the memory profiler around a fine-tuning run.

Its options are read before all others: it has to be running when the first of them opens the GPU.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from ds_mofa.profiler import MemoryProfiler
from launch.errors import UserError


@dataclass
class ProfileArguments:
    """What to find out about the run's memory."""

    profile_memory: bool = field(
        default=False, metadata={"help": "Write where the memory goes to OUTPUT_DIR/memory (docs/memory.md)."}
    )
    profile_hz: float = field(default=20.0, metadata={"help": "Readings of the driver's figures a second."})
    memory_snapshot: bool = field(
        default=False, metadata={"help": "With --profile_memory, also one step's history for pytorch.org/memory_viz."}
    )


def start_profiler(argv: list[str]) -> MemoryProfiler | None:
    """The profiler, started, where the command line asks for one."""
    args, _ = HfArgumentParser(ProfileArguments, allow_abbrev=False).parse_known_args(argv)
    if not args.profile_memory:
        if args.memory_snapshot:
            raise UserError("--memory_snapshot is part of the memory profile. Add --profile_memory.")
        return None
    try:
        profiler = MemoryProfiler(sample_hz=args.profile_hz, memory_snapshot=args.memory_snapshot)
    except ValueError as error:
        raise UserError(f"--profile_hz: {error}.") from error
    return profiler.start()


def describe_run(profiler: MemoryProfiler, output_dir: str) -> None:
    """Tell the profiler where to write, now that it is known."""
    profiler.output_dir = Path(output_dir) / "memory"
    profiler.setting |= {"name": Path(output_dir).name}
