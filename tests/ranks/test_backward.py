"""Every way in which a gradient can come about under DeepSpeed gives the same run."""

import torch
from comparing import STEPS, assert_same, dense
from deepspeed import comm as dist
from launching import on_ranks
from toys import Checkpointed, Late, Resting, Sometimes, batches, micro_batches
from training import config, evaluate, mean_over_ranks, toy, train

MICRO = 3


def parts_of(batch):
    return micro_batches(batch, dist.get_rank(), dist.get_world_size(), MICRO)


def raw(engine, batch) -> float:
    """``loss.backward()``: DeepSpeed divides by the number of micro-batches in a hook."""
    losses = []
    for part in parts_of(batch):
        losses.append(engine(*part))
        losses[-1].backward()
        engine.step()
    return mean_over_ranks(sum(loss.detach() for loss in losses) / MICRO)


def deferred(context):
    """Every backward but one inside ``context``, which holds DeepSpeed's reduction back."""

    def step(engine, batch) -> float:
        total = torch.zeros(())
        *most, last = parts_of(batch)
        with getattr(engine, context)():
            for part in most if context == "no_sync" else [*most, last]:
                total += backward(engine, part)
        if context == "no_sync":
            total += backward(engine, last)
        engine.step()
        return mean_over_ranks(total)

    return step


def backward(engine, part) -> torch.Tensor:
    loss = engine(*part)
    engine.backward(loss / MICRO, scale_wrt_gas=False)
    return loss.detach() / MICRO


def unmanaged(engine, batch) -> float:
    """The caller decides where an accumulation ends, by calling ``step``."""
    total = sum(backward(engine, part) for part in parts_of(batch))
    engine.step()
    return mean_over_ranks(total)


def interrupted(engine, batch) -> float:
    """Evaluation between a step's micro-batches, and between backward and step."""
    count, total = engine.gradient_accumulation_steps(), torch.zeros(())
    for part in parts_of(batch):
        loss = engine(*part)
        engine.backward(loss)
        engine.eval()
        evaluate(engine, batch)
        engine.train()
        engine.step()
        total += loss.detach() / count
    return mean_over_ranks(total)


WAYS = {
    "raw": (raw, {"micro": MICRO}),
    "no_sync": (deferred("no_sync"), {}),
    "coalesced": (deferred("coalesce_grad_reduction"), {}),
    "unmanaged": (unmanaged, {"micro": MICRO, "managed_gradient_accumulation": False}),
    "interrupted": (interrupted, {"micro": MICRO}),
}


def by(way: str, stage: int) -> dict:
    step, settings = WAYS[way]
    return train(config(stage, **settings), STEPS, step=step)


def checkpointed(stage: int, reentrant: bool, capture: str) -> dict:
    model = toy(Checkpointed, reentrant=reentrant)
    return train(config(stage, options={"capture": capture}), STEPS, model=model)


def sparse_batches(count: int) -> list:
    """In the second step only the first half's sequences begin with even tokens, in the third none does."""
    made = batches(count)
    for number, kept in ((1, 9), (2, 0)):
        tokens, _ = made[number]
        first = tokens[kept:, 0]
        first.copy_(torch.where(first % 2 == 0, first + 1, first) % 37)
        first[first == 0] = 1
        made[number] = (tokens, (5 * tokens + 3) % 37)
    return made


def unused(stage: int) -> dict:
    data = sparse_batches(STEPS + 1)
    if stage == 3:  # a rank that gathers a weight alone waits for ever, with any optimizer
        data[1] = batches(STEPS + 1)[1]
    return train(config(stage), STEPS, model=toy(Sometimes), data=data)


def resting(stage: int) -> dict:
    return train(config(stage), STEPS, model=toy(Resting))


def alone(stage: int, optimizer: str) -> dict:
    """The matrix that is unused at first is the only one: one of the two ranks owns nothing."""
    return train(config(stage, optimizer=optimizer, options={"exclude": Late.OTHERS}), STEPS, model=toy(Late))


def none_in_the_third(count: int) -> list:
    return [batches(count)[i] if i == 1 else batch for i, batch in enumerate(sparse_batches(count))]


@on_ranks(by, way=["raw"], stage=[1, 2, 3])
def test_raw_backward(ran):
    assert_same(ran, dense())


@on_ranks(by, way=["no_sync"], stage=[0, 1])
def test_no_sync(ran):
    assert_same(ran, dense())


@on_ranks(by, way=["coalesced"], stage=[1, 2, 3])
def test_coalesced_reduction(ran):
    assert_same(ran, dense())


@on_ranks(by, way=["unmanaged"], stage=[0, 2, 3])
def test_accumulation_that_the_caller_manages(ran):
    assert_same(ran, dense())


@on_ranks(by, way=["interrupted"], stage=[0, 1, 2, 3])
def test_evaluation_within_a_step_leaves_no_trace(ran):
    assert_same(ran, dense())


@on_ranks(checkpointed, stage=[0, 2, 3], reentrant=[False, True], capture=["linear"])
def test_gradient_checkpointing(ran):
    assert_same(ran, dense())


@on_ranks(checkpointed, stage=[3], reentrant=[False, True], capture=["hook"])
def test_gradient_checkpointing_with_the_hook(ran):
    assert_same(ran, dense())


@on_ranks(unused, stage=[0, 1, 2, 3])
def test_a_matrix_unused_in_a_step_or_on_one_rank(ran):
    assert_same(ran, dense(Sometimes, data=none_in_the_third if ran.stage == 3 else sparse_batches))


@on_ranks(resting, stage=[0, 1, 2, 3])
def test_matrices_unused_late_and_frozen_in_between_rest(ran):
    """On all ranks at once, through steps that the others move in."""
    assert_same(ran, dense(Resting))


@on_ranks(alone, stage=[1, 3], optimizer=["MoFaSGD"])
def test_the_only_matrix_rests_where_one_rank_owns_nothing(ran):
    assert_same(ran, dense(Late))


def test_the_sparse_batches_are_what_they_say():
    even = [(tokens[:, 0] % 2 == 0) for tokens, _ in sparse_batches(3)]
    assert even[0][:9].any() and even[0][9:].any()
    assert even[1][:9].any() and not even[1][9:].any()
    assert not even[2].any()
    assert not torch.equal(dense(Sometimes)["weights"]["spare.weight"], toy(Sometimes).spare.weight)
