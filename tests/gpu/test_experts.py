"""Stacked experts on a GPU: the dense gradients' sketches, the write of stacks and of their parts, and no wait of the host."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from ds_mofa import MoFaSGD
from ds_mofa.kernels.random_bits import Rounding
from ds_mofa.kernels.shard import Shard, runs
from ds_mofa.weights.write import write_updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

E, WIDTH, INNER, TOKENS, K = 8, 128, 96, 512, 2


class Config:
    _experts_implementation = "grouped_mm"


class Experts(nn.Module):
    def __init__(self, config, transposed):
        super().__init__()
        self.num_experts, self.act_fn = E, nn.functional.silu
        for name, shape in (("gate_up_proj", (2 * INNER, WIDTH)), ("down_proj", (WIDTH, INNER))):
            shape = shape[::-1] if transposed else shape
            setattr(self, name, nn.Parameter(torch.randn(E, *shape) / shape[-1] ** 0.5))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("the registry has a function of its own")


def experts(transposed=False, dtype=torch.bfloat16):
    kind = type("MyExperts", (Experts,), {"__init__": Experts.__init__, "forward": Experts.forward})
    torch.manual_seed(0)
    module = use_experts_implementation(kind, is_transposed=transposed)(Config(), transposed)
    return module.to("cuda", dtype)


def batch(dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator, device="cuda").to(dtype)
    scores = torch.rand(TOKENS, E, generator=generator, device="cuda")
    scores[:, -1] = -1  # no token goes to the last
    weights, chosen = scores.topk(K)
    return x, chosen, weights


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_sketches_are_those_of_the_dense_gradient(transposed, dtype, tolerance):
    module = experts(transposed, dtype)
    plain = copy.deepcopy(module)
    optimizer = MoFaSGD(module, rank=8, lr=2e-3)
    assert torch.equal(module(*batch(dtype)), plain(*batch(dtype))) or dtype == torch.float32
    for seed in range(2):
        for one in (module, plain):
            one(*batch(dtype, seed)).float().square().mean().mul(100).backward()
    for matrix, sketch in zip(optimizer.split.matrices, optimizer.matrices.captured):
        G = plain.get_parameter(matrix.name).grad.double()
        for got, wanted in ((sketch.Y, G @ sketch.V.double()), (sketch.Z, G.mT @ sketch.U.double())):
            assert (got - wanted).norm() < tolerance * wanted.norm()
        assert not sketch.Y[-1].any() and not sketch.Z[-1].any() and sketch.Y.flatten(1).any(1)[:-1].all()


@pytest.mark.parametrize("options", [{}, {"explore": 8}, {"master_weights": True}], ids=str)
def test_a_step_waits_for_nothing_and_an_expert_without_tokens_stays(options):
    module = experts()
    optimizer = MoFaSGD(module, rank=8, lr=2e-3, weight_decay=0.1, **options)
    before, waits = copy.deepcopy(module), []
    for step in range(5):
        x, chosen, weights = batch(seed=step)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                module(x, chosen, weights).float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append([str(w.message) for w in caught if "called a synchronizing" in str(w.message)])
    assert len(waits[-1]) <= 1, waits[-1]  # whether the norm is a number
    for name, param in module.named_parameters():
        same = (param == before.get_parameter(name)).flatten(1).all(1)
        assert same.tolist() == [False] * (E - 1) + [True]


def _eighths(*shape):
    """Numbers whose products and sums are exact, so that the order of a sum cannot matter."""
    return torch.randint(-4, 5, shape).float() / 8


@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("low, high", [(0, 5 * 70 * 48), (1000, 9000), (3360 * 2, 3360 * 4), (3, 3359)])
def test_the_write_of_a_part_of_a_stack_gives_the_bits_of_its_twin(low, high, masters):
    torch.manual_seed(0)
    count, m, n, r = 5, 70, 48, 8
    U, V = _eighths(count, m, r).bfloat16(), _eighths(count, n, r).bfloat16()
    coefficients = torch.ones(count, r, dtype=torch.bfloat16)
    coefficients[2] = 0
    W = (torch.randn(high - low) * 0.02).bfloat16()
    written = []
    for device in ("cpu", "cuda"):
        flat = W.to(device, copy=True)
        copies = 1.125 * flat.float() if masters else None
        shard = Shard(flat, low)
        for run in runs(low, flat.numel(), m * n, 0, count):
            some = slice(run.first, run.first + run.count)
            write_updates(
                [run.of(shard)],
                *(tensor[some].to(device) for tensor in (U, V, coefficients)),
                numbers=torch.arange(count)[some],
                step_size=2.0**-10,
                decay=0.75,
                rounding=Rounding(True, seed=3, step=2),
                masters=None if copies is None else [run.cut(copies)],
            )
        written.append((flat.cpu(), None if copies is None else copies.cpu()))
    assert torch.equal(written[0][0], written[1][0]) and not torch.equal(written[0][0], W)
    assert not masters or torch.equal(written[0][1], written[1][1])
