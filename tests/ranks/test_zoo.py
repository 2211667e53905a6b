"""Every way to use a weight, under ZeRO 0 to 3: the sketches are those of the gradient that autograd computes."""

import copy

import pytest
import torch
from deepspeed import comm as dist
from launching import on_ranks
from training import config, engine_for

from tests.zoo import WAYS, Zoo, inputs

# DeepSpeed's stage 3 wraps modules into Functions that know no vmap, and it follows the order in which weights are
# gathered: one that is used outside of its module must be so in every backward. With AdamW as here.
REFUSED_BY_STAGE_3 = {"a module under vmap"}
OUTSIDE = {
    "by its module and by F.linear",
    "by matmul alone",
    "a slice",
    "an embedding by F.embedding",
    "an L2 penalty",
    "a penalty before the use",
    "a masked weight",
    "under vmap",
    "a detached weight",
}


def sketches_of_every_way(stage, capture):
    """The largest relative error of each way's sketches on this rank; of a matrix without a gradient, what they hold."""
    ways = [way for way in WAYS if stage < 3 or way not in REFUSED_BY_STAGE_3]
    together = [[way for way in ways if way not in OUTSIDE], *([way] for way in ways if way in OUTSIDE)]
    errors = {}
    for some in [ways] if stage < 3 else together:
        errors |= errors_of(some, stage, capture)
    return {"errors": errors}


def errors_of(ways, stage, capture):
    torch.manual_seed(0)
    net = Zoo()
    plain, errors = copy.deepcopy(net), {}
    never = 10 * len(WAYS) if stage else 1  # micro-batches of a step, so that there is none; stage 0 divides by them
    with engine_for(config(stage, micro=never, options={"capture": capture, "include": Zoo.INCLUDE}), net) as engine:
        matrices = engine.basic_optimizer.matrices
        for seed, way in enumerate(ways):
            x = inputs(seed * dist.get_world_size() + dist.get_rank())
            engine.backward(engine(x, way), scale_wrt_gas=False)
            plain(x, way).backward()
            errors[way] = worst(plain, matrices)
            matrices.clear()
            plain.zero_grad()
    return errors


def worst(plain, matrices):
    found = [0.0]
    for matrix, sketch in zip(matrices.members, matrices.captured, strict=True):
        G = plain.get_parameter(matrix.name).grad
        for sketched, other, wide in ((sketch.Y, sketch.V, G), (sketch.Z, sketch.U, None if G is None else G.mT)):
            if wide is None or not wide.any():
                found.append(float(sketched.abs().max()))
            else:
                expected = wide.double() @ other.double()
                found.append(float((sketched.double() - expected).norm() / expected.norm()))
    return max(found)


@on_ranks(sketches_of_every_way, stage=[0, 1, 2, 3], capture=["linear", "hook"])
def test_the_sketches_are_those_of_autograd_s_gradient(ran):
    for result in ran.ranks:
        assert result["errors"].keys() == set(WAYS) - (REFUSED_BY_STAGE_3 if ran.stage == 3 else set())
        for way, error in result["errors"].items():
            assert error == pytest.approx(0.0, abs=1e-6), way
