"""What fits a card, by prediction: the longest sequence, the largest batch and the highest rank, and what each switch gains."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ds_mofa.profiler.predict.prediction import PredictionError, plan_of, predict
from ds_mofa.profiler.predict.simulated.model import embedding_patterns, positions
from ds_mofa.profiler.setting import RunSetting, SettingError

__all__ = ["STEPS", "Fit", "bytes_of", "fits", "largest", "needed"]

# What is searched for, and in which steps.
STEPS = {"seq": 64, "micro_batch": 1, "rank": 1}
_MOST = 1 << 22
_UNITS = {"GiB": 1 << 30, "GB": 10**9, "MiB": 1 << 20, "MB": 10**6}


@dataclasses.dataclass(frozen=True)
class Fit:
    """A run on a card, and how far it could go.

    Attributes:
        switch: what has been switched on beside what the runs before it have, with its option; "as given" for the first.
        setting: of the run.
        needs: bytes of the device that it cannot do without.
        host: bytes that offload puts into the host's memory, of one process.
        most: the largest ``seq``, ``micro_batch`` and ``rank`` with which it fits, the others as given: a multiple of its
            step in :data:`STEPS`, 0 where one step does not fit.
        limits: of these, how far is looked at all: the model's positions, the smaller side of its smallest matrix. None
            for a ``rank`` that the optimizer does not have.
        refused: why the switch cannot be had; the other numbers then mean nothing.
    """

    switch: str
    setting: RunSetting
    needs: int = 0
    host: int = 0
    most: Mapping[str, int] = dataclasses.field(default_factory=dict)
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    refused: str = ""

    def gains_over(self, other: "Fit") -> bool:
        """Whether it needs less, or can go farther in anything."""
        return self.needs < other.needs or any(self.most[name] > other.most[name] for name in self.most)


def bytes_of(size: str) -> int:
    """Of a card: "24GiB", "80 GB".

    Raises:
        ValueError: without a unit, or with another.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise ValueError(f"{size!r} is no size of a card: give a number and a unit, such as 24GiB or 141GB")
    return int(float(found[1]) * _UNITS[found[2]])


def needed(prediction: Mapping[str, Any]) -> int:
    """Bytes of the device that a run cannot do without: all but the allocator's slack, which shrinks when memory is short."""
    return prediction["total"] - prediction["categories"].get("allocator slack", 0)


def fits(setting: RunSetting, room: int) -> Iterator[Fit]:
    """The run as it is, and then each switch that saves memory, on top of those before it that have gained something.

    Args:
        room: bytes of the device.

    Raises:
        PredictionError: the run as given cannot be predicted.
    """
    kept = _fit("as given", setting, room)
    yield kept
    for switch, change in _switches(setting):
        try:
            found = _fit(switch, kept.setting.but(**change), room)
        except SettingError as error:
            yield Fit(switch, kept.setting, refused=str(error))
            continue
        yield found
        if found.gains_over(kept):
            kept = found


def _fit(switch: str, setting: RunSetting, room: int) -> Fit:
    prediction = predict(setting)
    limits = {"seq": max(positions(setting.model_config) or _MOST, setting.seq), "micro_batch": _MOST}
    if setting.has_rank:
        matrices = [p.shape[-2:] for p in plan_of(setting).batch.parameters if p.kind in ("matrix", "adapter")]
        limits["rank"] = max(setting.rank, min(min(sides) for sides in matrices))
    most = {}
    for name, limit in limits.items():

        def needs(value: int, name: str = name) -> float:
            try:
                return needed(predict(setting.but(**{name: value})))
            except PredictionError:  # a rank at which nothing is a matrix
                return math.inf

        most[name] = largest(needs, room, getattr(setting, name), STEPS[name], limit)
    return Fit(switch, setting, needed(prediction), prediction["host"], most, limits)


def _switches(setting: RunSetting) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to switch on, with the option's words; what is on already is left out."""
    if not setting.checkpointing:
        yield "activations checkpointed (--checkpointing)", {"checkpointing": True}
    if setting.entry is not None:
        if setting.option("fused_head") is False:
            yield "fused output head (--fused_head)", {"fused_head": True}
        given = tuple(setting.option("include", ()))
        include = [*given, *(name for name in embedding_patterns(setting) if name not in given)]
        if len(include) > len(given):
            yield f"embedding and head as matrices (--include {' '.join(include)})", {"include": include}
        if setting.weights == "bf16" and setting.zero != 3 and setting.offload != "param":
            yield "matrices in eight bits (--weights int8)", {"weights": "int8"}
    yield from _offloads(setting)


def _offloads(setting: RunSetting) -> Iterator[tuple[str, dict[str, Any]]]:
    if setting.option("adamw_states") == "8bit":
        return  # which is refused beside offload
    if setting.backend == "torch":
        yield "ZeRO-2, optimizer on the host (--zero 2 --offload optimizer)", {"zero": 2, "offload": "optimizer"}
        yield "ZeRO-3, weights too (--zero 3 --offload param)", {"zero": 3, "offload": "param", "weights": "bf16"}
    elif setting.zero in (1, 2, 3):
        if setting.offload is None:
            yield "optimizer on the host (--offload optimizer)", {"offload": "optimizer"}
        if setting.zero == 3 and setting.offload != "param":
            yield "weights on the host too (--offload param)", {"offload": "param"}
    elif setting.sharded and setting.offload is None:
        on_host = "bf16" if setting.weights == "int8" else setting.weights  # where there are no eight bits yet
        yield "weights and optimizer on the host (--offload param)", {"offload": "param", "weights": on_host}


def largest(needs: Callable[[int], float], room: float, start: int, step: int, limit: int) -> int:
    """The largest multiple of ``step`` up to ``limit`` that fits, while one step more does not or passes ``limit``.

    ``needs`` costs seconds and is close to a line, so it is asked where a line through the two nearest values crosses
    ``room``, and every third time in the middle of what is open.

    Args:
        needs: bytes of a value; more for a larger one.
        room: bytes that there are.
        start: where to ask first.

    Returns:
        0 where one step does not fit.
    """
    top = limit // step
    low, high = 0, top + 1  # in steps: what fits, what does not
    known: dict[int, float] = {}
    guess = min(max(1, start // step), top)
    while high - low > 1:
        known[guess] = needs(guess * step)
        if known[guess] <= room:
            low = guess
        else:
            high = guess
        guess = _between(known, room, low, high, top)
    return low * step


def _between(known: Mapping[int, float], room: float, low: int, high: int, top: int) -> int:
    """Where to ask next, after ``low`` and before ``high``."""
    finite = sorted((k for k in known if math.isfinite(known[k])), key=lambda k: abs(known[k] - room))
    guess = (low + high) // 2
    if high > top and len(finite) < 2:
        guess = 2 * low
    elif len(known) % 3 or len(known) == 3:
        crossing = _crossing(known, room, *finite[:2]) if len(finite) > 1 else None
        if len(finite) > 1 and high > top and (crossing is None or crossing >= top):
            guess = top  # it seems to fit as far as is looked
        elif crossing is not None and crossing < 1 and low == 0:
            guess = 1  # it seems that nothing fits
        elif crossing is not None and low <= crossing < high:
            guess = max(crossing, low + 1)
        elif low in known and high in known and math.isfinite(known[high]):
            guess = _crossing(known, room, low, high) or guess
    return min(max(guess, low + 1), high - 1)


def _crossing(known: Mapping[int, float], room: float, one: int, other: int) -> int | None:
    """Where a line through two values crosses ``room``, rounded down; None where it does not rise."""
    slope = (known[other] - known[one]) / (other - one)
    return math.floor(one + (room - known[one]) / slope) if slope > 0 else None
