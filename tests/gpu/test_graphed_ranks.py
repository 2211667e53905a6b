"""Micro-batches as CUDA graphs on several GPUs: DistributedDataParallel's run, and replicas of the same bits."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ds_mofa import GraphedMicroBatch
from tests.gpu.toys import MICRO_BATCHES, STEPS, TOKENS, Model, mofasgd

RANKS = min(torch.cuda.device_count(), 4)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(RANKS < 2, reason="needs two CUDA devices")]
LENGTHS = [(TOKENS,) * MICRO_BATCHES] * STEPS
UNEQUAL = [*LENGTHS, (TOKENS, 2 * TOKENS, TOKENS), *LENGTHS]  # on odd ranks: another graph than their neighbours'
MAKES = {
    "rank 8": mofasgd(),
    # So slow that there is a gradient to the end: without one, noise chooses the directions.
    "explore": mofasgd(explore=8, lr=2e-4),
    "embedding, head": mofasgd(include=["embed", "head.weight"]),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
}


def trained(make, *, graphed: bool, dtype: torch.dtype) -> dict:
    """On a rank's own batches, and from its own weights."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = Model().to("cuda", dtype)
    optimizer = make(model)
    whole = model if graphed else DistributedDataParallel(model, device_ids=[rank])
    micro_batch = GraphedMicroBatch(lambda ids: whole(ids) / MICRO_BATCHES, optimizer)
    generator = torch.Generator().manual_seed(10 + rank)
    norms = []
    for lengths in UNEQUAL if rank % 2 else [*LENGTHS, *LENGTHS[:1], *LENGTHS]:
        for i, tokens in enumerate(lengths):
            ids = torch.randint(100, (2, tokens), generator=generator).cuda()
            if not graphed:
                (whole(ids) / MICRO_BATCHES).backward()
            elif i < MICRO_BATCHES - 1:
                with micro_batch.no_sync():
                    micro_batch(ids)
            else:
                micro_batch(ids)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: weight.float().cpu() for name, weight in model.state_dict().items()}
    return {"weights": copy.deepcopy(weights), "norms": norms, "graphs": len(micro_batch._graphs)}


def work(rank: int, dtype: torch.dtype, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29531")}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=RANKS, device_id=torch.device("cuda", rank))
    for name, make in MAKES.items():
        found = {kind: trained(make, graphed=kind == "graphed", dtype=dtype) for kind in ("ddp", "graphed")}
        torch.save(found, Path(folder) / f"{name}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def ran(request, tmp_path_factory):
    """A folder of all that ranks have made, and of what dtype it is."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (request.param, str(folder)), nprocs=RANKS)
    return folder, request.param


@pytest.mark.parametrize("make", MAKES)
def test_it_is_the_run_under_ddp(ran, make):
    folder, dtype = ran
    first, *others = [torch.load(folder / f"{make}.{rank}.pt") for rank in range(RANKS)]
    assert first["graphed"]["graphs"] == 1 and first["ddp"]["graphs"] == 0
    for kind, found in first.items():
        for other in others:
            assert other[kind]["norms"] == found["norms"], kind
            assert all(torch.equal(one, found["weights"][name]) for name, one in other[kind]["weights"].items())
    near, bound = (1e-3, 1e-4) if dtype == torch.float32 else (0.05, 1e-2)
    found, expected = first["graphed"], first["ddp"]
    assert found["norms"] == pytest.approx(expected["norms"], rel=near, abs=1e-4)  # 12 at first, and 0 in the end
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=near, atol=bound)
