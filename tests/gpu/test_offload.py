"""Offload on a real device: pinned memory, streams, and the same bits as without.

Races do not show every time. So the current stream is kept waiting before the copies, and the buffers are written over
as soon as the allocator has them back.
"""

import os
import socket

import pytest
import torch
from torch import nn

from ds_mofa import MoFaSGD
from ds_mofa.kernels.random_bits import Rounding
from ds_mofa.kernels.shard import Shard
from ds_mofa.options import Options
from ds_mofa.parameters import split_parameters
from ds_mofa.rules.mofasgd import MoFaSGDRule
from ds_mofa.step.backend import OneProcess
from ds_mofa.step.step import MatrixStep
from ds_mofa.weights import host as host_weights
from ds_mofa.weights.host import write_wherever
from ds_mofa.weights.staging import HostMemory, Staging
from ds_mofa.weights.write import write_updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda", 0)
PIN = pytest.mark.parametrize("pin", [False, True], ids=["pageable", "pinned"])


def _host(tensor, pin):
    copy = HostMemory(pin).zeros(tensor.numel(), tensor.dtype)
    return copy.copy_(tensor.view(-1)).view(tensor.shape)


def _delay():
    """Work for some milliseconds in the current stream, so that whatever does not wait for it comes too early."""
    torch.cuda._sleep(10_000_000)


def _spoil(nbytes):
    """Take what the allocator has free, and write it full."""
    for _ in range(4):
        torch.empty(nbytes, dtype=torch.uint8, device=GPU).fill_(255)


# ---------------------------------------------------------------------- the buffers


@PIN
@pytest.mark.parametrize("back", [False, True])
def test_pieces_come_and_go_in_order(pin, back):
    size, count = 1 << 20, 9
    host = [_host(torch.full((size,), float(i)), pin) for i in range(count)]
    seen, staging = [], Staging(GPU)
    _spoil(8 * size)
    for number, (staged,) in enumerate(staging.passes([[tensor] for tensor in host], back=back)):
        if number % 3 == 0:
            _delay()
        staged += 100
        seen.append(staged.sum() / size)
    _spoil(8 * size)
    staging.finish()
    assert torch.stack(seen).tolist() == [100.0 + i for i in range(count)]
    for i, tensor in enumerate(host):
        assert (tensor == (100 + i if back else i)).all()
    assert staging.peak == 2 * 4 * size


@PIN
def test_what_is_sent_arrives_though_its_memory_is_wanted_at_once(pin):
    size = 1 << 22
    staging, target = Staging(GPU), _host(torch.zeros(size), pin)
    _delay()
    source = torch.full((size,), 3.0, device=GPU)
    staging.send(source, target)
    del source
    _spoil(4 * size)
    staging.finish()
    assert (target == 3).all()


def test_copies_do_not_wait_for_each_other():
    """Both directions at once, beside the computing: well below the time of one after the other."""
    size, count = 1 << 24, 16
    host = [_host(torch.zeros(size), True) for _ in range(count)]
    staging = Staging(GPU)

    def milliseconds(work):
        work()
        torch.cuda.synchronize()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended)

    def through():
        for (staged,) in staging.passes([[tensor] for tensor in host], back=True):
            staged += 1

    buffer = torch.empty(size, device=GPU)

    def one_after_the_other():
        for tensor in host:
            buffer.copy_(tensor, non_blocking=True)
            buffer.add_(1)
            tensor.copy_(buffer, non_blocking=True)

    together, apart = milliseconds(through), milliseconds(one_after_the_other)
    print(f"{count} x {4 * size / 1e6:.0f} MB in and out: {together:.1f} ms, one after the other {apart:.1f} ms")
    assert together < 0.8 * apart


def test_the_host_does_not_wait_while_pinned_memory_passes():
    host = [_host(torch.zeros(1 << 20), True) for _ in range(5)]
    staging = Staging(GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for (staged,) in staging.passes([[tensor] for tensor in host], back=True):
            staged += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    staging.finish()
    assert all((tensor == 1).all() for tensor in host)


# ---------------------------------------------------------------------- weights


def _weights(dtype, start, numel, count, m, n, r):
    torch.manual_seed(0)
    weights = [(0.02 * torch.randn(numel, device=GPU)).to(dtype) for _ in range(count)]
    working = torch.float32 if dtype == torch.float32 else dtype
    U, V = (torch.randn(count, size, r, device=GPU).to(working) / size**0.5 for size in (m, n))
    c = torch.rand(count, r, device=GPU).to(working)
    c[1] = 0  # this one stays
    how = {"step_size": 1e-3, "decay": 0.99, "rounding": Rounding(True, 3, 5), "numbers": torch.arange(count)}
    return weights, (U, V, c), how, start


# Whole; a shard that starts and ends inside a row; an odd number of weights, as of three ranks; an odd start.
SHARDS = [(0, 640 * 1000), (5_004, 630_000), (0, 213_333), (213_333, 213_333), (1, 4_242), (7, 0)]


@PIN
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("chunk", [30_000, 1 << 20, 1 << 26])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("start", "numel"), SHARDS)
def test_weights_on_the_host_get_the_bits_of_weights_on_the_gpu(start, numel, dtype, chunk, masters, pin, monkeypatch):
    monkeypatch.setattr(host_weights, "CHUNK_BYTES", chunk)
    weights, factors, how, _ = _weights(dtype, start, numel, 3, 640, 1000, 32)
    here = [flat.clone() for flat in weights]
    kept = [flat.to(torch.float32, copy=True) for flat in weights] if masters else None
    write_updates([Shard(flat, start) for flat in here], *factors, masters=kept, **how)

    there = [_host(flat, pin) for flat in weights]
    copies = [_host(flat.float(), pin) for flat in weights] if masters else None
    staging = Staging(GPU)
    _delay()
    write_wherever(staging, [Shard(flat, start) for flat in there], *factors, masters=copies, **how)
    _spoil(1 << 24)
    staging.finish()
    for a, b in zip(there, here):
        assert torch.equal(a, b.cpu())
    for a, b in zip(copies or [], kept or []):
        assert torch.equal(a, b.cpu())
    assert torch.equal(there[1], weights[1].cpu())
    if numel and dtype != torch.float32:
        assert any(not torch.equal(a, b.cpu()) for a, b in zip(there, weights))


def test_masters_alone_may_be_on_the_host_and_small_weights_alone_on_the_gpu():
    weights, factors, how, _ = _weights(torch.bfloat16, 0, 640_000, 3, 640, 1000, 32)
    here, kept = [flat.clone() for flat in weights], [flat.float() for flat in weights]
    write_updates([Shard(flat) for flat in here], *factors, masters=kept, **how)
    mixed = [weights[0].clone(), _host(weights[1], True), weights[2].clone()]
    copies = [_host(weights[0].float(), True), _host(weights[1].float(), True), weights[2].float()]
    staging = Staging(GPU)
    write_wherever(staging, [Shard(flat) for flat in mixed], *factors, masters=copies, **how)
    staging.finish()
    for a, b in zip([*mixed, *copies], [*here, *kept]):
        assert torch.equal(a.cpu(), b.cpu())


@PIN
def test_no_more_of_the_weights_is_on_the_gpu_than_two_chunks(pin):
    m, n, r, count = 4096, 8192, 16, 3
    weights = [_host(torch.full((m * n,), 0.02, dtype=torch.bfloat16), pin) for _ in range(count)]
    U, V = (torch.randn(count, size, r, device=GPU).bfloat16() for size in (m, n))
    how = {"step_size": 1e-3, "decay": 0.99, "rounding": Rounding(True), "numbers": torch.arange(3)}
    staging = Staging(GPU)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    write_wherever(staging, [Shard(flat) for flat in weights], U, V, U[:, 0].contiguous(), **how)
    staging.finish()
    assert torch.cuda.max_memory_allocated() - before <= 2 * host_weights.CHUNK_BYTES + (1 << 20)
    assert torch.cuda.memory_allocated() - before <= 1 << 20


# ---------------------------------------------------------------------- factors


def _model(dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(256, 384), nn.GELU(), *(nn.Linear(384, 384) for _ in range(4)), nn.Linear(384, 128)]
    return nn.Sequential(*layers, nn.LayerNorm(128)).to(GPU, dtype)


def _steps(host, dtype, steps=6, **options):
    model = _model(dtype)
    options = Options(lr=2e-3, rank=16, adamw_lr=0.0, **options)
    split = split_parameters(model, model.parameters(), options)
    matrices = MatrixStep(split.matrices, options, MoFaSGDRule(options), OneProcess(GPU, host=host))
    optimizer = MoFaSGD.from_parts(split, options, torch.optim.AdamW(split.adamw_groups), matrices)
    generator = torch.Generator(GPU).manual_seed(1)
    for _ in range(steps):
        x, target = (torch.randn(64, size, device=GPU, generator=generator).to(dtype) for size in (256, 128))
        (model(x) - target).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        _spoil(1 << 22)
    torch.cuda.synchronize()
    return model, matrices


@PIN
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("update_bytes", [2e9, 1e6, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_factors_on_the_host_change_no_bit(dtype, update_bytes, masters, pin):
    options = {"update_bytes": update_bytes, "master_weights": masters, "diagnostics_every": 2}
    one, here = _steps(None, dtype, **options)
    other, there = _steps(HostMemory(pin), dtype, **options)
    assert here.factors.is_cuda and there.factors.device.type == "cpu" and there.factors.is_pinned() == pin
    assert torch.equal(here.factors.cpu(), there.factors) and there.factors.any()
    assert torch.equal(here.working, there.working)
    assert torch.equal(here.report.values, there.report.values)
    for a, b in zip(one.parameters(), other.parameters()):
        assert torch.equal(a, b)
    if masters and dtype == torch.bfloat16:
        for a, b in zip(here.masters.tensors, there.masters.tensors):
            assert b.is_pinned() == pin and torch.equal(a.cpu(), b)


def test_state_goes_from_the_host_to_the_gpu_and_back():
    _, there = _steps(HostMemory(True), torch.bfloat16)
    _, here = _steps(None, torch.bfloat16, steps=1)
    here.load_state_dict(there.state_dict())
    assert torch.equal(here.factors.cpu(), there.factors) and here.steps == there.steps
    _, back = _steps(HostMemory(False), torch.bfloat16, steps=1)
    back.load_state_dict(here.state_dict())
    assert torch.equal(back.factors, there.factors)
    for matrix in back.members:  # the third has coefficients after a step, and nothing that counts before the next
        for a, b in zip(
            back.layout.views(back.working, matrix.index)[:2], there.layout.views(there.working, matrix.index)
        ):
            assert torch.equal(a, b)


def test_the_update_stays_within_its_bytes():
    """Of temporaries, counted by the allocator, with what the libraries take beside it."""
    limit = 32e6
    torch.manual_seed(0)
    model = (
        nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(24)), nn.LayerNorm(2048)).to(GPU).bfloat16()
    )
    optimizer = MoFaSGD(model, lr=2e-3, rank=32, update_bytes=limit)
    step = optimizer.matrices
    for _ in range(3):
        step.sketches.normal_()
        step.reduce()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.update(optimizer.matrix_groups)
        torch.cuda.synchronize()
    assert len(step.owner.sub_batches) > 2
    assert 0.3 * limit < torch.cuda.max_memory_allocated() - before < 1.1 * limit


# ---------------------------------------------------------------------- DeepSpeed, one process on one GPU


@pytest.fixture(scope="module")
def deepspeed():
    deepspeed = pytest.importorskip("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {key: os.environ.get(key) for key in place}
    os.environ.update(place)
    deepspeed.init_distributed(dist_backend="nccl")
    yield deepspeed
    torch.distributed.destroy_process_group()
    for key, value in before.items():
        if value is None:
            os.environ.pop(key)
        else:
            os.environ[key] = value


def _config(stage, zero, **options):
    # AdamW computes otherwise on a CPU than on a GPU: it stands still, so that nothing but the place differs.
    options = {"lr": 2e-3, "rank": 16, "adamw_lr": 0.0, "torch_adam": True, "update_bytes": 1e6, **options}
    return {
        "train_micro_batch_size_per_gpu": 64,
        "optimizer": {"type": "MoFaSGD", "params": options},
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 1000, **zero},
    }


def _engine(deepspeed, config, *, init=False):
    if init:  # a zero.Init that knows nothing of the config
        with deepspeed.zero.Init(dtype=torch.bfloat16):
            torch.manual_seed(0)
            model = _model(torch.bfloat16)
    else:
        model = _model(torch.bfloat16)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine


def _train(engine, steps=5, seed=1):
    generator = torch.Generator(GPU).manual_seed(seed)
    for _ in range(steps):
        x, target = (torch.randn(64, size, device=GPU, generator=generator).bfloat16() for size in (256, 128))
        engine.backward((engine(x) - target).float().square().mean())
        engine.step()


def _whole(deepspeed, engine):
    weights = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            weights[name] = param.detach().cpu().clone()
    return weights


def _run(deepspeed, stage, zero, *, init=False, look=None, **options):
    engine = _engine(deepspeed, _config(stage, zero, **options), init=init)
    try:
        _train(engine)
        return _whole(deepspeed, engine), look(engine) if look else None
    finally:
        engine.destroy()


def _places(engine):
    step = engine.basic_optimizer.matrices
    shards = [getattr(matrix.param, "ds_tensor", matrix.param) for matrix in step.members]
    return (step.factors.device.type, step.factors.is_pinned()), [(s.device.type, s.is_pinned()) for s in shards]


CASES = [
    (1, {}, ["offload_optimizer"]),
    (2, {}, ["offload_optimizer"]),
    (2, {"master_weights": True}, ["offload_optimizer"]),
    (3, {}, ["offload_optimizer"]),
    (3, {}, ["offload_param"]),
    (3, {}, ["offload_optimizer", "offload_param"]),
    (3, {"master_weights": True}, ["offload_optimizer", "offload_param"]),
]


@PIN
@pytest.mark.parametrize(("stage", "options", "offloaded"), CASES, ids=[f"{s}-{'-'.join(o)}-{x}" for s, x, o in CASES])
def test_offloading_changes_no_bit_of_a_matrix(deepspeed, stage, options, offloaded, pin):
    plain, _ = _run(deepspeed, stage, {}, **options)
    zero = {name: {"device": "cpu", "pin_memory": pin} for name in offloaded}
    moved, (factors, shards) = _run(deepspeed, stage, zero, look=_places, **options)
    assert factors == (("cpu", pin) if "offload_optimizer" in offloaded else ("cuda", False))
    assert set(shards) == {("cpu", pin) if "offload_param" in offloaded else ("cuda", False)}
    for name, weight in plain.items():
        assert torch.equal(weight, moved[name]), name


def test_small_matrices_that_persist_change_no_bit_either(deepspeed):
    zero = {"stage3_param_persistence_threshold": 384 * 256}  # the first and the last matrix
    plain, _ = _run(deepspeed, 3, zero)
    moved, (_, shards) = _run(deepspeed, 3, {**zero, "offload_param": {"device": "cpu"}}, look=_places)
    assert ("cpu", True) in shards
    for name, weight in plain.items():
        assert torch.equal(weight, moved[name]), name


def test_shards_of_a_zero_init_without_the_config_move_to_the_host(deepspeed):
    plain, _ = _run(deepspeed, 3, {}, init=True)
    zero = {"offload_param": {"device": "cpu", "pin_memory": True}}
    moved, (_, shards) = _run(deepspeed, 3, zero, init=True, look=_places)
    assert set(shards) == {("cpu", True)}
    for name, weight in plain.items():
        assert torch.equal(weight, moved[name]), name


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_goes_from_offloaded_to_not_and_back(deepspeed, stage, tmp_path):
    host = {"device": "cpu", "pin_memory": True}
    kinds = [{}, {"offload_optimizer": host} | ({"offload_param": host} if stage == 3 else {})]
    ends = []
    for number, zero in enumerate(kinds):
        engine = _engine(deepspeed, _config(stage, zero))
        _train(engine)
        engine.save_checkpoint(str(tmp_path / str(number)))
        _train(engine, seed=2)
        ends.append(_whole(deepspeed, engine))
        engine.destroy()
    for number, zero in enumerate(reversed(kinds)):
        engine = _engine(deepspeed, _config(stage, zero))
        engine.load_checkpoint(str(tmp_path / str(number)))
        _train(engine, seed=2)
        ends.append(_whole(deepspeed, engine))
        engine.destroy()
    for end in ends[1:]:
        for name, weight in ends[0].items():
            assert torch.equal(weight, end[name]), name
