"""The page and the figures of the study of projections."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_mofa.profiler.report.charts import Lines, Series
from ds_mofa.profiler.report.document import Table
from ds_mofa.profiler.report.rendering import markdown_table
from ds_mofa.profiler.report.styles import styles_of
from experiments.studies.figures import draw_panels
from experiments.studies.projections import KINDS, REFRESH_EVERY
from experiments.studies.synthetic import COUNT, DIRECTIONS, NOISE, SHAPE, TURN

__all__ = ["TITLE", "draw", "sections"]

TITLE = "What a projection of the gradient loses"

_STYLES = styles_of([*KINDS, "best"], [*KINDS, "best"])
_SAME = ("tangent", "left", "right", "two-sided")


_SET_UP = f"""
All kinds see the same gradients, which are of the trainer's path; none moves the model. Each keeps a momentum of rank r
of its own, M <- beta M + (1 - beta) P(G), starts as the rank-r SVD of the first gradient, and projects onto the
subspaces U, V of that momentum as they are before the step. All of them keep about r (m + n) numbers.

- **tangent** (MoFaSGD): P(G) = U U^T G + G V V^T - U U^T G V V^T, then cut to rank r by
  `ds_mofa.linalg.factors.update_factors`;
- **left** U U^T G, **right** G V V^T, **two-sided** U U^T G V V^T: the sum stays in the subspaces that it is projected
  onto, so U (left), V (right) or both (two-sided) never move from where the first gradient has put them;
- **refreshed**: left or right, whichever side is shorter, with a new subspace from the SVD of the gradient every
  {REFRESH_EVERY} steps, as GaLore has it.

Made-up sequences: {COUNT} matrices of {SHAPE[0]} x {SHAPE[1]}; signal of {DIRECTIONS} directions on each side, whose
core is the identity and white noise of the same norm, and over it white noise of {NOISE:g} of the signal's norm;
"rotating" turns each basis vector by {TURN:g} rad a step; "white noise" has no signal.
"""
_RESIDUAL = """
|G - P(G)| / |G|, the mean over steps and matrices. "Tangent lowest" is the share of steps and matrices where its
residual is below all others', which nothing guarantees, for each kind has subspaces of its own; "at random" is what the
tangent projection would leave in random subspaces of that rank.
"""
_SAME_SUBSPACES = """
All four projections onto the tangent's U and V. Here the paper's Theorem 4.3 says that the tangent residual is at most
each other's, at every step and for every matrix. The last column is the largest that it was found above one of them:
more than rounding above zero, and something would be wrong.
"""
_MOMENTUM = """
|M_exact - M| / |M_exact| against the dense momentum of the unprojected gradients, the mean over the matrices and the
second half of the steps; "best" is the best rank-r approximation of M_exact.
"""


def sections(result: Mapping[str, Any], figures: Sequence[str]) -> list[str]:
    return [
        _SET_UP,
        f"beta is {result['options']['beta']:g}.",
        "## Residual per step",
        _RESIDUAL,
        markdown_table(_residuals(result)),
        _picture(figures[0]),
        "## In one and the same pair of subspaces",
        _SAME_SUBSPACES,
        markdown_table(_same(result)),
        "## What the momentum lacks",
        _MOMENTUM,
        markdown_table(_momenta(result)),
        _picture(figures[1]),
        "## The tangent's residual by the matrix's role",
        markdown_table(_roles(result)),
    ]


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    labels = {"residual": "|G - P(G)| / |G|", "momentum": "|M_exact - M| / |M_exact|"}
    columns = len(result["sequences"])
    return [
        draw_panels(_charts(result, what, label), columns, folder / f"projection_{what}.png")
        for what, label in labels.items()
    ]


def _charts(result: Mapping[str, Any], what: str, label: str) -> list[Lines]:
    charts = []
    for r in map(str, result["options"]["ranks"]):
        for name, sequence in result["sequences"].items():
            series = []
            for kind, found in sequence["ranks"][r][what].items():
                x, y = zip(*found["series"])
                series.append(Series(kind, _STYLES[kind], x, y, y, y))
            charts.append(Lines(what, f"{name}, r = {r}", "step", label, series))
    return charts


def _rows(result: Mapping[str, Any]) -> list[tuple[list[str], Mapping[str, Any]]]:
    """The first cells of a row, and its numbers."""
    return [
        ([name, r], found)
        for name, sequence in result["sequences"].items()
        for r, found in sequence["ranks"].items()
    ]  # fmt: skip


def _residuals(result: Mapping[str, Any]) -> Table:
    rows = [
        [
            *head,
            *(_shown(found["residual"][kind]["mean"]) for kind in KINDS),
            f"{100 * found['lowest']:.1f} %",
            _shown(found["random"]),
        ]
        for head, found in _rows(result)
    ]
    return Table(["gradients", "r", *KINDS, "tangent lowest", "at random"], rows)


def _same(result: Mapping[str, Any]) -> Table:
    rows = [
        [*head, *(_shown(found["same"][kind]["mean"]) for kind in _SAME), f"{found['excess']:.1e}"]
        for head, found in _rows(result)
    ]
    return Table(["gradients", "r", *_SAME, "tangent above another"], rows)


def _momenta(result: Mapping[str, Any]) -> Table:
    kinds = [*KINDS, "best"]
    rows = [[*head, *(_shown(found["momentum"][kind]["late"]) for kind in kinds)] for head, found in _rows(result)]
    return Table(["gradients", "r", *kinds], rows)


def _roles(result: Mapping[str, Any]) -> Table:
    found = [(head, numbers["residual"]["tangent"]["by_role"]) for head, numbers in _rows(result)]
    real = [(head, by_role) for head, by_role in found if set(by_role) != {"other"}]
    roles = list(dict.fromkeys(role for _, by_role in real for role in by_role))
    rows = [[*head, *(_shown(by_role.get(role)) for role in roles)] for head, by_role in real]
    return Table(["gradients", "r", *roles], rows)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _picture(name: str) -> str:
    return f"![{name.removesuffix('.png').replace('_', ': ')}]({name})"
