"""What is claimed of MoFaSGD's memory, and whether measured runs bear it out."""

from collections.abc import Mapping
from typing import Any

from ds_mofa.profiler.categories import gb
from ds_mofa.profiler.layers import verdict
from ds_mofa.profiler.layout import fullest

__all__ = ["judge"]

# arXiv 2507.08091, LLaMA-3.1-8B in pure bf16, batch 1, 1024 tokens, accumulation 8, no checkpointing.
LIMIT_MOFASGD = 29_000_000_000  # bytes allocated at the peak
ABOUT_ADAMW = 70_000_000_000  # "about": within 5 %
SETTING = ("llama-3.1-8b", "1024x8")
# Weights, gradients of embedding and head, their AdamW states, factors and sketches at rank 8.
LEAST = 22_500_000_000


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
            holds, text = verdict(fullest(report)["layers"])
            claims.append(_claim(f"{name}: no full-rank gradient lives", text, holds))
    for name, report in runs.items():
        if "error" not in report:
            claims += _prediction(name, report)
            claims += _overhead(name, report)
    return claims


def _claim(claim: str, measured: str, holds: bool | None, verdict: str | None = None) -> dict[str, Any]:
    return {"claim": claim, "measured": measured, "holds": holds, "verdict": verdict or ("holds" if holds else "fails")}


def _paper(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    claims = []
    for name, text in (
        ("torch:MoFaSGD:r=8", "MoFaSGD, rank 8, fine-tunes LLaMA-3.1-8B in 29.0 GB allocated or less"),
        ("torch:AdamW", "AdamW takes about 70 GB in the same setting"),
    ):
        report = runs.get(name)
        if report is None or "error" in report:
            claims.append(_claim(text, f"{name} was not run", None, "not measured"))
            continue
        rank, setting = fullest(report), report["setting"]
        peak = rank["peaks"]["allocated"]
        here = (setting["model_config"].rsplit("/", 1)[-1].removesuffix(".json"), setting["shape"])
        if peak is None or here != SETTING:
            why = "host memory only" if peak is None else f"another setting ({here[0]}, {here[1]})"
            claims.append(_claim(text, why, None, "not measured"))
            continue
        measured = f"{gb(peak)} GB allocated, {gb(rank['peaks']['nvml_device'])} GB by NVML"
        if "MoFaSGD" in name:
            over = peak - LIMIT_MOFASGD
            measured += f"; above {gb(LEAST, 1)} GB: {_above(rank['breakdown']['categories'])}"
            short = f"fails by {gb(over)} GB ({over / LIMIT_MOFASGD:.1%})"
            claims.append(_claim(text, measured, over <= 0, None if over <= 0 else short))
        else:
            off = peak / ABOUT_ADAMW - 1
            claims.append(_claim(text, measured, abs(off) <= 0.05, None if abs(off) <= 0.05 else f"off by {off:+.1%}"))
    return claims


def _above(categories: Mapping[str, int]) -> str:
    """What is not weights, gradients, states, factors or sketches, and is in the allocator."""
    names = ("activations", "workspace", "communication buffers", "unexplained")
    return ", ".join(f"{name} {gb(categories[name])} GB" for name in names if categories.get(name)) or "nothing"


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
            text = f"predicted {gb(value, 3)} GB, measured {gb(seen, 3)} GB, {off:+.2%}"
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
