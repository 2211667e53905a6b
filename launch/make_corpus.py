"""Write a small text corpus without a network: the sources of Python's own standard library.

    python launch/make_corpus.py --output_dir out/data

Whole files go to either train.txt or eval.txt, by a hash of their name, so the two share no file and the split is the
same on every machine. Another Python version has other sources, so compare losses under one version only.
"""

import argparse
import hashlib
import sysconfig
from pathlib import Path

# Bodies of tests and generated tables would be a third of the text and teach little.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
}
EVAL_SHARE = 0.03


def library_sources(root: Path) -> list[Path]:
    """The .py files under ``root`` that belong to the corpus, sorted by relative path."""
    files = (file for file in root.rglob("*.py") if not SKIPPED_FOLDERS & set(file.relative_to(root).parts))
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def belongs_to_eval(name: str) -> bool:
    """Deterministic draw by name: true for ``EVAL_SHARE`` of all names."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < EVAL_SHARE * 2**32


def make_corpus(root: Path, output_dir: Path, max_bytes: int) -> dict[str, tuple[Path, int, int]]:
    """Write train.txt and eval.txt.

    Args:
        root: folder of the Python sources.
        output_dir: where the two files go; created when missing.
        max_bytes: upper limit for train.txt; eval.txt gets ``EVAL_SHARE`` of it.

    Returns:
        For each split its file, the number of sources in it, and its size in bytes.
    """
    limits = {"train": max_bytes, "eval": int(max_bytes * EVAL_SHARE)}
    texts: dict[str, list[bytes]] = {"train": [], "eval": []}
    sizes = {"train": 0, "eval": 0}
    for file in library_sources(root):
        name = file.relative_to(root).as_posix()
        split = "eval" if belongs_to_eval(name) else "train"
        text = file.read_bytes()
        if sizes[split] + len(text) > limits[split]:
            continue
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:  # a few sources declare another encoding
            continue
        texts[split].append(text)
        sizes[split] += len(text)
    written = {}
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, parts in texts.items():
        if not parts:
            raise SystemExit(f"{root}: no Python sources for the {split} split. Is this Python's standard library?")
        file = output_dir / f"{split}.txt"
        file.write_bytes(b"\n".join(parts))
        written[split] = (file, len(parts), file.stat().st_size)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("out/data"))
    parser.add_argument("--max_bytes", type=int, default=4_000_000, help="upper limit for train.txt")
    args = parser.parse_args()
    root = Path(sysconfig.get_paths()["stdlib"])
    for split, (file, sources, size) in make_corpus(root, args.output_dir, args.max_bytes).items():
        print(f"{split}: {file}, {sources} files of Python's standard library, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
