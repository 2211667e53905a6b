"""Draw the picture of the README, memory and speed of AdamW, LoRA and MoFaSGD, from the rows that were measured.

    python profiling/readme_picture.py

Reads profiling/results and writes docs/memory_and_speed.png. What was not measured is written as such, not drawn.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "profiling/results"
# As the memory reports colour them.
COLOURS = {"AdamW": "#8c8c8c", "LoRA": "#c9a227", "MoFaSGD": "#2b6cb0"}
# One file of one day, where all were run one after the other on one machine: hosts differ (benchmarks/README.md).
SPEED = "house_llama-3.1-8b_1xH200_2026-11-26.jsonl"
SHAPE = "4096x2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/memory_and_speed.png")
    args = parser.parse_args()
    draw(peaks(), speeds(), args.output)
    print(args.output)


def peaks() -> dict[str, float]:
    """Peak allocated of each method at r = 8, 1024 tokens x 8 micro-batches, in GB of 10^9 bytes."""
    runs = json.loads((RESULTS / "memory/report.json").read_text())["runs"]
    names = {"AdamW": "torch:AdamW", "MoFaSGD": "torch:MoFaSGD:r=8", "LoRA": "torch:LoRA:r=8"}
    return {name: runs[run]["ranks"][0]["peaks"]["allocated"] / 1e9 for name, run in names.items()}


def speeds() -> dict[str, float | None]:
    """Tokens per second of each method at :data:`SHAPE`; None where no row has it."""
    rows = [json.loads(line) for line in (RESULTS / "benchmarks" / SPEED).read_text().splitlines()]
    at = {row["run"].split(":")[1]: row["tokens_per_second"] for row in rows if row["shape"] == SHAPE}
    return {name: at.get(name) for name in COLOURS}


def draw(memory: dict[str, float], speed: dict[str, float | None], path: Path) -> None:
    """Two panels of bars beside one column of names."""
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 12}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.9), dpi=160, sharey=True, layout="constrained")
        _bars(left, memory, "{:.1f} GB", "Peak memory: less is better", 90)
        _bars(right, speed, "{:,.0f} tokens/s", "Speed: more is better", 18500)
        left.invert_yaxis()  # and the other's, which is shared
        left.set_xlabel("r = 8, 1024 tokens x 8 micro-batches", fontsize=10, color="#555555")
        right.set_xlabel("MoFaSGD r = 32, LoRA r = 8; 4096 tokens x 2 micro-batches", fontsize=10, color="#555555")
        figure.savefig(path)
        plt.close(figure)


def _bars(axes, values: dict[str, float | None], label: str, title: str, limit: float) -> None:
    names = list(COLOURS)
    axes.barh(names, [values[name] or 0 for name in names], color=[COLOURS[name] for name in names], height=0.62)
    for place, name in enumerate(names):
        value = values[name]
        text = "not measured in that run" if value is None else label.format(value)
        axes.text(
            (value or 0) + limit * 0.015, place, text, va="center", color="#555555" if value is None else "#111111"
        )
    axes.set_title(title, fontsize=13, loc="left")
    axes.set_xlim(0, limit)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


if __name__ == "__main__":
    main()
