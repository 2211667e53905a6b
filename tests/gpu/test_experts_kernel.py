"""The sketches of stacked experts against a loop over the experts in float64.

On a GPU, or under Triton's interpreter: TRITON_INTERPRET=1, where bfloat16 is left out (its ``tl.dot`` multiplies the bits).
"""

import os

import pytest
import torch

from ds_mofa.capture import products

_experts = pytest.importorskip("ds_mofa.kernels._experts", reason="needs Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"),
]

BFLOAT16 = pytest.param(
    torch.bfloat16, id="bf16", marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter has no bfloat16 product")
)
DTYPES = [BFLOAT16, pytest.param(torch.float16, id="fp16")]
ROUTINGS = {
    "one": [200],
    "few": [70, 0, 1, 64, 0, 300, 5, 0],
    "nobody": [0] * 8,
    "all on one": [0, 0, 0, 333, 0, 0, 0, 0],
    "many": [(7 * e * e) % 151 if e % 3 else 0 for e in range(128)],
}


class Problem:
    """Rows, factors and sketches of a stack; rows after the last expert's are NaN.

    Rows and factors are eighths: sums of their products are exact in fp32, so the products round as float64's do.
    """

    def __init__(self, counts, m, n, r, dtype, beyond=3):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randint(-4, 5, shape, generator=generator).float().to(DEVICE) / 8

        E, S = len(counts), sum(counts)
        self.counts = counts
        self.left, self.right = draw(S + beyond, m).to(dtype), draw(S + beyond, n).to(dtype)
        self.left[S:], self.right[S:] = float("nan"), float("nan")
        self.ends = torch.tensor(counts).cumsum(0).int().to(DEVICE)
        self.U, self.V = draw(E, m, r).to(dtype), draw(E, n, r).to(dtype)
        self.Y, self.Z = draw(E, m, r), draw(E, n, r)

    def launch(self):
        """The sketches that the kernel makes of these."""
        Y, Z = self.Y.clone(), self.Z.clone()
        _experts.launch(self.left, self.right, self.ends, self.U, self.V, Y, Z)
        return Y, Z

    def expected(self, shift=0):
        """The same in float64, the products rounded as the kernel's; ``shift``: with the factors of the next expert."""
        Y, Z = self.Y.double(), self.Z.double()
        U, V = (factor.roll(shift, 0).double() for factor in (self.U, self.V))
        first = 0
        for e, count in enumerate(self.counts):
            L, R = (rows[first : first + count].double() for rows in (self.left, self.right))
            Y[e] += L.mT @ (R @ V[e]).to(self.left.dtype).double()
            Z[e] += R.mT @ (L @ U[e]).to(self.left.dtype).double()
            first += count
        return Y, Z

    def check(self, got):
        """To the rounding of fp32 sums, for every expert; sums rounded to 16 bits would be 100 times as far."""
        for sketch, exact in zip(got, self.expected()):
            assert ((sketch - exact).norm(dim=(1, 2)) <= 1e-5 * exact.norm(dim=(1, 2))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("r", [4, 8, 12, 40, 72])
@pytest.mark.parametrize(("m", "n"), [(128, 256), (33, 150)])
def test_each_expert_is_sketched(m, n, r, routing, dtype):
    problem = Problem(ROUTINGS[routing], m, n, r, dtype)
    got = problem.launch()
    problem.check(got)
    for sketch, before in zip(got, (problem.Y, problem.Z)):
        for e, count in enumerate(problem.counts):
            assert torch.equal(sketch[e], before[e]) == (count == 0)
    if routing in ("few", "many"):
        assert all((a - b).norm() / b.norm() > 0.1 for a, b in zip(got, problem.expected(shift=1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r"), [(1, 513, 1), (512, 8, 130), (96, 96, 160), (2880, 720, 16)])
def test_any_width_and_rank(m, n, r, dtype):
    problem = Problem([130, 0, 67], m, n, r, dtype)
    problem.check(problem.launch())


@pytest.mark.parametrize("gathered", ["left", "right", "both"])
def test_rows_that_are_found_by_their_token(gathered):
    """The bits of sorted rows; a token stands once, and the rows beyond the last expert's name none that exists."""
    problem = Problem(ROUTINGS["few"], 72, 136, 8, torch.float16)
    rows, indices = {}, {}
    for side in ("left", "right"):
        of = torch.arange(len(problem.left), device=DEVICE).mul(7) % 41
        tokens = getattr(problem, side)[:41]
        setattr(problem, side, tokens[of])
        rows[side] = getattr(problem, side)
        if gathered in (side, "both"):
            of[-3:] = 10**9
            rows[side], indices[f"{side}_rows"] = tokens.clone(), of.int()
    expected = problem.launch()
    Y, Z = problem.Y.clone(), problem.Z.clone()
    _experts.launch(rows["left"], rows["right"], problem.ends, problem.U, problem.V, Y, Z, **indices)
    assert torch.equal(Y, expected[0]) and torch.equal(Z, expected[1])
    problem.check((Y, Z))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_that_begin_anywhere(dtype):
    """Factors and sketches are parts of larger buffers; what lies beside them stays."""
    problem = Problem(ROUTINGS["few"], 40, 24, 5, dtype)
    U, V = (_inside(factor) for factor in (problem.U, problem.V))
    Y, Z = (_inside(sketch) for sketch in (problem.Y, problem.Z))
    assert U.data_ptr() % 16 and Y.data_ptr() % 16
    _experts.launch(problem.left, problem.right, problem.ends, U, V, Y, Z)
    problem.check((Y, Z))
    for got in (Y, Z):
        whole = got._base
        assert whole[0] == 77 and (whole[1 + got.numel() :] == 77).all()


def _inside(tensor):
    """A copy of a tensor as a view into a larger one, from its second element."""
    whole = tensor.new_full((tensor.numel() + 9,), 77)
    view = whole[1 : 1 + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def test_an_expert_without_rows_keeps_every_bit():
    """A NaN's payload and the sign of a zero too, which adding zero would lose."""
    problem = Problem(ROUTINGS["few"], 40, 64, 8, torch.float16)
    problem.Y[1], problem.Z[1] = -0.0, -0.0
    problem.Y[4].view(torch.int32)[:] = 0x7FA12345
    for sketch, before in zip(problem.launch(), (problem.Y, problem.Z)):
        for e in (1, 4, 7):
            assert torch.equal(sketch[e].view(torch.int32), before[e].view(torch.int32))


def test_two_backwards_add_up_and_every_run_has_the_same_bits():
    problem = Problem(ROUTINGS["many"], 72, 200, 12, torch.float16)
    first, second = problem.launch(), problem.launch()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    once = problem.expected()
    problem.Y, problem.Z = first
    twice = problem.launch()
    problem.check(twice)
    assert all((a - b).norm() / b.norm() > 0.1 for a, b in zip(twice, once))


def test_no_rows_and_what_is_not_contiguous():
    problem = Problem([0, 0], 16, 16, 4, torch.float16, beyond=0)
    got = problem.launch()
    assert torch.equal(got[0], problem.Y) and torch.equal(got[1], problem.Z)
    problem.left = problem.left.new_zeros(16, 8).mT
    with pytest.raises(ValueError, match="contiguous"):
        problem.launch()


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(("dtype", "by_the_kernel"), [(torch.float16, True), (torch.float32, False)])
def test_the_capture_takes_the_kernel(dtype, by_the_kernel, side, monkeypatch):
    """For 16-bit rows, contiguous or not, sorted or found by number; others follow one another."""
    if INTERPRETED:
        monkeypatch.setattr(products, "triton_serves", lambda tensor: True)
    launched = []
    launch = _experts.launch
    monkeypatch.setattr(_experts, "launch", lambda *args, **rows: launched.append(launch(*args, **rows)))
    problem = Problem(ROUTINGS["few"], 40, 64, 8, dtype, beyond=0)
    Y, Z = problem.Y.clone(), problem.Z.clone()
    rows, numbers = {"left": problem.left.mT.contiguous().mT, "right": problem.right}, {}
    if side is not None:
        order = torch.randperm(len(problem.left), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        rows[side], numbers[f"{side}_rows"] = rows[side][order], order.argsort().int()
    products.add_grouped(Y, Z, rows["left"], rows["right"], problem.U, problem.V, problem.ends, **numbers)
    problem.check((Y, Z))
    assert bool(launched) == by_the_kernel


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_the_host_does_not_wait():
    problem = Problem(ROUTINGS["few"], 128, 256, 8, torch.bfloat16)
    problem.launch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_more_than_two_billion_numbers():
    """Rows and factors are addressed in 64 bits: the last expert's sketches, beyond 2^31 elements, are right."""
    m, n, rows = 16384, 64, 140_000
    if torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("needs 6 GB")
    last = Problem([100], m, n, 8, torch.bfloat16, beyond=0)
    left, right = (torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE) for width in (m, n))
    left[-100:], right[-100:] = last.left, last.right
    U, V, Y, Z = (torch.cat([torch.zeros_like(one), one]) for one in (last.U, last.V, last.Y, last.Z))
    ends = torch.tensor([rows - 100, rows], dtype=torch.int32, device=DEVICE)
    _experts.launch(left, right, ends, U, V, Y, Z)
    last.check((Y[1:], Z[1:]))
    assert not Y[0].any() and not Z[0].any()
