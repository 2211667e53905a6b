"""What the laboratory can be asked for, and what a setting comes to in a step."""

from typing import Any, Literal, get_args

from ds_mofa.options import OptionError, check_integer, check_number

__all__ = [
    "BalanceBy",
    "check_settings",
    "decay_of",
    "directions_of",
    "ExploreBy",
    "ExploreSides",
    "largest_rank",
    "Oracle",
    "ProbeRule",
    "RankRule",
    "SecondMoment",
    "Sides",
]

BalanceBy = Literal["momentum", "gradient"]
ProbeRule = Literal["range", "random"]
RankRule = Literal["gain", "share"]
SecondMoment = Literal["none", "gradient", "update"]
ExploreBy = Literal["gaussian", "coordinates", "signs"]
ExploreSides = Literal["right", "both"]
Sides = Literal["both", "rows", "columns"]
Oracle = Literal["none", "gradient", "momentum"]


_CHOICES = {
    "balance_by": BalanceBy,
    "explore_by": ExploreBy,
    "explore_sides": ExploreSides,
    "probe_rule": ProbeRule,
    "rank_rule": RankRule,
    "second_moment": SecondMoment,
    "second_moment_sides": Sides,
    "oracle": Oracle,
}


def check_settings(s: dict[str, Any]) -> None:
    """Raise an OptionError where a setting cannot be right."""
    check_number("beta", s["beta"], low=0, high=1)
    check_number("beta2", s["beta2"], low=0, high=1)
    for name in ("balance", "rank_scale", "second_moment_power", "explore_scale", "probe_weight", "trust"):
        check_number(name, s[name], low=0)
    check_number("shrink", s["shrink"], low=0, high=1.0001)
    check_number("update_rank", s["update_rank"], low=0, high=2.0001, open_low=True)
    check_number("soft", s["soft"], low=-1, high=1.0001)
    for name in ("explore", "probes", "rank_budget", "beta_warmup", "momentum_reset"):
        check_integer(name, s[name], low=0, high=2**31)
    check_integer("explore_hold", s["explore_hold"], low=1, high=2**31)
    check_integer("exact", s["exact"], low=0, high=2**31)
    if s["explore_hold"] > 1 and s["explore_by"] != "signs":
        raise OptionError('explore_hold: only explore_by="signs" keeps its directions while V turns')
    if not isinstance(s["nesterov"], bool):
        raise OptionError(f"nesterov={s['nesterov']!r} must be true or false")
    for name, choices in _CHOICES.items():
        if s[name] not in get_args(choices):
            raise OptionError(f"{name}={s[name]!r} must be one of {', '.join(map(repr, get_args(choices)))}")
    if s["balance_by"] == "gradient" and not s["probes"]:
        raise OptionError('balance_by="gradient" is measured by probes: set probes to 1 or more')
    if s["rank_budget"] and s["update_rank"] != 1:
        raise OptionError("rank_budget and update_rank both say how many directions move: set one of them")
    if s["oracle"] != "none" and (s["rank_budget"] or s["probes"] or s["explore"]):
        raise OptionError("an oracle sees all of the gradient: no rank_budget, probes or explore beside it")


def decay_of(s: dict[str, Any], t: int) -> float:
    return s["beta"] * min(1.0, t / s["beta_warmup"]) if s["beta_warmup"] else s["beta"]


def directions_of(s: dict[str, Any], shape: tuple[int, int]) -> int:
    """Of the directions in an update."""
    cap = 2 * s["rank"] if s["rank_budget"] else max(1, round(s["update_rank"] * s["rank"]))
    return min(cap, *shape)


def largest_rank(shape: tuple[int, int], rank: int) -> int:
    return min(2 * rank, *shape)
