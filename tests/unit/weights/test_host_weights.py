"""Weights and masters in host memory: written in chunks through the buffers, the same bits as in place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_mofa.kernels.random_bits import Rounding
from ds_mofa.kernels.shard import Shard
from ds_mofa.weights import host as host_weights
from ds_mofa.weights.host import chunks, write_wherever
from ds_mofa.weights.staging import Staging
from ds_mofa.weights.write import write_updates

CPU = torch.device("cpu")
STILL = 2  # the matrix without coefficients, which is to stay
EXAMPLES = settings(max_examples=150)


@pytest.fixture
def elsewhere(monkeypatch):
    """Tensors that count as the host's, by address; all others as the device's."""
    addresses = set()
    monkeypatch.setattr(host_weights, "_elsewhere", lambda tensor, device: tensor.data_ptr() in addresses)
    return addresses


# ---------------------------------------------------------------------- chunks


@EXAMPLES
@given(
    count=st.integers(0, 7),
    start=st.integers(0, 5),
    numel=st.integers(0, 9000),
    size=st.sampled_from([2, 4, 6, 8]),
    limit=st.sampled_from([64, 1000, 4096, 1 << 20]),
)
def test_chunks_hold_every_element_once_within_the_bound(count, start, numel, size, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_weights, "CHUNK_BYTES", limit)
        found = list(chunks(count, start, numel, size))
    written = torch.zeros(count, numel)
    for some, low, high in found:
        assert (some.stop - some.start) * (high - low) * size <= limit
        assert low < high and some.start < some.stop
        written[some, low:high] += 1
    assert (written == 1).all()


def _in_pairs(start, numel):
    """Whether the GPU's kernel may take two neighbours as a word: see ``ds_mofa.kernels._write.launch``."""
    return start % 2 == numel % 2 == 0


@EXAMPLES
@given(start=st.integers(0, 5), numel=st.integers(1, 9000), limit=st.sampled_from([4, 66, 1000, 4096]))
def test_a_chunk_is_written_by_the_kernel_that_would_write_the_whole(start, numel, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_weights, "CHUNK_BYTES", limit)
        for _, low, high in chunks(1, start, numel, 2):
            assert _in_pairs(start + low, high - low) == _in_pairs(start, numel)


def test_a_llama_s_weights_go_in_large_chunks():
    assert len(list(chunks(64, 0, 14336 * 4096, 2))) == 64 * 2
    assert len(list(chunks(64, 0, 1024 * 4096 // 8, 2))) == 1


# ---------------------------------------------------------------------- what is written


def _whole_numbers(*shape, seed):
    # Products and sums of these are exact in fp32, whatever order a GEMM adds them in.
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def _case(dtype, start, numel, count=5, m=23, n=19, r=3):
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(numel, generator=generator).to(dtype) for _ in range(count)]
    U, V = _whole_numbers(count, m, r, seed=0), _whole_numbers(count, n, r, seed=1)
    how = {
        "step_size": 2.0**-9,
        "decay": 0.75,
        "rounding": Rounding(True, 1, 2),
        "numbers": torch.tensor([4, 2, 9, 7, 5])[:count],
    }
    coefficients = torch.ones(count, r)
    coefficients[STILL] = 0
    return weights, [Shard(flat, start) for flat in weights], (U, V, coefficients), how


@pytest.mark.parametrize("chunk", [50, 331, 3000, 1 << 20])
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("start", "numel"), [(0, 437), (7, 430), (30, 401), (19, 19), (5, 1), (437, 0)])
def test_chunks_write_the_bits_of_the_whole(start, numel, dtype, masters, chunk, elsewhere, monkeypatch):
    monkeypatch.setattr(host_weights, "CHUNK_BYTES", chunk)
    expected, shards, factors, how = _case(dtype, start, numel)
    old = [flat.clone() for flat in expected]
    kept = [flat.float() + 1e-3 for flat in expected] if masters else None
    write_updates(shards, *factors, masters=kept, **how)

    got, shards, factors, how = _case(dtype, start, numel)
    copies = [flat.float() + 1e-3 for flat in got] if masters else None
    elsewhere.update(tensor.data_ptr() for tensor in [*got, *(copies or [])] if numel)
    staging = Staging(CPU)
    write_wherever(staging, shards, *factors, masters=copies, **how)
    staging.finish()
    for i, (a, b, before) in enumerate(zip(got, expected, old)):
        assert torch.equal(a, b) and (numel == 0 or torch.equal(a, before) == (i == STILL))
    for a, b in zip(copies or [], kept or []):
        assert torch.equal(a, b)
    assert not masters or torch.equal(copies[STILL], old[STILL].float() + 1e-3)
    if numel:
        size = old[0].element_size() + (4 if masters else 0)
        assert 0 < staging.peak <= 2 * (max(chunk, 2 * size) + 256 * 2 * len(old))


@pytest.mark.parametrize("away", [(1, 0, 0, 1, 1), (0, 0, 1, 1, 0), (0, 1, 0, 1, 0)])
@pytest.mark.parametrize("masters_away", [False, True])
def test_some_here_and_some_there(away, masters_away, elsewhere):
    """As where ZeRO keeps a part of the small parameters on the GPU; fp32 masters may be there alone."""
    expected, shards, factors, how = _case(torch.bfloat16, 0, 437)
    kept = [flat.float() for flat in expected]
    write_updates(shards, *factors, masters=kept, **how)

    got, shards, factors, how = _case(torch.bfloat16, 0, 437)
    copies = [flat.float() for flat in got]
    elsewhere.update(flat.data_ptr() for flat, is_away in zip(got, away) if is_away)
    elsewhere.update(copy.data_ptr() for copy in copies if masters_away)
    write_wherever(Staging(CPU), shards, *factors, masters=copies, **how)
    assert all(map(torch.equal, got, expected)) and all(map(torch.equal, copies, kept))


def test_what_is_here_passes_through_no_buffer(elsewhere):
    _, shards, factors, how = _case(torch.bfloat16, 0, 437)
    staging = Staging(CPU)
    write_wherever(staging, shards, *factors, **how)
    assert staging.peak == 0
