"""Matrices in eight bits on several ranks: right by the dense reference, alike on all, saved as ordinary weights."""

import pytest
import torch
from comparing import distances, equal
from deepspeed import comm as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engines import layers, mofasgd, shard
from launching import on_ranks
from reference import Reference
from scenes.resuming import assert_resumed, saved_and_resumed
from torch.nn.parallel import DistributedDataParallel
from toys import Even, batches
from training import OPTIONS, config, engine_for, toy, train, train_step, whole_momenta, whole_weights

from ds_mofa import MoFaSGD, OptionError
from ds_mofa.kernels.int8 import GROUP, Int8Weight, quantized
from ds_mofa.weights.int8 import take_out

INT8 = {"weights": "int8"}


def start() -> Even:
    """A model whose matrices are numbers of eight bits, in fp32."""
    model = toy(Even)
    MoFaSGD.to_int8(model, rank=OPTIONS["rank"], include=["blend"])
    take_out(model)
    return model


def one_step(stage: int, early: bool) -> dict:
    """In fp32, from weights that are of eight bits already. ``early``: put there before the engine, of which the first rank's
    count.
    """
    model = start()
    if early:
        if dist.get_rank():
            with torch.no_grad():
                model.up.weight.zero_()
        MoFaSGD.to_int8(model, rank=OPTIONS["rank"], include=["blend"])
    kept = [id(param) for param in model.parameters()]
    with engine_for(config(stage, options=INT8), model=model) as engine:
        loss = train_step(engine, batches(1)[0])
        result = {"losses": [loss], "weights": whole_weights(engine.module), "momenta": whole_momenta(engine)}
        kinds = [name for name, param in model.named_parameters() if isinstance(param, Int8Weight)]
    return {**result, "kinds": kinds, "kept": kept == [id(param) for param in model.parameters()]}


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
    for name, model, settings in (
        ("stage 3", toy(Even), config(3, options=INT8)),
        ("fp16", toy(Even), config(2, dtype="fp16", options=INT8)),
        ("masters", toy(Even), config(2, dtype="bf16", options={**INT8, "master_weights": True})),
    ):
        with pytest.raises(OptionError) as error, engine_for(settings, model=model):
            pass
        said[name] = str(error.value)
    sharded = shard(layers())
    with pytest.raises(OptionError) as error:
        mofasgd(sharded, **INT8)
    said["fully_shard"] = str(error.value)
    return said


def spacing(exact: torch.Tensor) -> torch.Tensor:
    _, exponents = quantized(exact.float())
    return torch.exp2(exponents.double() - 127).repeat_interleave(GROUP, -1)


@on_ranks(
    one_step, *(dict(stage=stage, early=False) for stage in (0, 1, 2)), dict(stage=2, early=True), world=[1, 2, 3]
)
def test_a_step_lands_beside_the_dense_reference(ran):
    """Momenta to rounding; each weight on one of its two neighbours, and at the mean where it should be."""
    with torch.random.fork_rng():
        model = start()
        before = {name: param.detach().double().clone() for name, param in model.named_parameters()}
        settings = {key: OPTIONS[key] for key in ("lr", "rank", "weight_decay", "adamw_eps")}
        reference = Reference(model, Even.MATRICES, beta=0.85, **settings)
        loss = reference.step(batches(1)[0])
        momenta = {name: momentum.M for name, momentum in reference.momenta.items()}
        wanted = {"losses": [loss], "weights": {}, "momenta": momenta}
    for result in ran.ranks:
        assert result["kinds"] == Even.MATRICES and result["kept"]
        assert equal(result["weights"], ran.ranks[0]["weights"])
        off, moved = [], []
        for name in Even.MATRICES:
            exact = reference.weights()[name]
            far = (result["weights"][name].double() - exact) / spacing(exact)
            assert far.abs().max() < 1.001
            off.append(far)
            moved.append((exact - before[name]) / spacing(exact))
        off, moved = torch.cat([one.flatten() for one in off]), torch.cat([one.flatten() for one in moved])
        share = 1 + float(off @ moved / (moved @ moved))  # of the movement that has arrived
        assert share == pytest.approx(1, abs=0.2)
        assert float(off.square().mean()) > 1e-3, "the control: it is a coarse grid"
    far = distances(ran.ranks[0], wanted)
    assert far["losses"] < 1e-6 and far["momenta"] < 1e-5


@on_ranks(whole_run, stage=[0, 1, 2], world=[1, 2])
def test_every_rank_has_the_same_weights(ran):
    for result in ran.ranks:
        assert equal(result["weights"], ran.ranks[0]["weights"])
        assert result["losses"][-1] < result["losses"][0]


@on_ranks(under_ddp, world=[2])
def test_ddp_makes_one_model_of_different_ones(ran):
    for result in ran.ranks:
        assert result["kind"] == "Int8Weight" and equal(result["weights"], ran.ranks[0]["weights"])


@on_ranks(saved_and_resumed, *(dict(stage=stage, dtype="bf16", kind="Even", options=INT8) for stage in (0, 1, 2)))
def test_a_run_resumes_bit_for_bit_from_ordinary_weights(ran):
    assert_resumed(ran)


@on_ranks(exported, stage=[0, 1, 2])
def test_what_is_exported_is_what_was_trained(ran):
    for result in ran.ranks:
        for name in Even.MATRICES:  # of the rest AdamW has masters
            weight = result["weights"][name]
            assert torch.equal(result["half"][name], weight), name
            assert result["fp32"] is None or torch.equal(result["fp32"][name], weight.float()), name


@on_ranks(refused)
def test_weights_in_parts_and_fp16_are_refused(ran):
    for said in ran.ranks:
        assert "ZeRO stage 0, 1 or 2" in said["stage 3"] and "ZeRO stage 0, 1 or 2" in said["fully_shard"]
        assert "load the model in bf16" in said["fp16"]
        assert "master_weights" in said["masters"]
