"""The registry of optimizers: what it holds, how it is asked, and a name from outside of the package."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import nn

import ds_mofa
from ds_mofa import OptionError, Options
from ds_mofa.backends.deepspeed.build import read_options
from ds_mofa.optimizers import registry
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.registry import OPTIMIZERS, entry_of, find, register
from ds_mofa.rules.mofasgd import MoFaSGDRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondOptions(Options):
    title: ClassVar[str] = "Second"

    lr: float = 2.5e-4


class Second(MatrixOptimizer):
    """An existing rule under another name."""

    options_class = SecondOptions
    rule_class = MoFaSGDRule


@pytest.fixture
def second():
    register(Second)
    yield
    del registry._entries["Second"]
    DEEPSPEED_OPTIMIZERS.remove("second")
    ZERO_SUPPORTED_OPTIMIZERS.remove(Second)


def of_the_package() -> set[str]:
    """Other tests of this process may have registered toys."""
    return {name for name, entry in OPTIMIZERS.items() if not entry.optimizer.__module__.startswith("tests.extending")}


def test_what_the_package_has():
    assert of_the_package() == {"MoFaSGD", "GaLore"}
    for name in of_the_package():
        entry = OPTIMIZERS[name]
        assert entry.name == name == entry.options.title
        assert entry.optimizer is getattr(ds_mofa, name) and isinstance(entry.rule(entry.options()).name, str)
        assert entry.learning_rate == entry.options().lr > 0
        assert DEEPSPEED_OPTIMIZERS.count(name.lower()) == ZERO_SUPPORTED_OPTIMIZERS.count(entry.optimizer) == 1


@pytest.mark.parametrize("name", ["GaLore", "galore", "GALORE"])
def test_a_name_is_known_in_any_case(name):
    assert entry_of(name) is find(name) is OPTIMIZERS["GaLore"]


@pytest.mark.parametrize(("name", "meant"), [("MoFaSDG", "MoFaSGD"), ("galor", "GaLore"), ("AdamW", None), (3, None)])
def test_an_unknown_name_gets_a_suggestion_and_the_list(name, meant):
    assert find(name) is None
    with pytest.raises(OptionError, match=f"there is no optimizer {name!r}.* There are GaLore, MoFaSGD") as error:
        entry_of(name)
    assert (f"did you mean {meant!r}?" in str(error.value)) if meant else ("did you mean" not in str(error.value))
    with pytest.raises(OptionError, match="there is no optimizer"):
        read_options({"type": name})


def test_nobody_writes_into_the_table():
    with pytest.raises(TypeError):
        OPTIMIZERS["Mine"] = OPTIMIZERS["GaLore"]


def test_a_name_from_outside_is_known_to_all_who_read_it(second):
    assert entry_of("second").optimizer is Second and OPTIMIZERS["Second"].learning_rate == 2.5e-4
    assert "second" in DEEPSPEED_OPTIMIZERS and Second in ZERO_SUPPORTED_OPTIMIZERS
    options, passed_on = read_options({"type": "Second", "params": {"rank": 3, "torch_adam": True}})
    assert options == SecondOptions(rank=3) and passed_on == {"torch_adam": True}
    with pytest.raises(OptionError, match="unknown option 'rnk' of Second"):
        read_options({"type": "Second", "params": {"rnk": 3}})


def test_a_name_from_outside_trains_as_what_it_is(second):
    def trained(kind: type) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
        optimizer = kind(model, lr=2e-3, rank=2)
        for _ in range(3):
            model(torch.ones(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([param.detach().flatten() for param in model.parameters()])

    assert torch.equal(trained(Second), trained(ds_mofa.MoFaSGD))


def test_one_name_is_one_optimizer_s(second):
    class Upper(MatrixOptimizer):
        options_class = type("UpperOptions", (SecondOptions,), {"title": "SECOND"})
        rule_class = MoFaSGDRule

    with pytest.raises(ValueError, match="'SECOND' cannot be registered: .*Second has that name"):
        register(Upper)
    assert of_the_package() == {"MoFaSGD", "GaLore", "Second"}
