"""Write labelled sentences as plain text, for a language model: train.txt and eval.txt, without the labels.

    python experiments/make_sentences.py path/to/sst2 --output_dir out/sentences

The folder is as the task sst2 of a comparison wants it: train.txt, dev.txt and test.txt, each line a label, 0 or 1, a
space and a sentence. eval.txt has the sentences of dev.txt and test.txt.
"""

import argparse
import sys
from pathlib import Path

# A script's first import folder is its own; this makes it the repository's, from wherever it is run.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.comparison.tasks.sst2 import read_sentences
from launch.errors import UserError

SPLITS = {"train": ["train"], "eval": ["dev", "test"]}


def make_sentences(folder: Path, output_dir: Path) -> dict[str, int]:
    """Write both files; returns how many sentences each has.

    Raises:
        UserError: a file is missing, or a line of one is no labelled sentence.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, names in SPLITS.items():
        sentences = [sentence for name in names for sentence in _sentences(folder / f"{name}.txt")]
        (output_dir / f"{split}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
        counts[split] = len(sentences)
    return counts


def _sentences(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"{file}: no such file. Give a folder with train.txt, dev.txt and test.txt.")
    return read_sentences(file)[1]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train.txt, dev.txt and test.txt")
    parser.add_argument("--output_dir", type=Path, default=Path("out/sentences"))
    args = parser.parse_args(argv)
    for split, count in make_sentences(args.folder, args.output_dir).items():
        print(f"{split}: {args.output_dir / split}.txt, {count} sentences")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"make_sentences.py: error: {error}", file=sys.stderr)
        sys.exit(2)
