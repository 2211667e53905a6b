"""Parallelism besides that over data: over the model it is refused, over sequences both halves have one scale."""

import deepspeed
import pytest
from comparing import STEPS, TOLERANCE, dense, distances
from deepspeed import comm as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups
from launching import on_ranks
from torch.distributed.nn.functional import all_gather
from toys import Toy, batches
from training import TIGHT, config, toy, whole_momenta, whole_weights, with_the_toy_s_own

from ds_mofa import OptionError


class ModelParallel:
    """An mpu of Megatron's kind: all ranks hold one replica together."""

    def __init__(self, name: str):
        world, rank = dist.get_world_size(), dist.get_rank()
        self._alone = [dist.new_group([i]) for i in range(world)][rank]
        self._all = dist.new_group(list(range(world)))
        for kind in {"model_parallel", "tensor_model_parallel", name}:
            setattr(self, f"get_{kind}_world_size", lambda kind=kind: world if kind in (name, "model_parallel") else 1)
            setattr(self, f"get_{kind}_rank", lambda: rank)
            setattr(self, f"get_{kind}_group", lambda: self._all)

    def get_data_parallel_group(self):
        return self._alone

    def get_data_parallel_rank(self):
        return 0

    def get_data_parallel_world_size(self):
        return 1


def over_the_model(stage: int, name: str) -> dict:
    before = groups.mpu
    try:
        with pytest.raises(OptionError) as refused:
            deepspeed.initialize(model=toy(), config=config(stage), mpu=ModelParallel(name))
        return {"message": str(refused.value)}
    finally:
        groups.mpu = before


@on_ranks(over_the_model, stage=[0, 2], name=["tensor_model_parallel", "pipeline_model_parallel"])
def test_model_parallelism_is_refused(ran):
    for result in ran.ranks:
        assert "does not work with model parallelism (an mpu" in result["message"]


def over_sequences(stage: int) -> dict:
    """Each rank has one half of every sequence. The loss is that of the whole, gathered as Hugging Face gathers it."""
    before = groups.mpu
    parallel_state_sp.initialize_sequence_parallel(dist.get_world_size())
    try:
        model = toy()
        settings = with_the_toy_s_own(config(stage, gradient_clipping=TIGHT, train_batch_size=1), model)
        engine, *_ = deepspeed.initialize(model=model, config=settings, mpu=parallel_state_sp)
        losses, norms = [], []
        for tokens, targets in batches(STEPS):
            tokens, targets = (part.chunk(dist.get_world_size(), dim=1)[dist.get_rank()] for part in (tokens, targets))
            own = engine(tokens, targets)
            shares = all_gather(own, group=parallel_state_sp.get_sequence_parallel_group())
            loss = sum(shares) / len(shares)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
            norms.append(float(engine.get_global_grad_norm()))
        result = {"losses": losses, "norms": norms, "weights": whole_weights(engine.module)}
        result["momenta"] = whole_momenta(engine)
        result["size"] = engine.sequence_parallel_size
        engine.destroy()
        return result
    finally:
        groups.mpu = before
        parallel_state_sp._SEQUENCE_PARALLEL_GROUP = parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None


# Stage 3 takes the mean over all ranks (reduce_scatter_coalesced), which is right for a loss that is gathered. The
# others multiply it by the ranks of a sequence, which is right for a loss whose gradients are parts: twice as much here.
SCALES = {0: 2.0, 1: 2.0, 2: 2.0, 3: 1.0}


@on_ranks(over_sequences, stage=[1, 2, 3])
def test_sequence_parallelism_has_one_scale(ran):
    wanted = dense(clip=TIGHT)  # which clips every step, so that only the norm shows the scale
    wanted = {**wanted, "losses": wanted["losses"][:-1], "norms": [SCALES[ran.stage] * n for n in wanted["norms"]]}
    for result in ran.ranks:
        assert result["size"] == 2
        assert distances(result, {**wanted, "momenta": {}})["losses"] < TOLERANCE
        for got, norm in zip(result["norms"][1:], wanted["norms"][1:], strict=True):  # the first is an estimate
            assert got == pytest.approx(norm, rel=1e-5)
        assert result["weights"].keys() >= set(Toy.MATRICES)
        assert distances(result, {**wanted, "momenta": {}})["weights"] < TOLERANCE


def mixed(stage: int) -> dict:
    before = groups.mpu
    parallel_state_sp.initialize_sequence_parallel(dist.get_world_size())
    try:
        settings = config(stage, zero_optimization={"reduce_scatter": False}, train_batch_size=1)
        with pytest.raises(OptionError) as refused:
            deepspeed.initialize(model=toy(), config=settings, mpu=parallel_state_sp)
        return {"message": str(refused.value)}
    finally:
        groups.mpu = before
        parallel_state_sp._SEQUENCE_PARALLEL_GROUP = parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None


@on_ranks(mixed, stage=[3])
def test_sequence_parallelism_without_reduce_scatter_is_refused(ran):
    assert all('remove "reduce_scatter"' in result["message"] for result in ran.ranks)
