"""Matrices in eight bits on several ranks: right by the dense reference, alike on all, saved as ordinary weights."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from comparing import distances, equal
from deepspeed import comm as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import layers, line, mofasgd, momenta, shard, square, step_on, whole
from launching import cases, on_ranks
from reference import Reference
from scenes.elastic import assert_continued, resumed, saved
from scenes.resuming import assert_resumed, saved_and_resumed
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toys import Even, batches, plenty
from training import OPTIONS, config, engine_for, toy, train, train_step, whole_momenta, whole_weights

from ds_mofa import MoFaSGD, OptionError
from ds_mofa.kernels.int8 import GROUP, Int8Weight, quantized
from ds_mofa.weights.int8 import take_out

INT8 = {"weights": "int8"}


def put_in(model: nn.Module) -> nn.Module:
    return MoFaSGD.to_int8(model, rank=OPTIONS["rank"], include=["blend"])


def start() -> Even:
    """A model whose matrices are numbers of eight bits, in fp32."""
    model = put_in(toy(Even))
    take_out(model)
    return model


def one_step(stage: int, early: bool) -> dict:
    """From :func:`start`. ``early``: in eight bits before there is an engine, of which the first rank's count."""
    model = start()
    if early:
        if dist.get_rank():
            with torch.no_grad():
                model.up.weight.zero_()
        put_in(model)
    before = [id(param) for param in model.parameters()]
    with engine_for(config(stage, options=INT8), model=model) as engine:
        loss = train_step(engine, plenty(1)[0])
        result = {"losses": [loss], "weights": whole_weights(engine.module), "momenta": whole_momenta(engine)}
        kept = [name for name, param in model.named_parameters() if isinstance(param, Int8Weight)]
    assert before == [id(param) for param in model.parameters()]
    return {**result, "kept": kept}


def one_sharded_step(replicas: int) -> dict:
    model = put_in(start())
    fully_shard(model, mesh=line() if replicas == 1 else square())
    optimizer = mofasgd(model, **INT8)
    kept = [name for name, param in model.named_parameters() if isinstance(param.to_local(), Int8Weight)]
    loss, _ = step_on(model, optimizer, plenty(1)[0])
    return {"losses": [loss], "weights": whole(model), "kept": kept, "momenta": momenta(optimizer)}


def sharded_and_resumed() -> dict:
    """By torch's checkpoints, of ordinary DTensors."""

    def built(seed: int) -> tuple:
        model = fully_shard(put_in(toy(Even, seed=seed).bfloat16()))
        return model, mofasgd(model, **INT8)

    def end_of(model, optimizer) -> dict:
        losses = [step_on(model, optimizer, batch)[0] for batch in batches(6)[3:]]
        return {"losses": losses, "weights": whole(model)}

    model, optimizer = built(0)
    for batch in batches(6)[:3]:
        step_on(model, optimizer, batch)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id="dcp")
    wanted = end_of(model, optimizer)
    model, optimizer = built(1)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id="dcp")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return {"wanted": wanted, "resumed": end_of(model, optimizer)}


def whole_run(stage: int) -> dict:
    return train(config(stage, dtype="bf16", options=INT8, gradient_clipping=0.2, micro=3), 4, model=toy(Even))


def under_ddp() -> dict:
    model = toy(Even, seed=dist.get_rank()).bfloat16()
    optimizer = mofasgd(model, **INT8)
    wrapped = DistributedDataParallel(model)
    for tokens, targets in batches(4):
        own = slice(dist.get_rank(), None, dist.get_world_size())
        wrapped(tokens[own], targets[own]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": dict(model.state_dict()), "kind": type(model.up.weight).__name__}


def exported(stage: int) -> dict:
    with engine_for(config(stage, dtype="bf16", options=INT8), model=toy(Even)) as engine:
        for batch in batches(2):
            train_step(engine, batch)
        engine.save_checkpoint("saved")
        engine.save_16bit_model("half")
        weights = whole_weights(engine.module)
    dist.barrier()  # the first rank has written
    half = torch.load("half/pytorch_model.bin", weights_only=True)
    fp32 = get_fp32_state_dict_from_zero_checkpoint("saved") if stage else None
    return {"weights": weights, "half": half, "fp32": fp32}


def refused() -> dict:
    said = {}
    for name, settings in (
        ("stage 3", config(3, options=INT8)),
        ("fp16", config(2, dtype="fp16", options=INT8)),
        ("masters", config(2, dtype="bf16", options={**INT8, "master_weights": True})),
    ):
        with pytest.raises(OptionError) as error, engine_for(settings, model=toy(Even)):
            pass
        said[name] = str(error.value)
    odd = fully_shard(MoFaSGD.to_int8(nn.Sequential(nn.Linear(64, 33), nn.Linear(33, 8)), rank=4))
    for name, build in (
        ("fully_shard before", lambda: mofasgd(shard(layers()), **INT8)),
        ("odd rows", lambda: MoFaSGD(odd, rank=4)),
    ):
        with pytest.raises(OptionError) as error:
            build()
        said[name] = str(error.value)
    return said


def spacing(exact: torch.Tensor) -> torch.Tensor:
    _, exponents = quantized(exact.float())
    return torch.exp2(exponents.double() - 127).repeat_interleave(GROUP, -1)


def assert_beside_the_reference(ran) -> None:
    """Momenta to rounding; each weight on one of its two neighbours, and at the mean where it should be."""
    with torch.random.fork_rng():
        model = start()
        before = {name: param.detach().double().clone() for name, param in model.named_parameters()}
        settings = {key: OPTIONS[key] for key in ("lr", "rank", "weight_decay", "adamw_eps")}
        reference = Reference(model, Even.MATRICES, beta=0.85, **settings)
        loss = reference.step(plenty(1)[0])
        found = {name: momentum.M for name, momentum in reference.momenta.items()}
        wanted = {"losses": [loss], "weights": {}, "momenta": found}
    for result in ran.ranks:
        assert result["kept"] == Even.MATRICES
        assert equal(result["weights"], ran.ranks[0]["weights"])
        off, moved = [], []
        for name in Even.MATRICES:
            exact = reference.weights()[name]
            far = (result["weights"][name].double() - exact) / spacing(exact)
            assert far.abs().max() < 1.001
            off.append(far.flatten())
            moved.append(((exact - before[name]) / spacing(exact)).flatten())
        off, moved = torch.cat(off), torch.cat(moved)
        assert 1 + float(off @ moved / (moved @ moved)) == pytest.approx(1, abs=0.2), "of the movement that has arrived"
        assert float(off.square().mean()) > 1e-3, "the control: it is a coarse grid"
    far = distances(ran.ranks[0], wanted)
    assert far["losses"] < 1e-6 and far["momenta"] < 1e-5


@on_ranks(one_step, *(dict(stage=stage, early=stage == 2) for stage in (0, 1, 2)), world=[1, 2, 3])
def test_a_step_lands_beside_the_dense_reference(ran):
    assert_beside_the_reference(ran)


@on_ranks(one_sharded_step, replicas=[1], world=[1, 2])
def test_a_sharded_step_does(ran):
    assert_beside_the_reference(ran)


@on_ranks(one_sharded_step, replicas=[2], world=[4])
def test_a_step_of_sharded_replicas_does(ran):
    assert_beside_the_reference(ran)


@on_ranks(whole_run, stage=[0, 1, 2], world=[2])
def test_every_rank_has_the_same_weights(ran):
    for result in ran.ranks:
        assert equal(result["weights"], ran.ranks[0]["weights"])
        assert result["losses"][-1] < result["losses"][0]


@on_ranks(under_ddp)
def test_ddp_makes_one_model_of_different_ones(ran):
    for result in ran.ranks:
        assert result["kind"] == "Int8Weight" and equal(result["weights"], ran.ranks[0]["weights"])


@on_ranks(
    saved_and_resumed,
    *(dict(stage=stage, dtype="bf16", kind="Even", options=INT8) for stage in (0, 1)),
    dict(
        stage=2,
        dtype="bf16",
        kind="Even",
        options=INT8,
        zero_optimization={"offload_optimizer": {"device": "cpu"}},
    ),
)
def test_a_run_resumes_bit_for_bit_from_ordinary_weights(ran):
    assert_resumed(ran)


SMALL = {"dtype": "bf16", "kind": "Even", "options": INT8}


@on_ranks(resumed, SMALL, world=[3], after=cases(saved, SMALL, stage=[2]), stage=[1])
def test_a_universal_checkpoint_goes_to_other_ranks(ran):
    assert_continued(ran, tolerance=2e-2)  # bf16 activations of another micro-batch size


@on_ranks(resumed, dict(dtype="bf16", kind="Even"), world=[2], after=cases(saved, SMALL, stage=[2]), stage=[3])
def test_a_universal_checkpoint_goes_on_in_sixteen_bits(ran):
    assert_continued(ran, tolerance=2e-2)


@on_ranks(sharded_and_resumed)
def test_a_sharded_run_resumes_bit_for_bit(ran):
    for result in ran.ranks:
        assert equal(result["wanted"], result["resumed"])


@on_ranks(exported, stage=[0, 1, 2])
def test_what_is_exported_is_what_was_trained(ran):
    for result in ran.ranks:
        for name in Even.MATRICES:  # of the rest AdamW has masters
            weight = result["weights"][name]
            assert torch.equal(result["half"][name], weight), name
            assert result["fp32"] is None or torch.equal(result["fp32"][name], weight.float()), name


@on_ranks(refused)
def test_what_cannot_be_is_refused(ran):
    for said in ran.ranks:
        assert "ZeRO stage 0, 1 or 2" in said["stage 3"]
        assert "before fully_shard" in said["fully_shard before"]
        assert "rows that 2 shards divide" in said["odd rows"]
        assert "load the model in bf16" in said["fp16"]
        assert "master_weights" in said["masters"]
