"""What a rank holds: no gradient, no fp32 copy and no gradient bucket for a matrix; the state that is promised."""

from collections.abc import Iterator

import pytest
import torch
from deepspeed import comm as dist
from launching import on_ranks
from torch import Tensor
from toys import Toy, batches, micro_batches
from training import OPTIONS, config, engine_for, train_step

from ds_mofa.partition.layout import Layout

SHAPES = [(35, 35), (53, 35), (35, 53), (35, 35)]  # of Toy.MATRICES
GALORE_TOO = {"optimizer": ["GaLore"], "refresh_every": [1]}
F = sum(OPTIONS["rank"] * (m + n + 1) for m, n in SHAPES)


def after_a_backward(stage: int, capture: str, dtype: str, optimizer: str = "MoFaSGD", **options) -> dict:
    """Byte counts at the moment when an optimizer holds most: after backward, before the second step."""
    settings = config(stage, dtype=dtype, optimizer=optimizer, options={"capture": capture, **options})
    with engine_for(settings) as engine:
        first, second = batches(2)
        train_step(engine, first)
        (part,) = micro_batches(second, dist.get_rank(), dist.get_world_size(), 1)
        engine.backward(engine(*part))

        params = dict(engine.module.named_parameters())
        matrices = {name: params[name] for name in Toy.MATRICES}
        step = engine.basic_optimizer.matrices
        seen = {
            "with .grad": [name for name, param in matrices.items() if param.grad is not None],
            "in DeepSpeed's lists": [name for name, param in matrices.items() if held_by(engine.optimizer, param)],
            "fp32 elements": sum(group.numel() for group in fp32_groups(engine.optimizer)),
            "adamw elements": sum(getattr(p, "ds_numel", p.numel()) for p in adamw_params(engine)),
            "moments": sorted(len(state) for state in engine.basic_optimizer.adamw.state.values()),
            "bytes": {name: value.nbytes for name, value in tensors_of(step)},
            "padded": step.layout.numel,
        }
        engine.step()
        return seen


def adamw_params(engine) -> list[Tensor]:
    return [p for name, p in engine.module.named_parameters() if name not in Toy.MATRICES and p.requires_grad]


def fp32_groups(optimizer) -> list[Tensor]:
    """DeepSpeed's flat fp32 copies on this rank; the stage-0 fp32 optimizer has none."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups"):
        if hasattr(optimizer, name):
            found = getattr(optimizer, name)
            return [t for group in found for t in (group if isinstance(group, list) else [group])]
    return []


def held_by(optimizer, param: Tensor) -> bool:
    """Whether ``param`` is anywhere in the lists, dicts and buckets of DeepSpeed's optimizer."""
    optimizer = getattr(optimizer, "adamw", optimizer)  # stage 0 in fp32 has no optimizer of DeepSpeed's
    own = {name: value for name, value in vars(optimizer).items() if name not in ("mofa", "module", "param_names")}
    return any(value is param for value in _walk(own, set()))


def _walk(value, seen: set[int]) -> Iterator:
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set):
        inner = list(value)
    elif type(value).__name__ in ("IPGBucket", "ParamGroup"):
        inner = list(vars(value).values())
    else:
        return
    for part in inner:
        yield from _walk(part, seen)


def tensors_of(step) -> list[tuple[str, Tensor]]:
    found = []
    for name, value in [*vars(step).items(), ("masters", step.masters.tensors)]:
        parts = value if isinstance(value, list) else [value]
        found += [(f"{name}{i}", part) for i, part in enumerate(parts) if isinstance(part, Tensor)]
    return found


@on_ranks(after_a_backward, stage=[0, 1, 2, 3], capture=["linear", "hook"], dtype=["fp32"])
def test_no_matrix_has_a_gradient_after_backward(ran):
    assert [result["with .grad"] for result in ran.ranks] == [[], []]


@on_ranks(after_a_backward, stage=[0, 1, 2, 3], capture=["linear", "hook"], dtype=["fp32"], **GALORE_TOO)
def test_no_matrix_of_galore_has_one_even_where_its_subspaces_are_chosen(ran):
    assert [result["with .grad"] for result in ran.ranks] == [[], []]
    assert [result["in DeepSpeed's lists"] for result in ran.ranks] == [[], []]


@on_ranks(after_a_backward, stage=[0, 1, 2, 3], capture=["linear"], dtype=["fp32"], **GALORE_TOO)
def test_the_state_of_galore_is_as_large_as_it_says(ran):
    """P, m and v of the owner's matrices: 4 r (s + 2 l) bytes each; else what every rule has, and no gradient."""
    state = 4 * sum(OPTIONS["rank"] * (min(shape) + 2 * max(shape)) for shape in SHAPES)
    for result in ran.ranks:
        padded, held = result["padded"], result["bytes"]
        assert held.pop("_norm0") <= 8
        assert state / 2 <= held.pop("factors0") <= state / 2 + 4 * (OPTIONS["rank"] * (53 + 2 * 53) + 2 * 128)
        assert held == {"sketches0": 4 * padded, "working0": 4 * padded}


@on_ranks(after_a_backward, stage=[0, 1, 2, 3], capture=["linear"], dtype=["fp32", "bf16"])
def test_deepspeed_holds_copies_and_moments_of_adamws_parameters_only(ran):
    for result in ran.ranks:
        assert result["in DeepSpeed's lists"] == []
        if ran.stage == 0 and ran.dtype == "fp32":
            assert result["fp32 elements"] == 0
        else:
            ranks = len(ran.ranks) if ran.stage else 1
            padding = result["fp32 elements"] - result["adamw elements"] / ranks
            assert 0 <= padding < 64
        assert result["moments"] and set(result["moments"]) == {3}  # two moments and a step count


@on_ranks(after_a_backward, stage=[0, 1, 2, 3], capture=["linear"], dtype=["fp32", "bf16"])
def test_the_matrices_state_is_as_large_as_the_docstring_says(ran):
    """Sketches 4 F, working copies 4 F or 2 F, factors 4 F / N, and nothing else but a norm."""
    for result in ran.ranks:
        padded, held = result["padded"], result["bytes"]
        assert F <= padded <= F + 2 * (OPTIONS["rank"] * (53 + 35 + 1) + 2 * 128)  # owners differ by a matrix at most
        wide = 4 if ran.dtype == "fp32" else 2
        assert held.pop("_norm0") <= 8
        assert held == {"sketches0": 4 * padded, "working0": wide * padded, "factors0": 4 * padded // 2}


@on_ranks(after_a_backward, {"capture": "linear", "dtype": "bf16", "master_weights": True}, stage=[1, 3])
def test_masters_are_whole_in_stage_1_and_shards_in_stage_3(ran):
    elements = sum(m * n for m, n in SHAPES)
    for result in ran.ranks:
        held = sum(size for name, size in result["bytes"].items() if name.startswith("masters"))
        assert held == pytest.approx(4 * elements / (2 if ran.stage == 3 else 1), abs=4 * len(SHAPES))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_owners_of_a_llamas_matrices_are_balanced(world):
    """LLaMA-3.1-8B's shapes: no owner has 2 % more than the mean."""
    layer = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    layout = Layout([(shape, 0) for shape in layer * 32], 32, world)
    mean = 32 * sum(32 * (m + n + 1) for m, n in layer) / world
    assert mean <= layout.segment < 1.02 * mean
    assert torch.tensor(layout.owners).unique().numel() == world
