"""The tables of architectures and of shares, in docs/support.md and docs/models.md: ``--write`` measures and renews them.

    python tests/architectures_table.py --write                      all of it: a quarter of an hour on two cores
    python tests/architectures_table.py --write LlamaForCausalLM     the rows of these; the others stay
    python tests/architectures_table.py --write --shares             the shares alone: seconds

Without ``--write`` it says what would change, and fails if anything would. It needs the paths of tests/README.md.
"""

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[1:1] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/ranks")]

from tests.architectures import ARCHITECTURES  # noqa: E402
from tests.lessons import ENGINES, lesson, real_shares, shares, verdict  # noqa: E402

SUPPORT, MODELS = ROOT / "docs/support.md", ROOT / "docs/models.md"
REAL = (
    "llama-3.1-8b", "qwen3.5-9b", "gemma-3-4b", "gemma-3-27b",
    "gpt-oss-20b", "qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-120b", "deepseek-v3",
)  # fmt: skip
_BEGIN, _END = "<!-- measured by tests/architectures_table.py -->", "<!-- end -->"
_HEADS = {
    SUPPORT: ("architecture", "matrices", "with `include`", *(title for _, title in ENGINES)),
    MODELS: ("model", "parameters", "matrices", "with `include`", "largest of the rest"),
}

Rows = dict[str, list[str]]


def written(file: Path) -> Rows:
    """The cells of the table that stands in a file, by the name in the first, without it."""
    _, _, rest = file.read_text(encoding="utf-8").partition(_BEGIN)
    lines = [line for line in rest.partition(_END)[0].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {name.strip("`"): others for name, *others in cells}


def percent(share: float) -> str:
    """Rounded down: 100 is all."""
    return f"{math.floor(1000 * share) / 10} %"


def shares_of(name: str) -> list[str]:
    """Cells of an architecture."""
    return [percent(share) for share in shares(ARCHITECTURES[name])]


def shares_of_real(name: str) -> list[str]:
    """Cells of a published shape of configs/models."""
    found = real_shares(str(ROOT / f"configs/models/{name}.json"))
    return [f"{found.parameters / 1e9:.2f} B", percent(found.default), percent(found.included), found.rest]


def trained(names: list[str]) -> Rows:
    """Cells of what training shows, by architecture: one process here, the other engines on two ranks."""
    alone = {name: lesson(ARCHITECTURES[name]) for name in names}
    cells = {name: [verdict(alone[name])] for name in names}
    import pytest
    from launching import Launcher, cases  # of tests/ranks: only the command has its path
    from scenes.architectures import on_engine

    engines = [engine for engine, _ in ENGINES[1:]]
    with tempfile.TemporaryDirectory() as folder:
        launcher, wanted = Launcher(Path(folder)), cases(on_engine, name=names, engine=engines)
        for (name, _), case in zip(itertools.product(names, engines), wanted, strict=True):
            try:
                found = launcher.result(case, wanted).ranks[0]
            except pytest.fail.Exception as failed:
                text = str(failed)
                found = {"error": "it hangs" if ".stuck:" in text else text.strip().splitlines()[-1]}
            cells[name].append(verdict(alone[name], **found))
    return cells


def filled(file: Path, rows: Rows) -> str:
    """The text of a file with its table made of ``rows``, under a line of each family where there are families."""
    before, _, rest = file.read_text(encoding="utf-8").partition(_BEGIN)
    heads = _HEADS[file]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    family = None
    for name, cells in rows.items():
        if name in ARCHITECTURES and ARCHITECTURES[name].family != family:
            family = ARCHITECTURES[name].family
            lines.append(f"| **{family}** " + "| " * (len(heads) - 1) + "|")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    after = rest.partition(_END)[2]
    return before + "\n".join([_BEGIN, "", *lines, "", _END]) + after


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of architectures; default: all")
    parser.add_argument("--write", action="store_true", help="renew the tables")
    parser.add_argument("--shares", action="store_true", help="train nothing")
    args = parser.parse_args(None if arguments is None else list(arguments))
    unknown = [name for name in args.names if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"{unknown[0]!r} is not among {', '.join(ARCHITECTURES)}")

    stands = written(SUPPORT)
    names = [] if args.shares else args.names or list(ARCHITECTURES)
    verdicts = trained(names) if names else {}
    unmeasured = ["not measured"] * len(ENGINES)
    rows = {
        name: shares_of(name) + (verdicts.get(name) or stands.get(name, [])[2:] or unmeasured) for name in ARCHITECTURES
    }
    stale = False
    for file, found in ((SUPPORT, rows), (MODELS, {name: shares_of_real(name) for name in REAL})):
        text = filled(file, found)
        if text != file.read_text(encoding="utf-8"):
            stale = True
            old = written(file)
            for name in [*old, *(name for name in found if name not in old)]:
                if old.get(name) != found.get(name):
                    print(f"{file.name}: {name}: {old.get(name)} -> {found.get(name)}")
            if args.write:
                file.write_text(text, encoding="utf-8")
    return int(stale and not args.write)


if __name__ == "__main__":
    sys.exit(main())
