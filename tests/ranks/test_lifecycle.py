"""Engines that come and go, compiled modules, names in any case, and patterns that move parameters across."""

import functools

from comparing import STEPS, assert_same, dense, distances
from launching import on_ranks
from reference import Reference
from toys import Toy, batches
from training import OPTIONS, config, engine_for, evaluate, toy, train, train_step, whole_momenta, whole_weights


def twice(stage: int) -> dict:
    """Two engines, one after the other, on the same model."""
    model = toy()
    *data, last = batches(STEPS + 1)
    losses = []
    for part in (data[:2], data[2:]):
        with engine_for(config(stage), model=model) as engine:
            losses += [train_step(engine, batch) for batch in part]
            weights, momenta = whole_weights(model), whole_momenta(engine)
            final = evaluate(engine, last)
    return {"losses": [*losses, final], "weights": weights, "momenta": momenta}


def let_go(stage: int, dtype: str) -> dict:
    """A model that an engine has trained and given back, in ordinary PyTorch."""
    model = toy()
    with engine_for(config(stage, dtype=dtype), model=model) as engine:
        train_step(engine, batches(1)[0])
    model.zero_grad()
    tokens, targets = batches(1)[0]
    model(tokens, targets).backward()
    return {
        "with gradient": [name for name, param in model.named_parameters() if param.grad is not None],
        "marks": [name for name, param in model.named_parameters() if hasattr(param, "ds_mofa_matrix")],
        "own forward": [name for name, module in model.named_modules() if "forward" in vars(module)],
    }


def compiled(stage: int) -> dict:
    def step(engine, batch) -> float:
        if not engine.is_compiled:
            engine.compile(backend="eager")
        return train_step(engine, batch)

    return train(config(stage), STEPS, step=step)


def named(name: str) -> dict:
    settings = config(2)
    settings["optimizer"]["type"] = name
    return train(settings, STEPS)


def moved(stage: int, capture: str) -> dict:
    """The embedding made a matrix, one linear left to AdamW."""
    patterns = {"include": ["^embed"], "exclude": ["up\\.weight", "down"]}
    return train(config(stage, options={"capture": capture, **patterns}), STEPS)


@functools.cache
def dense_twice() -> dict:
    settings = {key: OPTIONS[key] for key in ("lr", "rank", "weight_decay", "adamw_eps")}
    *data, last = batches(STEPS + 1)
    model, losses = toy(), []
    for part in (data[:2], data[2:]):
        reference = Reference(model, Toy.MATRICES, beta=0.85, **settings)
        losses += [reference.step(batch) for batch in part]
    momenta = {name: momentum.M for name, momentum in reference.momenta.items()}
    return {"losses": [*losses, reference.loss(last)], "weights": reference.weights(), "momenta": momenta}


@on_ranks(twice, stage=[0, 1, 2, 3])
def test_a_second_engine_starts_anew_on_the_same_model(ran):
    assert_same(ran, dense_twice())
    assert distances(dense_twice(), dense())["weights"] > 1e-3  # the control: not the run that went on


@on_ranks(let_go, stage=[0, 1, 2], dtype=["fp32", "bf16"])
def test_destroy_gives_the_model_back(ran):
    trained = [name for name, param in toy().named_parameters() if param.requires_grad]
    for result in ran.ranks:
        assert result == {"with gradient": trained, "own forward": [], "marks": []}


@on_ranks(compiled, stage=[1, 3])
def test_engine_compile(ran):
    assert_same(ran, dense())


@on_ranks(named, name=["mofasgd", "MOFASGD"])
def test_the_name_is_read_in_any_case(ran):
    assert_same(ran, dense())


@on_ranks(moved, stage=[0, 1, 2, 3], capture=["linear", "hook"])
def test_patterns_move_parameters_across(ran):
    assert_same(ran, dense(matrices=("blend", "embed.weight", "twin.weight")))
