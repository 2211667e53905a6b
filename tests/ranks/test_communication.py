"""What a step sends: one reduce-scatter, one all-gather and one number, however many micro-batches."""

from collections import Counter

from launching import on_ranks
from scenes.collectives import watched
from toys import Toy, batches
from training import config, engine_for, train_step

REDUCTIONS = {"all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor"}


def one_step(stage: int, micro: int, clip: float, reduce: str = "step", **rest) -> dict:
    """The second step; ``rest`` as for ``config``."""
    options = {"adamw_reduce": reduce, **rest.pop("options", {})}
    settings = config(stage, micro=micro, gradient_clipping=clip, options=options, **rest)
    with engine_for(settings) as engine:
        first, second = batches(2)
        train_step(engine, first)
        with watched() as calls:
            train_step(engine, second)
        params = engine.module.named_parameters()
        adamw = [getattr(p, "ds_numel", p.numel()) for n, p in params if n not in Toy.MATRICES and p.requires_grad]
        return {"calls": calls, "buffer": engine.basic_optimizer.matrices.layout.numel, "adamw": sum(adamw)}


def reduced_by_deepspeed(result: dict) -> int:
    """Elements of gradients that DeepSpeed has sent."""
    return sum(size for package, name, size in result["calls"] if package == "deepspeed" and name in REDUCTIONS)


@on_ranks(one_step, {"micro": 1, "clip": 0.0}, {"micro": 3, "clip": 1.0}, stage=[0, 1, 2, 3])
def test_one_reduce_scatter_and_one_all_gather_a_step(ran):
    assert_three_collectives(ran)


@on_ranks(one_step, {"micro": 3, "clip": 1.0, "optimizer": "GaLore", "options": {"refresh_every": 1}}, stage=[0, 2, 3])
def test_so_for_galore_even_where_its_subspaces_are_chosen(ran):
    assert_three_collectives(ran)


def assert_three_collectives(ran) -> None:
    for result in ran.ranks:
        ours = [(name, size) for package, name, size in result["calls"] if package == "ds_mofa"]
        assert Counter(ours) == {
            ("reduce_scatter_tensor", result["buffer"]): 1,
            ("all_gather_into_tensor", result["buffer"]): 1,
            ("all_reduce", 1): 1,
        }


@on_ranks(one_step, *({"stage": s, "micro": m, "clip": 0.0} for s in range(4) for m in (1, 3) if s < 3 or m == 1))
def test_deepspeed_reduces_adamws_gradients_only_and_once_a_step(ran):
    for result in ran.ranks:
        assert result["adamw"] <= reduced_by_deepspeed(result) < result["adamw"] + 64


@on_ranks(one_step, {"stage": 2, "reduce": "micro_batch"}, {"stage": 3}, micro=[3], clip=[0.0])
def test_or_after_each_micro_batch(ran):
    for result in ran.ranks:
        assert 3 * result["adamw"] <= reduced_by_deepspeed(result) < 3 * (result["adamw"] + 64)
