"""An optimizer that a user's own file registers: DeepSpeed's JSON names it, and it trains as what it is."""

import dataclasses
from typing import ClassVar

from comparing import equal
from launching import on_ranks
from training import config, train

from ds_mofa import Options
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.registry import find, register
from ds_mofa.rules.mofasgd import MoFaSGDRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondOptions(Options):
    title: ClassVar[str] = "Second"


class Second(MatrixOptimizer):
    options_class = SecondOptions
    rule_class = MoFaSGDRule


def trained_under_both_names(stage: int) -> dict:
    if find("Second") is None:
        register(Second)
    settings = config(stage)
    first = train(settings, 3)
    settings["optimizer"]["type"] = "Second"
    return {"MoFaSGD": first, "Second": train(settings, 3, look=lambda engine: type(engine.basic_optimizer).__name__)}


@on_ranks(trained_under_both_names, world=[1], stage=[0, 2])
def test_a_name_from_outside_trains_as_the_rule_that_it_has(ran):
    (result,) = ran.ranks
    assert "Second" in result["Second"]["seen"]
    assert result["Second"]["losses"] == result["MoFaSGD"]["losses"]
    assert equal(result["Second"]["weights"], result["MoFaSGD"]["weights"])
