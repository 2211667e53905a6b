"""What a step sends without DeepSpeed: sketches once, factors once, AdamW's gradients, and no gradient of a linear."""

import math
from collections import Counter

import torch.distributed as dist
from engines import built, clipping, layers, mofasgd, square, step_on
from launching import on_ranks
from scenes.collectives import Recorded, watched
from torch.nn.parallel import DistributedDataParallel
from toys import Layers, plenty


def one_step(engine: str, micro: int = 1, sync: bool = True, clip: bool = False, capture: str = "linear") -> dict:
    """The second step.

    Args:
        sync: reduce AdamW's gradients with each micro-batch.
        clip: by torch's own function.
    """
    shards = {"fsdp2": dist.get_world_size(), "hsdp": 2, "ddp": 1}[engine]
    if engine == "ddp":
        model = layers()
        optimizer = mofasgd(model, capture=capture)
        trained = DistributedDataParallel(model)
    else:
        model, optimizer = built(mesh=square() if engine == "hsdp" else None, options={"capture": capture})
        trained = model
    rest = [param for group in optimizer.adamw_groups for param in group["params"]]
    if engine != "ddp":
        rest.append(model.mix.weight)  # which its hook captures: fully_shard reduces its gradient
    padded = [math.ceil(len(param) / shards) * shards * math.prod(param.shape[1:]) for param in rest]
    how = {"micro": micro, "clip": clipping(model) if clip else None}
    how["sync"] = None if sync else model.set_requires_gradient_sync
    first, second = plenty(2)
    step_on(trained, optimizer, first, **how)
    with watched() as calls, Recorded() as recorded:
        step_on(trained, optimizer, second, **how)
    ours = Counter((name, size) for package, name, size in calls if package == "ds_mofa")
    return {
        "ours": [(*call, count) for call, count in ours.items()],
        "sums": sum(recorded.sums()) - 1,  # but for the loss's, of these tests
        "buffer": optimizer.matrices.layout.numel,
        "gradients": sum(padded),
        "linears": sum(m.param.numel() for m in optimizer.matrices.members if m.name != "mix.weight"),
    }


def counted(result: dict) -> dict[tuple[str, int], int]:
    return {(name, size): count for name, size, count in result["ours"]}


@on_ranks(one_step, {"micro": 1}, {"micro": 3}, {"micro": 3, "sync": False}, world=[2, 3], engine=["fsdp2"])
def test_fsdp2_sends_sketches_and_factors_once_a_step(ran):
    times = ran.micro if "sync" not in ran.case.arguments else 1
    for result in ran.ranks:
        assert counted(result) == {
            ("reduce_scatter_tensor", result["buffer"]): 1,
            ("all_gather_into_tensor", result["buffer"]): 1,
            ("all_reduce", 1): 1,
        }
        assert result["sums"] == result["buffer"] + 1 + times * result["gradients"]


@on_ranks(one_step, world=[4], engine=["hsdp"], micro=[3])
def test_hsdp_sends_them_over_all_ranks(ran):
    for result in ran.ranks:
        assert counted(result)["reduce_scatter_tensor", result["buffer"]] == 1
        assert counted(result)["all_gather_into_tensor", result["buffer"]] == 1
        # Over the shards, and what a shard holds of it over the replicas.
        assert result["sums"] == result["buffer"] + 1 + 3 * (result["gradients"] + result["gradients"] // 2)


@on_ranks(one_step, world=[2, 3], engine=["ddp"], micro=[1, 3])
def test_ddp_sends_the_sketches_once_and_no_factors(ran):
    for result in ran.ranks:
        assert counted(result) == {("all_reduce", result["buffer"]): 1}
        assert result["sums"] == result["buffer"] + ran.micro * result["gradients"]


@on_ranks(one_step, engine=["fsdp2", "ddp"], clip=[True], micro=[3])
def test_torch_s_clipping_sends_numbers_alone(ran):
    count = len(Layers.MATRICES)
    for result in ran.ranks:
        more = result["sums"] - result["buffer"] - 3 * result["gradients"]
        assert 0 <= more < 64
        allowed = {("all_reduce", 1), ("all_reduce", count)}
        sketches = "reduce_scatter_tensor" if ran.engine == "fsdp2" else "all_reduce"
        assert counted(result)[sketches, result["buffer"]] == 1
        others = {call for call in counted(result) if call[1] != result["buffer"]}
        assert others <= allowed


@on_ranks(one_step, {"engine": "fsdp2", "capture": "hook"})
def test_gradients_of_linears_would_be_seen(ran):
    """The control: capture "hook" has fully_shard reduce those of all matrices."""
    for result in ran.ranks:
        assert result["sums"] > result["buffer"] + result["gradients"] + result["linears"]
