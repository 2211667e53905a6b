"""What fully_shard can be told, and what scripts do beside it: each switch trains like the dense reference."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from comparing import assert_same, dense, equal
from engines import built, clipping, layers, line, mofasgd, shard, train
from launching import on_ranks
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from toys import Idle, Layers, Marked, Napping, Tied, marked, plenty
from training import TIGHT, toy

from ds_mofa import OptionError

# ---------------------------------------------------------------------- that change nothing at all

SAME: dict[str, Callable[[], dict]] = {}


def same(scene: Callable[[], dict]) -> Callable[[], dict]:
    """One of :data:`SAME`: to agree with the reference of :class:`Layers`."""
    SAME[scene.__name__] = scene
    return scene


@same
def kept_gathered() -> dict:
    return train(*built(reshard_after_forward=False), micro=3)


@same
def released() -> dict:
    return train(*built(reshard_after_forward=True), micro=3)


@same
def gathered_until_the_step() -> dict:
    """With the last backward leaving whole weights, which a step makes stale."""
    model, optimizer = built()
    model.set_reshard_after_backward(False)
    return train(model, optimizer, micro=3)


@same
def micro_batches_without_sync() -> dict:
    model, optimizer = built()
    return train(model, optimizer, micro=3, sync=model.set_requires_gradient_sync)


@same
def zeros_of_what_is_not_used() -> dict:
    model, optimizer = built()
    for module in sharded(model):
        module.set_reduce_scatter_unused_params(True)
    return train(model, optimizer, micro=3)


@same
def divided_by_the_script() -> dict:
    """A sum of the gradients, of a loss that the script has divided."""
    model, optimizer = built()
    for module in sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return train(model, optimizer, backward=lambda loss: (loss / dist.get_world_size()).backward())


@same
def ignored() -> dict:
    model = layers()
    shard(model, ignored_params={model.place.weight, model.feed.up.weight})
    return train(model, mofasgd(model), micro=3)


@same
def all_matrices_ignored() -> dict:
    model = layers()
    shard(model, ignored_params={model.get_parameter(name) for name in Layers.MATRICES})
    optimizer = mofasgd(model)
    return train(model, optimizer, clip=lambda: optimizer.clip_grad_norm_(1e9))


@same
def replicated() -> dict:
    model = layers()
    for block in (model.mix, model.feed, model.pair, model):
        replicate(block)
    return train(model, mofasgd(model))


@same
def on_the_host() -> dict:
    return train(*built(offload_policy=CPUOffloadPolicy(pin_memory=False)))


@same
def wrapped_in_checkpoints() -> dict:
    model = layers()
    model.feed = checkpoint_wrapper(model.feed)
    shard(model)
    return train(model, mofasgd(model))


def recomputed(reentrant: bool) -> dict:
    """Around one sharded block, and within another."""
    model = layers()
    within = model.pair.forward
    model.pair.forward = lambda x: checkpoint(within, x, use_reentrant=reentrant)
    shard(model)
    feed = model.feed

    def around(x: Tensor) -> Tensor:
        return checkpoint(feed, x, use_reentrant=reentrant)

    optimizer = mofasgd(model)
    model.feed = Called(around, feed)
    return train(model, optimizer)


@same
def recomputed_in_the_backward() -> dict:
    return recomputed(reentrant=False)


@same
def recomputed_by_a_backward_of_its_own() -> dict:
    return recomputed(reentrant=True)


@same
def compiled_before() -> dict:
    model = layers()
    for block in (model.feed, model.pair):
        block.compile(backend="aot_eager")
    shard(model)
    return train(model, mofasgd(model))


@same
def compiled_after() -> dict:
    model = shard(layers())
    for block in (model.feed, model.pair):
        block.compile(backend="aot_eager")
    return train(model, mofasgd(model), micro=3)


@same
def filled_before_the_optimizer() -> dict:
    model, state = from_meta()
    fill(model, state)
    return train(model, mofasgd(model))


@same
def filled_after_the_optimizer() -> dict:
    model, state = from_meta()
    optimizer = mofasgd(model)
    fill(model, state)
    return train(model, optimizer)


@same
def evaluated_between() -> dict:
    model, optimizer = built()
    tokens, targets = plenty(1)[0]

    def look(step: int) -> None:
        with torch.no_grad():
            model.eval()(tokens, targets)
        model.train()

    return train(model, optimizer, before=look)


@same
def asked_for_the_input_s_gradient() -> dict:
    """By autograd.grad before each backward, which is no backward of the weights."""
    model, optimizer = built()
    tokens, targets = plenty(1)[0]
    seen = []
    model.embed.register_forward_hook(lambda module, args, out: seen.append(out))

    def ask(step: int) -> None:
        loss = model(tokens, targets)
        (found,) = torch.autograd.grad(loss, seen.pop())
        assert found.abs().max() > 0

    return train(model, optimizer, before=ask)


def switched(switch: str) -> dict:
    return SAME[switch]()


@on_ranks(switched, switch=list(SAME))
def test_agrees_with_the_dense_reference(ran):
    assert_same(ran, dense(Layers, data=plenty))
    for result in ran.ranks:
        assert equal(result["weights"], ran.ranks[0]["weights"])


def resharded_to_two() -> dict:
    return train(*built(reshard_after_forward=2), micro=3)


@on_ranks(resharded_to_two, world=[4])
def test_weights_that_are_kept_by_twos_agree(ran):
    assert_same(ran, dense(Layers, data=plenty))


class Called(nn.Module):
    """Calls a function in the place of a module."""

    def __init__(self, call: Callable[[Tensor], Tensor], module: nn.Module):
        super().__init__()
        self.call, self.module = call, module

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def from_meta() -> tuple[Layers, dict[str, Tensor]]:
    model = layers()
    state = model.state_dict()
    model.to("meta")
    model.pair.echo.weight = model.pair.twin.weight  # which torch unties there
    return shard(model), state


def fill(model: Layers, state: dict[str, Tensor]) -> None:
    model.to_empty(device="cpu")
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


# ---------------------------------------------------------------------- divisors that differ


def divided_differently() -> dict:
    model, optimizer = built()
    model.feed.set_gradient_divide_factor(1.0)
    model.feed.set_force_sum_reduction_for_comms(True)
    with pytest.raises(OptionError) as refused:
        train(model, optimizer)
    return {"message": str(refused.value)}


@on_ranks(divided_differently)
def test_divisors_that_differ_are_refused(ran):
    for result in ran.ranks:
        assert "set_gradient_divide_factor has set 2 divisors, [1.0, 2.0]" in result["message"]
        assert "set the same one for all" in result["message"]


# ---------------------------------------------------------------------- tied embeddings


def tied(as_a_matrix: bool, clip: bool) -> dict:
    """As a matrix it gets sketches by the head, and a gradient by the embedding."""
    model = shard(toy(Tied))
    optimizer = mofasgd(model, include=["^embed"] if as_a_matrix else [])
    return train(model, optimizer, micro=3, clip=clipping(model) if clip else None)


@on_ranks(tied, as_a_matrix=[False, True], clip=[False, True], world=[2, 3], pairwise=True)
def test_tied_embeddings_agree(ran):
    matrices = ("embed.weight", *Tied.MATRICES) if ran.as_a_matrix else Tied.MATRICES
    wanted = dense(Tied, data=plenty, matrices=matrices, clip=TIGHT if ran.clip else 0.0)
    assert_same(ran, wanted)
    if ran.clip:
        for result in ran.ranks:
            assert result["norms"] == pytest.approx(wanted["norms"], rel=1e-5)


# ---------------------------------------------------------------------- matrices that rest


def frozen_later(cut: str) -> dict:
    model, optimizer = built(cut)

    def freeze(step: int) -> None:
        model.gate.requires_grad_(step not in (3, 4))

    return train(model, optimizer, before=freeze, clip=clipping(model))


@on_ranks(frozen_later, cut=["blocks", "each"])
def test_a_layer_that_is_frozen_later_rests_and_goes_on(ran):
    assert_same(ran, dense(Napping, data=plenty, clip=TIGHT))
    with pytest.raises(AssertionError):
        assert_same(ran, dense(Layers, data=plenty, clip=TIGHT))


def used_by_one_rank(clip: bool) -> dict:
    """FSDP2 gathers the root's weights on all ranks; one of them alone has sketches of this one."""
    model = shard(toy(Marked))
    return train(model, mofasgd(model), data=marked, clip=clipping(model) if clip else None)


@on_ranks(used_by_one_rank, world=[2, 3], clip=[False, True], pairwise=True)
def test_a_linear_that_one_rank_alone_uses_agrees(ran):
    wanted = dense(Marked, data=marked, clip=TIGHT if ran.clip else 0.0)
    assert_same(ran, wanted)
    for result in ran.ranks:
        assert equal(result["norms"], ran.ranks[0]["norms"])
        if ran.clip:
            assert result["norms"] == pytest.approx(wanted["norms"], rel=1e-5)


# ---------------------------------------------------------------------- 16 bits

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def in_16_bits(shards: str, masters: bool) -> dict:
    """``shards``: the dtype of the weights; all computing is in bf16."""
    model = layers() if shards == "fp32" else layers().bfloat16()
    shard(model, mp_policy=BF16)
    optimizer = mofasgd(model, master_weights=masters)
    result = train(model, optimizer, 8)
    masters_of = optimizer.matrices.masters.tensors
    return {
        **result,
        "shards": str(optimizer.matrices.members[0].param.dtype),
        "masters": 0 if masters_of is None else sum(one.numel() for one in masters_of),
    }


@on_ranks(in_16_bits, shards=["fp32", "bf16"], masters=[False, True])
def test_16_bits_stay_near_the_reference(ran):
    """Of the matrices: in 8 steps they go 3 % to 15 % of their length, and a bf16 has 8 bits."""
    wanted = dense(Layers, data=plenty, steps=8)["weights"]
    start = layers().state_dict()
    bound = 2e-3 if ran.shards == "fp32" else 5e-3 if ran.masters else 1e-2
    for result in ran.ranks:
        assert result["working"].dtype == torch.bfloat16
        assert result["shards"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[ran.shards]
        assert (result["masters"] > 0) == (ran.masters and ran.shards == "bf16"), "masters of fp32 weights"
        for name in Layers.MATRICES:
            assert relative(result["weights"][name], wanted[name]) < bound, name
            assert relative(start[name], wanted[name]) > 0.025, name


def in_two_dtypes() -> dict:
    model = layers()
    fully_shard(model.feed, mesh=line(), mp_policy=BF16)
    fully_shard(model, mesh=line())
    return train(model, mofasgd(model), 8)


@on_ranks(in_two_dtypes)
def test_a_unit_of_its_own_dtype_stays_near_the_reference(ran):
    """The factors are broadcast in fp32, and the others' matrices are the nearer for it."""
    wanted = dense(Layers, data=plenty, steps=8)["weights"]
    for result in ran.ranks:
        assert result["working"].dtype == torch.float32
        for name in Layers.MATRICES:
            assert relative(result["weights"][name], wanted[name]) < 2e-3, name


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


# ---------------------------------------------------------------------- an output that no loss uses


def with_an_idle_output(compiled: bool) -> dict:
    """The compiled backward is asked for its gradient all the same, which is zero."""
    model = toy(Idle)
    if compiled:
        model.feed.compile(backend="aot_eager")
    shard(model)
    return train(model, mofasgd(model))


@on_ranks(with_an_idle_output, compiled=[False, True])
def test_a_matrix_of_an_output_that_is_not_used_rests(ran):
    wanted = dense(Idle, data=plenty)
    assert_same(ran, wanted)
    for result in ran.ranks:
        assert equal(result["weights"]["feed.aside.weight"], toy(Idle).feed.aside.weight.detach())
