"""Make a checkpoint loadable on any number of ranks and at ZeRO stage 1, 2 or 3: ``python -m ds_mofa.to_universal``."""

import argparse
from pathlib import Path

from ds_mofa.backends.deepspeed.checkpoints import CheckpointError
from ds_mofa.backends.deepspeed.universal import convert


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ds_mofa.to_universal",
        description="Make a checkpoint of MoFaSGD loadable on any number of ranks and at ZeRO stage 1, 2 or 3.",
        epilog='The run that loads it needs "checkpoint": {"load_universal": true} in its DeepSpeed config.',
    )
    parser.add_argument("--input_folder", type=Path, required=True, help="of one tag, such as out/global_step100")
    parser.add_argument("--output_folder", type=Path, required=True, help="to write; must not exist")
    parser.add_argument("--workers", type=int, default=4, help="processes (4)")
    parser.add_argument("--trust", action="store_true", help="run what its pickles hold, if it is your own")
    arguments = parser.parse_args()
    try:
        convert(arguments.input_folder, arguments.output_folder, arguments.workers, arguments.trust)
    except CheckpointError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
