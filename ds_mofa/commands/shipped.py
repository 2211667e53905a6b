"""The scripts, configs and model shapes that come with the package, and ``ds-mofa config NAME``, which prints one.

From a clone they lie in its root. A wheel has the same three folders beside this file, under clone/ (setup.py).
"""

import argparse
import sys
from pathlib import Path

__all__ = ["ROOT", "main", "names", "path_of"]

_INSTALLED = Path(__file__).resolve().parent / "clone"
ROOT = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[2]


def names() -> dict[str, Path]:
    """{name: file}: DeepSpeed's and Accelerate's configs, and the shapes of models."""
    files = [
        *(ROOT / "configs").glob("*.json"),
        *(ROOT / "configs").glob("*.yaml"),
        *(ROOT / "configs/models").glob("*.json"),
    ]
    return {path.stem: path for path in sorted(files)}


def path_of(name: str) -> str | None:
    """The file that is meant by ``name``: one of :func:`names` ("zero2" is zero2_mofasgd), or by its place in a clone,
    "configs/zero2_mofasgd.json". None for other names, and for what is at hand by that name.
    """
    if Path(name).exists():
        return None
    if name.startswith("configs/") and (ROOT / name).is_file():
        return str(ROOT / name)
    known = names()
    found = known.get(name, known.get(f"{name}_mofasgd"))
    return None if found is None else str(found)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ds-mofa config", description="Print a config, or without a name list those that there are."
    )
    parser.add_argument("name", nargs="?", help="such as zero2, zero2_adamw or llama-3.1-8b")
    parser.add_argument("--path", action="store_true", help="print where it lies instead")
    arguments = parser.parse_args(argv)
    if arguments.name is None:
        print("\n".join(names()))
        return
    found = path_of(arguments.name)
    if found is None:
        sys.exit(f"ds-mofa config: error: no {arguments.name!r}; there are {', '.join(names())}")
    print(found if arguments.path else Path(found).read_text().rstrip())
