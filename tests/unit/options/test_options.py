"""Options: what is refused, and that the message says which option, which value, and what would be right."""

import ast
import dataclasses
import inspect
import json
import math
import sys
from typing import ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ds_mofa
from ds_mofa import OptionError, Options
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.options import (
    AdamWOptions,
    CommonOptions,
    GaLoreOptions,
    GaLoreRuleOptions,
    MoFaSGDRuleOptions,
    OptimizerOptions,
    check_number,
)

# option, value, what the message must offer
BAD = [
    ("lr", 0, "> 0"),
    ("lr", -1e-3, "> 0"),
    ("lr", "6e-3", "number"),
    ("lr", None, "number"),
    ("lr", True, "number"),
    ("lr", math.nan, "> 0"),
    ("lr", math.inf, "> 0"),
    ("rank", 0, "whole number >= 1"),
    ("rank", -4, "whole number >= 1"),
    ("rank", 8.0, "whole number >= 1"),
    ("rank", "8", "whole number >= 1"),
    ("rank", True, "whole number >= 1"),
    ("beta", 1, ">= 0 and < 1"),
    ("beta", 1.5, ">= 0 and < 1"),
    ("beta", -0.1, ">= 0 and < 1"),
    ("beta", [0.9, 0.95], "number >= 0 and < 1"),
    ("weight_decay", -0.01, ">= 0"),
    ("weight_decay", None, ">= 0"),
    ("adjust_lr_fn", "rms", "'adamw', 'match_rms_adamw', 'original', 'none'"),
    ("update_rule", "Spectral", "'spectral', 'inverse_sigma'"),
    ("update_rule", ["spectral"], "'spectral', 'inverse_sigma'"),
    ("inverse_sigma_clamp", 0, "> 0"),
    ("balance", -0.5, ">= 0"),
    ("balance", 1.5, "from 0 to 1"),
    ("explore", -1, "whole number >= 0"),
    ("explore", 8.0, "whole number >= 0"),
    ("explore", True, "whole number >= 0"),
    ("explore_scale", 0, "> 0"),
    ("explore_scale", "4", "number > 0"),
    ("rounding", "bf16", "'stochastic', 'nearest'"),
    ("master_weights", 1, "true or false"),
    ("weights", "int4", "'int8'"),
    ("weights", 8, "'int8'"),
    ("fused_head", "true", "true or false"),
    ("fp8", 1, "true or false"),
    ("master_weights", "false", "true or false"),
    ("capture", "hooks", "'linear', 'hook'"),
    ("include", "lm_head", '["lm_head"]'),
    ("include", None, '["lm_head"]'),
    ("include", [1], '["lm_head"]'),
    ("include", ["(head"], "'(head' is not a regular expression"),
    ("exclude", "lm_head", '["lm_head"]'),
    ("exclude", 3, '["lm_head"]'),
    ("exclude", ["*"], "'*' is not a regular expression"),
    ("update_bytes", 0, "> 0"),
    ("update_bytes", "2GB", "number"),
    ("seed", -1, "whole number >= 0"),
    ("seed", 2**31, "< 2147483648"),
    ("seed", 0.5, "whole number >= 0"),
    ("diagnostics_every", -1, "whole number >= 0"),
    ("diagnostics_every", True, "whole number >= 0"),
    ("adamw_lr", -1e-4, ">= 0"),
    ("adamw_lr", "1e-4", "number"),
    ("adamw_betas", 0.9, "two numbers"),
    ("adamw_betas", None, "two numbers"),
    ("adamw_betas", "0.9", "two numbers"),
    ("adamw_betas", [0.9], "two numbers"),
    ("adamw_betas", [0.9, 0.99, 0.999], "two numbers"),
    ("adamw_betas", [0.9, 1.0], "< 1"),
    ("adamw_betas", [0.9, "0.99"], "number"),
    ("adamw_eps", 0, "> 0"),
    ("adamw_weight_decay", -1, ">= 0"),
    ("adamw_reduce", "never", "one of"),
    ("adamw_states", "4bit", "one of"),
]


@pytest.mark.parametrize("name, value, right", BAD, ids=[f"{name}={value!r}" for name, value, _ in BAD])
def test_a_bad_value_is_refused_by_name_with_what_is_right(name, value, right):
    with pytest.raises(OptionError) as error:
        Options.from_config({name: value})
    message = str(error.value)
    assert message.startswith(name), message
    assert right in message, message
    shown = value[0] if isinstance(value, list) and "regular" in right else value
    items = value if isinstance(value, list) else [value]
    assert repr(shown) in message or any(repr(item) in message for item in items), message


def test_every_option_has_a_bad_value_in_the_table():
    assert {name for name, _, _ in BAD} == {field.name for field in dataclasses.fields(Options)}


GOOD = {
    "lr": 1,
    "rank": 1,
    "beta": 0,
    "weight_decay": 0,
    "seed": 2**31 - 1,
    "adamw_lr": 0,
    "adamw_betas": (0, 0.5),
    "adamw_weight_decay": 0,
    "include": ["a", "b$"],
}


@pytest.mark.parametrize("name", GOOD)
def test_the_ends_of_a_range_are_allowed(name):
    meant = {"adjust_lr_fn": "adamw"} if name == "lr" else {}  # AdamW's rates are far lower
    options, rest = Options.from_config({name: GOOD[name], **meant})
    assert getattr(options, name) == GOOD[name] and rest == {}


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("learning_rate", None),
        ("ranks", "rank"),
        ("weightdecay", "weight_decay"),
        ("adam_betas", "adamw_betas"),
        ("beta_s", "betas"),
        ("Capture", "capture"),
        ("torch_adm", "torch_adam"),
        ("xyzzy", None),
    ],
)
def test_a_misspelt_name_gets_a_suggestion_and_the_list(typed, meant):
    with pytest.raises(OptionError) as error:
        Options.from_config({typed: 1}, passed_on=["torch_adam"])
    message = str(error.value)
    assert repr(typed) in message and "adjust_lr_fn" in message and "torch_adam" in message
    if meant is None:
        assert "xyzzy" != typed or "did you mean" not in message
    else:
        assert f"did you mean {meant!r}?" in message


@pytest.mark.parametrize("alias, name, value", [("betas", "adamw_betas", [0.8, 0.9]), ("eps", "adamw_eps", 1e-6)])
def test_the_names_of_an_adamw_config_are_understood(alias, name, value):
    options, _ = Options.from_config({alias: value})
    assert getattr(options, name) == value
    with pytest.raises(OptionError, match="are the same option"):
        Options.from_config({alias: value, name: value})


@pytest.mark.parametrize("name", ["lr", "weight_decay", "betas", "eps", "rank"])
def test_an_auto_that_nobody_filled_in_is_explained(name):
    with pytest.raises(OptionError, match=f'{name}="auto" was not filled in'):
        Options.from_config({name: "auto"})


def test_what_is_passed_on_is_left_alone():
    given = {"lr": 1e-3, "rank": 8, "torch_adam": "auto"}
    options, rest = Options.from_config(given, passed_on=["torch_adam", "foreach"])
    assert options == Options(lr=1e-3, rank=8) and rest == {"torch_adam": "auto"}


@pytest.mark.parametrize(
    "given, rank, explore",
    [
        ({}, 32, 32),
        ({"lr": 1e-3, "balance": 0.5}, 32, 32),
        ({"rank": 8}, 8, 0),
        ({"rank": 32}, 32, 0),
        ({"explore": 0}, 32, 0),
        ({"explore": 128}, 32, 128),
        ({"rank": 8, "explore": 8}, 8, 8),
        ({"update_rule": "inverse_sigma", "adjust_lr_fn": "none", "adamw_lr": 1e-4}, 32, 0),  # which cannot explore
    ],
)
def test_who_names_no_rank_explores(given, rank, explore):
    options, _ = Options.from_config(given)
    assert (options.rank, options.explore) == (rank, explore)


def test_galore_without_a_rank_keeps_its_own():
    assert KINDS["GaLore"][1].from_config({"lr": 1e-3})[0].rank == 8


def test_options_cannot_change_after_the_check():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().lr = -1


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (1, 100)])
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_the_factor_by_shape_is_that_of_torch_muon(adjust_lr_fn, shape):
    """On a gradient of one singular value Muon's step has, up to that factor, one size for all shapes."""

    def moved(shape, adjust_lr_fn):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.zeros(shape)
        weight.grad[0, 0] = 1
        torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust_lr_fn).step()
        return float(weight.detach().norm())

    square = moved((32, 32), "original")  # there the factor is 1
    expected = Options(adjust_lr_fn=adjust_lr_fn, adamw_lr=1e-3).shape_factor(*shape)
    assert moved(shape, adjust_lr_fn) / square == pytest.approx(expected, rel=1e-6)


def test_the_factor_by_shape_in_numbers():
    assert MoFaSGDRuleOptions(adjust_lr_fn="none").shape_factor(7, 900) == 1
    assert MoFaSGDRuleOptions(adjust_lr_fn="original").shape_factor(400, 100) == 2
    assert MoFaSGDRuleOptions(adjust_lr_fn="original").shape_factor(100, 400) == 1
    assert MoFaSGDRuleOptions(adjust_lr_fn="match_rms_adamw").shape_factor(25, 100) == pytest.approx(2)
    assert MoFaSGDRuleOptions(adjust_lr_fn="adamw").shape_factor(25, 100) == 10
    assert Options().shape_factor(25, 100) == 10


def test_a_rate_of_an_earlier_version_is_told_with_what_to_write():
    with pytest.raises(
        OptionError, match=r'lr=0\.006 is far above.*write lr=0\.0012, adamw_lr=0\.0006; .*adjust_lr_fn="adamw"'
    ):
        Options(lr=6e-3)
    with pytest.raises(OptionError, match=r"write lr=0\.0024; "):
        Options(lr=1.2e-2, adamw_lr=2e-4)
    old = Options(lr=6e-3, adamw_lr=6e-4, adjust_lr_fn="match_rms_adamw")
    new = Options(lr=1.2e-3, adamw_lr=6e-4)
    for shape in ((64, 64), (100, 7), (3, 4096)):
        assert old.lr * old.shape_factor(*shape) == pytest.approx(new.lr * new.shape_factor(*shape))
    assert old.lr * old.adamw_lr_ratio == pytest.approx(new.lr * new.adamw_lr_ratio)
    assert Options(lr=2e-3).lr == 2e-3 and Options(lr=6e-3, adjust_lr_fn="adamw").lr == 6e-3


@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original", "none"])
def test_units_of_their_own_want_a_rate_for_the_rest(adjust_lr_fn):
    with pytest.raises(OptionError, match=r"write adamw_lr \(in earlier versions it was lr / 10, 0\.0006\)"):
        Options(lr=6e-3, adjust_lr_fn=adjust_lr_fn)


@pytest.mark.parametrize("adjust_lr_fn", [None, "adamw"])
def test_inverse_sigma_has_no_rate_of_adamws(adjust_lr_fn):
    with pytest.raises(OptionError, match="whose length goes by the gradient"):
        MoFaSGDRuleOptions(update_rule="inverse_sigma", adjust_lr_fn=adjust_lr_fn)


def test_derived_numbers():
    assert Options(beta=0.85).gamma == pytest.approx(0.15)
    assert Options(lr=2e-3).adamw_lr_ratio == 1
    assert Options(lr=2e-3, adamw_lr=4e-5).adamw_lr_ratio == pytest.approx(0.02)
    assert Options(lr=2e-3, adamw_lr=0).adamw_lr_ratio == 0


NAMES = [field.name for field in dataclasses.fields(Options)]
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["auto", "spectral", "nearest", "linear", "(", "*", "a{99999999999999999999}", 1e-3, 8, 0.9]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip
ANY_KEY = st.sampled_from([*NAMES, "betas", "eps", "learning_rate", "ranks"]) | st.text(max_size=12)


@settings(max_examples=200)
@given(st.dictionaries(ANY_KEY, ANY_VALUE, max_size=4))
@example({"include": ["(" * 5000 + ")" * 5000]})
@example({"include": ["a{99999999999999999999}"]})
@example({"lr": 10**400})
@example({"adamw_lr": 1.0, "lr": 10**300})
@example({"adamw_betas": [0.5, 10**400]})
def test_any_json_object_gives_options_or_an_error_that_names_the_key(params):
    params = json.loads(json.dumps(params))
    try:
        options, rest = Options.from_config(params)
    except OptionError as error:
        message = str(error)
        assert any(key in message or repr(key) in message for key in params), message
        return
    assert params.keys() <= {*NAMES, "betas", "eps"} and rest == {}
    numbers = [options.gamma, options.adamw_lr_ratio, options.shape_factor(3, 5)]
    assert all(isinstance(number, float) and not math.isnan(number) for number in numbers)


@pytest.mark.parametrize("params", [[], [1], "lr", 3, True])
def test_what_is_no_object_of_options_is_refused(params):
    with pytest.raises(OptionError, match="params=.* must be an object of options"):
        Options.from_config(params)


# ---------------------------------------------------------------------- the classes that they are put together of

KINDS = {"MoFaSGD": (MoFaSGDRuleOptions, Options), "GaLore": (GaLoreRuleOptions, GaLoreOptions)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_is_in_one_class(kind):
    rule, whole = KINDS[kind]
    parts = [[field.name for field in dataclasses.fields(part)] for part in (CommonOptions, AdamWOptions, rule)]
    assert whole.names() == [name for part in parts for name in part]
    assert len(whole.names()) == len(set(whole.names()))
    assert all(name.startswith("adamw_") is (part is parts[1]) for part in parts for name in part)


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_of_all_of_them_serves_who_needs_a_part(kind):
    rule, whole = KINDS[kind]
    assert all(isinstance(whole(), part) for part in (CommonOptions, AdamWOptions, OptimizerOptions, rule))
    assert not any(isinstance(whole(), others) for others, _ in KINDS.values() if others is not rule)


@pytest.mark.parametrize("name", KINDS)
def test_the_constructor_s_signature_shows_every_option(name):
    kind, (_, whole) = getattr(ds_mofa, name), KINDS[name]
    params, model, group, *options = inspect.signature(kind).parameters.values()
    assert (params.name, model.name, model.default) == ("params", "model", None)
    assert (group.name, group.default) == ("process_group", None)
    given_nothing = whole.completed({})
    assert {one.name: (one.default, one.annotation) for one in options} == {
        field.name: (given_nothing.get(field.name, field.default), field.type) for field in dataclasses.fields(whole)
    }
    assert all(one.kind is one.KEYWORD_ONLY for one in (model, group, *options))


@pytest.mark.parametrize("name", KINDS)
def test_what_an_editor_reads_is_that_signature(name):
    """Written out in the class, under TYPE_CHECKING, where an editor and a type checker find it without running it."""
    kind = getattr(ds_mofa, name)
    module = sys.modules[kind.__module__]
    written = [node for node in ast.walk(ast.parse(inspect.getsource(kind))) if isinstance(node, ast.FunctionDef)]
    (constructor,) = [node for node in written if node.name == "__init__"]
    space: dict = {}
    exec(ast.unparse(constructor), vars(module) | {"__name__": "written"}, space)
    signature = inspect.signature(space["__init__"])
    _, *parameters = signature.parameters.values()  # without self
    assert signature.replace(parameters=parameters) == inspect.signature(kind)


def test_a_class_of_a_user_s_own_has_such_a_signature_too():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ToyOptions(OptimizerOptions):
        title: ClassVar[str] = "Toy"
        lr: float = 0.5
        slope: float = 2.0

        def __post_init__(self):
            check_number("slope", self.slope, low=0)
            super().__post_init__()

    class Toy(MatrixOptimizer):
        options_class = ToyOptions

    shown = inspect.signature(Toy).parameters
    assert shown["lr"].default == 0.5 and shown["slope"].annotation is float and "beta" not in shown
    assert "options" not in shown and "options" in inspect.signature(MatrixOptimizer).parameters
    with pytest.raises(OptionError, match="slope=-1 must be >= 0"):
        Toy(torch.nn.Linear(8, 8), slope=-1)
    with pytest.raises(OptionError, match="unknown option 'slop' of Toy; did you mean 'slope'"):
        Toy(torch.nn.Linear(8, 8), slop=1)
    with pytest.raises(OptionError, match="rounding='up' must be one of 'stochastic', 'nearest'"):
        Toy(torch.nn.Linear(8, 8), rounding="up")
