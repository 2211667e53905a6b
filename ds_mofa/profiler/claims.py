"""What is claimed of MoFaSGD's memory, and whether measured runs bear it out."""

from collections.abc import Mapping
from typing import Any

from ds_mofa.profiler.categories import IN_ALLOCATOR, gb
from ds_mofa.profiler.layout import fullest
from ds_mofa.profiler.measure.layers import verdict
from ds_mofa.profiler.report.units import unit_of

__all__ = ["judge"]

# arXiv 2507.08091, LLaMA-3.1-8B in pure bf16, batch 1, 1024 tokens, accumulation 8, no checkpointing.
LIMIT_MOFASGD = 29_000_000_000  # bytes allocated at the peak
ABOUT_ADAMW = 70_000_000_000  # "about": within 5 %
SETTING = ("llama-3.1-8b", "1024x8")

# The run: with whose layers and loss.
MOFASGD = {
    "torch:MoFaSGD:r=8": "HF's own layers and loss",
    "torch:MoFaSGD:r=8:liger=1": "liger-kernel's layers and loss",
}

_NOT_RUN = {"error": "it was not run"}


def judge(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A verdict for each claim that the runs can be asked about.

    Returns:
        For each: ``claim``, ``measured``, ``verdict``, and ``holds``: True, False, or None where it was not measured.
    """
    claims = [*_paper(runs)]
    for name, report in runs.items():
        if "error" in report:
            claims.append(_claim(f"{name} runs", report["error"], None, "not measured"))
            continue
        if ":MoFaSGD" in name:
            claims.append(_no_gradient_lives(name, verdict(fullest(report)["layers"])))
    for name, report in runs.items():
        if "error" not in report:
            claims += _prediction(name, report)
            claims += _overhead(name, report)
    return claims


def _no_gradient_lives(name: str, found: tuple[bool, str]) -> dict[str, Any]:
    claim, (holds, text) = f"{name}: no full-rank gradient lives", found
    if name.startswith("zero3") and not holds:  # weights in a copy that no stack tells from a gradient
        text += (
            ". In stage 3 gathered weights, of the same sizes, are among what is alive: the pieces show nothing here"
        )
        return _claim(claim, text, None, "not shown")
    return _claim(claim, text, holds)


def _claim(claim: str, measured: str, holds: bool | None, verdict: str | None = None) -> dict[str, Any]:
    return {"claim": claim, "measured": measured, "holds": holds, "verdict": verdict or ("holds" if holds else "fails")}


def _paper(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    claims = []
    for run, layers in MOFASGD.items():
        text = f"MoFaSGD, rank 8, fine-tunes LLaMA-3.1-8B in 29.0 GB allocated or less, with {layers}"
        claims.append(_at_most_the_limit(text, run, runs.get(run, _NOT_RUN)))
    text = "AdamW takes about 70 GB in the same setting"
    report = runs.get("torch:AdamW", _NOT_RUN)
    claims.append(_not_there(text, "torch:AdamW", report) or _about_seventy(text, fullest(report)))
    return claims


def _not_there(claim: str, run: str, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Why a claim cannot be judged; None where it can."""
    if "error" in report:
        return _claim(claim, f"{run} was not run", None, "not measured")
    setting = report["setting"]
    here = (setting["model_config"].rsplit("/", 1)[-1].removesuffix(".json"), setting["shape"])
    if fullest(report)["peaks"]["allocated"] is None:
        return _claim(claim, "host memory only", None, "not measured")
    if here != SETTING:
        return _claim(claim, f"another setting ({here[0]}, {here[1]})", None, "not measured")
    return None


def _at_most_the_limit(claim: str, run: str, report: Mapping[str, Any]) -> dict[str, Any]:
    missing = _not_there(claim, run, report)
    if missing is not None:
        return missing
    rank = fullest(report)
    measured = f"{_peak(rank)}: {_where(rank['breakdown']['categories'], rank['peaks']['allocated'])}"
    over = rank["peaks"]["allocated"] - LIMIT_MOFASGD
    return _claim(
        claim, measured, over <= 0, None if over <= 0 else f"fails by {gb(over)} GB ({over / LIMIT_MOFASGD:.1%})"
    )


def _about_seventy(claim: str, rank: Mapping[str, Any]) -> dict[str, Any]:
    off = rank["peaks"]["allocated"] / ABOUT_ADAMW - 1
    return _claim(claim, _peak(rank), abs(off) <= 0.05, None if abs(off) <= 0.05 else f"off by {off:+.1%}")


def _peak(rank: Mapping[str, Any]) -> str:
    return f"{gb(rank['peaks']['allocated'])} GB allocated, {gb(rank['peaks']['nvml_device'])} GB by NVML"


def _where(categories: Mapping[str, int], allocated: int) -> str:
    """All that is in the allocator: what stays from step to step as one, then the rest, which together is the peak.

    The breakdown's own "unexplained" is of what NVML saw, so what the allocator holds beyond the categories is taken
    from its peak: cuBLAS's workspaces, and whatever else came before the recorded step and no tensor owns.
    """
    inside = {name: categories[name] for name in IN_ALLOCATOR if categories.get(name)}
    passing = {name: inside.pop(name) for name in ("activations", "workspace") if name in inside}
    parts = [f"{', '.join(inside)} {gb(sum(inside.values()))} GB"]
    parts += [f"{name} {gb(size)} GB" for name, size in passing.items()]
    parts.append(f"libraries' {gb(allocated - sum(inside.values()) - sum(passing.values()))} GB")
    return "; ".join(parts)


def _prediction(name: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    predicted, peaks = report["predicted"], fullest(report)["peaks"]
    if predicted is None:
        return [_claim(f"{name}: the prediction is right", "there is none", None, "not measured")]
    found = []
    measured, what = (peaks["allocated"], "allocated") if peaks["allocated"] else (peaks["traced"], "traced")
    for value, seen, limit, label in (
        (predicted["allocated"], measured, 0.05, what),
        (predicted["total"], peaks["nvml_device"], 0.10, "by NVML"),
    ):
        if seen:
            off = value / seen - 1
            unit = unit_of((value, seen))
            text = f"predicted {unit.number(value, 3)} {unit.name}, measured {unit.number(seen, 3)} {unit.name}, {off:+.2%}"
            late = None if abs(off) <= limit else f"off by {off:+.1%}"
            claim = f"{name}: the prediction is within {limit:.0%} of the peak {label}"
            found.append(_claim(claim, text, abs(off) <= limit, late))
    return found


def _overhead(name: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    setting = report["setting"]
    if "seconds_per_step_without_profiler" not in setting:
        return []
    without, times = setting["seconds_per_step_without_profiler"], setting["seconds_per_step"]
    own = fullest(report)["overhead"]["seconds_per_step"] / without
    spread = max(setting["all_seconds"]["without"]) / without - 1
    seen = times / without - 1
    text = (
        f"{times * 1e3:.1f} ms a step with the profiler, {without * 1e3:.1f} without (medians, in turns: {seen:+.2%}, "
        f"the slowest of those without {spread:+.2%}); {own:.2%} of a step is spent in its own code"
    )
    # A difference that steps without it show too says nothing.
    holds = own < 0.02 and (seen < 0.02 or seen <= spread)
    return [_claim(f"{name}: the profiler costs less than 2 % of the step", text, holds)]
