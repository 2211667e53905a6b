"""The page and the figures of the study of the momentum's spectrum."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ds_mofa.profiler.report.charts import Lines, Series
from ds_mofa.profiler.report.document import Table
from ds_mofa.profiler.report.rendering import markdown_table
from ds_mofa.profiler.report.styles import styles_of
from experiments.studies.figures import draw_cost, draw_panels

__all__ = ["TITLE", "draw", "sections"]

TITLE = "How low-rank the momentum is, and what the rest is worth"


_SET_UP = """
The exact momentum of each matrix, M <- beta M + (1 - beta) G, is kept beside a training that does not use it. Its
energy is |M|^2, the sum of the squared singular values.
"""
_SHARES = """
Shares of the energy in %: the mean over the matrices and all looks, in brackets the lowest and the highest of any
matrix at any look. "80 %" is how many directions hold that much, in the mean. "White noise" is a random matrix of the
same shapes: a momentum without structure.
"""
_ROLES = """
The same means, by role; the side is the smaller of a matrix's two, and so the number of its directions.
"""
_COST = """
Each rank trains anew, at several learning rates of which the best counts; a star marks one at the end of its grid.
"Energy" is what the top r directions hold of the exact momentum that was observed above, not of the run's own. Muon
here is MoFaSGD's rule at full rank: the same decay, no Nesterov.
"""


def sections(result: Mapping[str, Any], figures: Sequence[str]) -> list[str]:
    tops = result["options"]["tops"]
    text = [
        _SET_UP,
        f"A look every {result['options']['every']} steps.",
        "## Energy in the leading directions",
        _SHARES,
        markdown_table(_overall(result, tops)),
        f"![energy over the steps]({figures[0]})",
        "## By the matrix's role",
        _ROLES,
        markdown_table(_by_role(result, tops)),
        "## Over the training",
        f"The share in the top {_middle(tops)}, the mean over the matrices, in %.",
        markdown_table(_over_time(result, tops)),
    ]
    for (task, costs), figure in zip(result["costs"].items(), figures[1:]):
        text += [
            f"## What the lost energy costs: {task}",
            _COST,
            _trainer(result, task),
            markdown_table(_cost(result, task, costs)),
            f"![final loss against captured energy]({figure})",
        ]
    return text


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    charts = []
    tops = result["options"]["tops"]
    labels = [f"top {k}" for k in tops]
    styles = styles_of(labels, labels)
    for task, observed in result["tasks"].items():
        for beta in _betas(result):
            looks = observed["betas"][beta]
            x = [look["step"] for look in looks]
            series = []
            for label, k in zip(labels, tops):
                values = [[100 * share[observed["tops"].index(k)] for share in look["share"]] for look in looks]
                bands = [fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]
                series.append(Series(label, styles[label], x, *bands))
            charts.append(Lines("spectrum", f"{task}, beta {beta}", "step", "share of |M|^2, %", series))
    written = [draw_panels(charts, len(_betas(result)), folder / "spectrum_energy.png")]
    for task, costs in result["costs"].items():
        trainer = result["plans"][task]["trainer"]["optimizer"]
        lines = [(f"{trainer}, the trainer", result["tasks"][task]["dev"]["loss"])]
        written.append(draw_cost(costs, lines, "final dev loss", folder / f"spectrum_cost_{task}.png"))
    return written


def _betas(result: Mapping[str, Any]) -> list[str]:
    return [str(beta) for beta in result["options"]["betas"]]


def _overall(result: Mapping[str, Any], tops: Sequence[int]) -> Table:
    rows = []
    for task, observed in result["tasks"].items():
        matrices, places = observed["matrices"], [observed["tops"].index(k) for k in tops]
        for beta in _betas(result):
            shares, counts = _values(observed["betas"][beta], range(len(matrices)))
            cells = [_spread([share[k] for share in shares]) for k in places]
            rows.append([task, beta, *cells, f"{fmean(counts):.1f}"])
        noise = [_spread([matrix["noise"][k] for matrix in matrices]) for k in places]
        rows.append([task, "white noise", *noise, "-"])
    return Table(["momentum of", "beta", *(f"top {k}" for k in tops), "80 %"], rows)


def _by_role(result: Mapping[str, Any], tops: Sequence[int]) -> Table:
    rows = []
    for task, observed in result["tasks"].items():
        matrices, places = observed["matrices"], [observed["tops"].index(k) for k in tops]
        for beta in _betas(result):
            for role in dict.fromkeys(matrix["role"] for matrix in matrices):
                own = [i for i, matrix in enumerate(matrices) if matrix["role"] == role]
                sides = sorted({min(matrices[i]["shape"]) for i in own})
                shares, counts = _values(observed["betas"][beta], own)
                cells = [f"{100 * fmean(share[k] for share in shares):.1f}" for k in places]
                rows.append([task, beta, role, ", ".join(map(str, sides)), *cells, f"{fmean(counts):.1f}"])
    return Table(["momentum of", "beta", "role", "side", *(f"top {k}" for k in tops), "80 %"], rows)


def _values(looks: Sequence[Mapping[str, Any]], own: Iterable[int]) -> tuple[list[Sequence[float]], list[int]]:
    """The shares of these matrices, and how many directions hold 80 %, at every look."""
    own = list(own)
    return [look["share"][i] for look in looks for i in own], [look["directions"][i] for look in looks for i in own]


def _over_time(result: Mapping[str, Any], tops: Sequence[int]) -> Table:
    """At the first look, a quarter, half, three quarters, and the last."""
    rows = []
    for task, observed in result["tasks"].items():
        for beta in _betas(result):
            looks = observed["betas"][beta]
            chosen = [looks[round(part * (len(looks) - 1))] for part in (0, 0.25, 0.5, 0.75, 1)]
            k = observed["tops"].index(_middle(tops))
            cells = [f"{100 * fmean(s[k] for s in look['share']):.1f} (step {look['step']})" for look in chosen]
            rows.append([task, beta, *cells])
    return Table(["momentum of", "beta", "first", "1/4", "1/2", "3/4", "last"], rows)


def _middle(tops: Sequence[int]) -> int:
    """32, of which the paper speaks, or the last but one."""
    return 32 if 32 in tops else tops[-2 if len(tops) > 1 else 0]


def _trainer(result: Mapping[str, Any], task: str) -> str:
    trainer, loss = result["plans"][task]["trainer"], result["tasks"][task]["dev"]["loss"]
    return (
        f"The trainer, {trainer['optimizer']} at lr {trainer['lr']:g}, ends at {loss:.4f}; its rate was not searched."
    )


def _cost(result: Mapping[str, Any], task: str, costs: Sequence[Mapping[str, Any]]) -> Table:
    finals = [point["loss"][point["best"]] for point in costs if point["best"] is not None]
    rows = []
    for point in costs:
        rates = sorted(point["loss"], key=float)
        edge = "*" if len(rates) > 1 and point["best"] in (rates[0], rates[-1]) else ""
        best = point["loss"][point["best"]] if point["best"] is not None else None
        rows.append(
            [
                point["label"],
                "full" if point["rank"] is None else str(point["rank"]),
                f"{100 * point['captured']:.2f}",
                _loss(best),
                "-" if best is None else f"{best - min(finals):+.4f}",
                f"{point['best']}{edge}" if point["best"] is not None else "-",
                "; ".join(f"{lr}: {_loss(point['loss'][lr])}" for lr in rates),
            ]
        )
    return Table(["optimizer", "r", "energy, %", "dev loss", "above the best", "best lr", "by lr"], rows)


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def _spread(shares: Sequence[float]) -> str:
    return f"{100 * fmean(shares):.1f} ({100 * min(shares):.0f} to {100 * max(shares):.0f})"
