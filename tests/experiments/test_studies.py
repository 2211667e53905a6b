"""The studies: projections and spectra against dense formulas, and the command from a YAML to its page."""

import json

import pytest
import torch

from ds_mofa.linalg.factors import Factors
from experiments import study
from experiments.comparison.training import train
from experiments.studies import projection, spectrum, updates
from experiments.studies.energies import captured, directions_for, energies
from experiments.studies.projections import KINDS, Left, Mirrored, Refreshed, Tangent, TwoSided, first_factors
from experiments.studies.synthetic import DIRECTIONS, SHAPE, fixed_subspace, rotating_subspace, white_noise
from experiments.studies.trajectory import Trajectory, role, stacked
from launch.errors import UserError
from tests.experiments.comparisons import language_comparison, language_plan
from tests.reference import DenseMomentum

CPU = torch.device("cpu")
BETA = 0.85


def matrices(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def factors(count: int, m: int, n: int, r: int, seed: int = 0) -> Factors:
    return first_factors(matrices(count, m, n, seed=seed), r, BETA)


def norms(A: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(A)


@pytest.mark.parametrize("m, n, r", [(9, 14, 3), (14, 9, 4), (6, 6, 5), (5, 12, 5)])
def test_in_the_same_subspaces_the_tangent_residual_is_the_lowest_and_the_two_sided_the_highest(m, n, r):
    start, G = factors(20, m, n, r), matrices(20, m, n, seed=1)
    residual = {kind: norms(G - make(start).projected(G)) for kind, make in KINDS.items()}
    U, _, V = start
    outside = (torch.eye(m) - U @ U.mT) @ G @ (torch.eye(n) - V @ V.mT)
    torch.testing.assert_close(residual["tangent"], norms(outside), atol=1e-12, rtol=0)
    torch.testing.assert_close(residual["left"], norms(G - U @ U.mT @ G), atol=1e-12, rtol=0)
    torch.testing.assert_close(residual["right"], norms(G - G @ V @ V.mT), atol=1e-12, rtol=0)
    for side in ("left", "right"):
        assert (residual["tangent"] <= residual[side] + 1e-12).all()
        assert (residual["two-sided"] >= residual[side] - 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_is_one_and_its_parts_add_up(kind):
    way, G = KINDS[kind](factors(3, 8, 11, 4)), matrices(3, 8, 11, seed=1)
    once = way.projected(G)
    torch.testing.assert_close(way.projected(once), once)
    torch.testing.assert_close(norms(G) ** 2, norms(once) ** 2 + norms(G - once) ** 2)


def test_the_tangent_momentum_is_the_dense_reference():
    start = factors(1, 10, 7, 3)
    way, dense = Tangent(start), DenseMomentum((10, 7), 3, index=0)
    dense.M, dense.left, dense.right = way.dense()[0], start.U[0], start.V[0]
    for seed in range(1, 6):
        G = matrices(1, 10, 7, seed=seed)
        torch.testing.assert_close(way.projected(G)[0], dense.tangent(G[0]))
        way.move(G, BETA)
        dense.move(G[0], BETA)
        torch.testing.assert_close(way.dense()[0], dense.M)


@pytest.mark.parametrize("kind", ["left", "right", "two-sided"])
def test_one_sided_momenta_are_svds_of_what_they_add_up_and_never_leave_their_subspace(kind):
    """A rank-r SVD at each step, with the projection onto its own factors: what the classes spare themselves."""
    start = factors(2, 7, 9, 3)
    way, (U, sigma, V) = KINDS[kind](start), start
    M = U * sigma.unsqueeze(-2) @ V.mT
    for seed in range(1, 5):
        G = matrices(2, 7, 9, seed=seed)
        P, Q = U @ U.mT, V @ V.mT
        M = BETA * M + (1 - BETA) * {"left": P @ G, "right": G @ Q, "two-sided": P @ G @ Q}[kind]
        left, sigma, right = torch.linalg.svd(M)
        assert (sigma[:, 3:] < 1e-12).all(), "there is nothing to cut"
        U, V = left[..., :3], right[:, :3].mT
        way.move(G, BETA)
        torch.testing.assert_close(way.dense(), M)
        if kind != "right":
            torch.testing.assert_close(U @ U.mT, start.U @ start.U.mT)
        if kind != "left":
            torch.testing.assert_close(V @ V.mT, start.V @ start.V.mT)


def test_the_left_momentum_is_the_exact_one_seen_from_its_subspace():
    G = [matrices(2, 6, 8, seed=seed) for seed in range(5)]
    way, exact = Left(first_factors(G[0], 2, BETA)), (1 - BETA) * G[0]
    for gradient in G[1:]:
        way.move(gradient, BETA)
        exact = BETA * exact + (1 - BETA) * gradient
    torch.testing.assert_close(way.dense(), way.U @ way.U.mT @ exact)


def test_a_refreshed_subspace_is_that_of_the_gradient_and_keeps_what_momentum_it_can():
    way = Refreshed(factors(1, 6, 8, 2), every=3)
    for step in range(2, 8):
        before, U = way.dense(), way.U
        G = matrices(1, 6, 8, seed=step)
        way.move(G, BETA)
        if step in (4, 7):
            leading = torch.linalg.svd(G).U[..., :2]
            torch.testing.assert_close(way.U @ way.U.mT, leading @ leading.mT)
        else:
            assert way.U is U
        P = way.U @ way.U.mT
        torch.testing.assert_close(way.dense(), P @ (BETA * before + (1 - BETA) * G))


@pytest.mark.parametrize("shape, mirrored", [((6, 9), False), ((9, 6), True), ((6, 6), False)])
def test_the_shorter_side_is_refreshed(shape, mirrored):
    assert isinstance(KINDS["refreshed"](factors(1, *shape, 2)), Mirrored) is mirrored


@pytest.mark.parametrize("kind", KINDS)
def test_of_gradients_inside_the_first_one_s_span_nothing_is_lost(kind):
    A, B = matrices(2, 12, 3), matrices(2, 10, 3, seed=1)
    first = A @ B.mT
    way, exact = KINDS[kind](first_factors(first, 3, BETA)), (1 - BETA) * first
    for step in range(60):  # a refresh is among them, from a gradient of rank 1
        vectors = matrices(2, 3, 2, seed=step)
        G = A @ vectors[..., :1] @ vectors[..., 1:].mT @ B.mT
        if kind == "refreshed" and step >= 48:
            break
        assert (norms(G - way.projected(G)) < 1e-10 * norms(G)).all()
        way.move(G, BETA)
        exact = BETA * exact + (1 - BETA) * G
        torch.testing.assert_close(way.dense(), exact)


def test_energies_are_those_of_an_svd():
    M = matrices(3, 7, 12)
    M[1, :, 4:] = 0
    shares = energies(M.float())
    expected = torch.linalg.svdvals(M).square()
    torch.testing.assert_close(shares, expected / expected.sum(-1, keepdim=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(energies(M.mT), energies(M), atol=1e-12, rtol=0)
    held = captured(shares, [1, 4, 7, 64])
    torch.testing.assert_close(held[:, 2:], torch.ones(3, 2, dtype=torch.float64))
    assert held[1, 1].item() == pytest.approx(1) and (held.diff(dim=1) >= -1e-12).all()
    assert directions_for(torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]]), 0.8).tolist() == [2, 1]


def test_made_up_gradients_have_what_they_are_said_to_have():
    [first, second] = fixed_subspace(2, CPU, noise=0.0)
    assert first["matrix 0"].shape == SHAPE and not torch.equal(first["matrix 0"], first["matrix 1"])
    spread = energies(torch.cat([first["matrix 0"], second["matrix 0"]], dim=1))
    assert captured(spread, [DIRECTIONS]).item() == pytest.approx(1, abs=1e-6), "both are of the same column space"
    again = list(rotating_subspace(2, CPU, noise=0.0))
    torch.testing.assert_close(again[0]["matrix 0"], first["matrix 0"])
    moved = energies(torch.cat([step["matrix 0"] for step in again], dim=1))
    assert 1e-5 < 1 - captured(moved, [DIRECTIONS]).item() < 0.01


def test_of_white_noise_every_subspace_is_as_good_as_a_random_one():
    measured = projection.measure(white_noise(12, CPU), [8], BETA, every=4)["ranks"]["8"]
    residual = {kind: found["mean"] for kind, found in measured["residual"].items()}
    m, n = SHAPE
    assert measured["random"] == pytest.approx(((1 - 8 / m) * (1 - 8 / n)) ** 0.5, abs=1e-3)
    assert residual["tangent"] == pytest.approx(measured["random"], abs=0.01)
    assert residual["left"] == pytest.approx((1 - 8 / m) ** 0.5, abs=0.01)
    assert residual["two-sided"] == pytest.approx((1 - 8 / m * 8 / n) ** 0.5, abs=0.01)


def test_what_is_measured_is_what_the_formulas_say():
    gradients = [{"q_proj": matrices(6, 8, seed=s).float(), "v": matrices(6, 8, seed=90 + s).float()} for s in range(7)]
    measured = projection.measure(gradients, [2], BETA, every=3)
    assert measured["shapes"] == {"6 x 8": 2}
    found = measured["ranks"]["2"]
    batches = [stacked(step)["q_proj", "v"] for step in gradients]
    way, exact = TwoSided(first_factors(batches[0], 2, BETA)), (1 - BETA) * batches[0]
    residuals, errors = [], []
    for G in batches[1:]:
        residuals.append(norms(G - way.projected(G)) / norms(G))
        way.move(G, BETA)
        exact = BETA * exact + (1 - BETA) * G
        errors.append(norms(exact - way.dense()) / norms(exact))
    mean = torch.stack(residuals).mean(0)
    two_sided = found["residual"]["two-sided"]
    assert two_sided["mean"] == pytest.approx(mean.mean().item(), rel=1e-3)
    assert two_sided["by_role"] == pytest.approx({"q": mean[0].item(), "other": mean[1].item()}, rel=1e-3)
    assert [step for step, _ in two_sided["series"]] == [4, 7]
    series = [[3, errors[1].mean().item()], [6, errors[4].mean().item()]]
    assert found["momentum"]["two-sided"]["series"] == [pytest.approx(point, rel=1e-3) for point in series]
    assert found["excess"] < 1e-6 and found["same"]["tangent"] == found["residual"]["tangent"]
    assert all(found["momentum"]["best"]["mean"] <= other["mean"] for other in found["momentum"].values())


def test_the_observed_training_is_the_comparison_s_own(tmp_path):
    plan = language_plan(tmp_path)
    trajectory = Trajectory(plan.runs[0], plan.task, CPU)
    sizes = [sum(gradient.square().sum() for gradient in step.values()).item() for step in trajectory]
    row = train(plan.runs[0], plan.task, "cpu")
    assert torch.equal(torch.tensor(trajectory.losses), torch.tensor(row["train_loss"])), "the same fp32 numbers"
    assert trajectory.evaluate()["loss"] == row["evaluations"][-1]["loss"]
    assert all(0 < size <= 1.0001 for size in sizes), "clipped to a norm of 1"
    assert {role(name) for name in trajectory.matrices} == {"q", "k", "v", "o", "mlp in", "mlp out"}


def test_roles_of_an_encoder():
    names = {
        "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
        "attention.output.dense": "o", "intermediate.dense": "mlp in", "output.dense": "mlp out",
    }  # fmt: skip
    for name, expected in names.items():
        assert role(f"bert.encoder.layer.0.{name}.weight") == expected
    assert role("bert.pooler.dense.weight") == "other"


def test_the_observed_momentum_is_the_exact_average():
    gradients = [{"o_proj": matrices(6, 9, seed=s)} for s in range(4)]

    class Recorded(list):
        evaluate = staticmethod(lambda: {"loss": 1.0})

    observed = spectrum.observe(Recorded(gradients), [0.5], [2, 6], every=2)
    M = torch.zeros(6, 9, dtype=torch.float64)
    for step, gradient in enumerate(gradients, start=1):
        M = 0.5 * M + 0.5 * gradient["o_proj"]
        if step % 2 == 0:
            squares = torch.linalg.svdvals(M).square()
            look = observed["betas"]["0.5"][step // 2 - 1]
            assert look["step"] == step
            assert look["share"] == [pytest.approx([(squares[:2].sum() / squares.sum()).item(), 1], abs=1e-4)]
    assert observed["matrices"][0]["role"] == "o" and observed["matrices"][0]["shape"] == [6, 9]


def test_an_update_of_adamw_is_measured_as_torch_makes_it():
    """Of what torch's AdamW moves a weight by, over lr; a matrix whose sides differ, and one that is nearly of rank 1."""
    torch.manual_seed(0)
    wide = [torch.randn(5, 12) for _ in range(6)]
    flat = [torch.outer(torch.ones(4), torch.ones(4)) * (1 + step) for step in range(6)]
    params = [torch.nn.Parameter(torch.zeros(5, 12)), torch.nn.Parameter(torch.zeros(4, 4))]
    adamw = torch.optim.AdamW(params, lr=1.0, weight_decay=0.0)
    wanted = []
    for step, gradients in enumerate(zip(wide, flat), start=1):
        before = [param.detach().clone() for param in params]
        for param, gradient in zip(params, gradients):
            param.grad = gradient.clone()
        adamw.step()
        if step % 2 == 0:
            wanted.append([(old - param.detach()).double() for old, param in zip(before, params)])
    sequence = ({"wide": one, "flat": other} for one, other in zip(wide, flat))
    measured = updates.measure(sequence, [1, 5], every=2)
    assert [step for step, *_ in measured["series"]] == [2, 4, 6]
    for index, (shape, side) in enumerate((("5 x 12", 12), ("4 x 4", 4))):
        moves = [moved[index] for moved in wanted]
        rms = torch.stack([moved.square().mean().sqrt() for moved in moves]).mean().item()
        first = torch.stack([torch.linalg.matrix_norm(moved, 2) for moved in moves]).mean().item() / side**0.5
        assert measured["shapes"][shape]["rms"] == pytest.approx(rms, rel=1e-3)
        assert measured["shapes"][shape]["singular"][0] == pytest.approx(first, rel=1e-3)
    assert measured["shapes"]["4 x 4"]["singular"][1] is None, "it has four"
    assert measured["shapes"]["4 x 4"]["singular"][0] == pytest.approx(2 * measured["shapes"]["4 x 4"]["rms"], rel=1e-3)


OPTIMIZERS = {
    "trainer": {"optimizer": "AdamW", "lr": 1e-3},
    "MoFaSGD": {"rank": [2, 4], "lr": [1e-3, 2e-3]},
    "Muon": {"momentum": 0.85, "lr": 6e-3},
}


def test_the_command_writes_what_it_has_measured(tmp_path):
    path = language_comparison(tmp_path, optimizers=OPTIMIZERS, seeds=[0])
    out = tmp_path / "out"
    small = [str(path), "--steps", "3", "--every", "1", "--device", "cpu", "--output_dir", str(out)]
    study.main(["projection", *small, "--ranks", "4", "--synthetic_steps", "3"])
    study.main(["spectrum", *small, "--tops", "2", "8"])
    for name, figures in (("projection", ("residual", "momentum")), ("spectrum", ("energy", "cost_tiny"))):
        page, text = (out / f"{name}.md").read_text(), (out / f"{name}.json").read_text()
        assert (
            f"python experiments/study.py {name} path/to/tiny.yaml --steps 3" in page
            and "3 steps of 2 examples" in page
        )
        assert str(tmp_path) not in page + text, "a path of this machine"
        for figure in figures:
            assert (out / f"{name}_{figure}.png").read_bytes().startswith(b"\x89PNG")
            assert f"]({name}_{figure}.png)" in page
    measured = json.loads((out / "projection.json").read_text())["sequences"]
    assert set(measured) == {"fixed subspace", "rotating subspace", "white noise", "tiny"}
    assert set(measured["tiny"]["ranks"]["4"]["residual"]["left"]["by_role"]) == {
        "q",
        "k",
        "v",
        "o",
        "mlp in",
        "mlp out",
    }
    study.main(["updates", *small, "--tops", "1", "4"])
    assert "| all matrices |" in (out / "updates.md").read_text()
    study.main(["page", str(out / "spectrum.json")])
    assert (out / "spectrum.md").read_text() == page
    result = json.loads((out / "spectrum.json").read_text())
    assert result["tasks"]["tiny"]["tops"] == [2, 4, 8], "the ranks that are trained with, too"
    points = {(point["label"], point["rank"]): point for point in result["costs"]["tiny"]}
    assert list(points) == [("MoFaSGD", 2), ("MoFaSGD", 4), ("Muon", None)]
    assert points["MoFaSGD", 2]["captured"] < points["MoFaSGD", 4]["captured"] <= points["Muon", None]["captured"] == 1
    assert points["MoFaSGD", 4]["loss"][points["MoFaSGD", 4]["best"]] == min(points["MoFaSGD", 4]["loss"].values())


def test_a_run_that_diverged_is_not_the_best_of_its_rank(tmp_path, monkeypatch):
    plan = language_plan(tmp_path, optimizers=OPTIMIZERS, seeds=[0])

    def trained(run, task, device):
        diverged = run.setting.options["lr"] > 0.0015 or run.setting.label == "Muon"
        return {"diverged_at": 3 if diverged else None, "evaluations": [{"loss": 2.0}]}

    monkeypatch.setattr(spectrum, "train", trained)
    observed = {"tops": [2, 4], "betas": {"0.85": [{"share": [[0.5, 1.0], [0.7, 1.0]]}]}}
    low, high, full = spectrum.costs(plan, "cpu", observed, lambda text: None)
    assert low["captured"] == pytest.approx(0.6) and low["best"] == "0.001" and low["loss"]["0.002"] is None
    assert high["captured"] == 1.0 and full["best"] is None


def test_what_cannot_be_studied_is_said(tmp_path):
    path = str(language_comparison(tmp_path, seeds=[0]))
    with pytest.raises(UserError, match="--ranks: 99 is more than tiny has: its smallest matrix side is 16"):
        study.main(["projection", path, "--ranks", "99", "--every", "2", "--device", "cpu"])
    with pytest.raises(UserError, match="--every: 5 is more than the 4 steps"):
        study.main(["projection", path, "--device", "cpu"])
    with pytest.raises(UserError, match="no PLAN is called 'sst2'"):
        study.main(["spectrum", path, "--data_dir", f"sst2={tmp_path}", "--device", "cpu"])
    with pytest.raises(SystemExit):
        study.main(["spectrum", path, "--data_dir", "sst2"])
    with pytest.raises(SystemExit):
        study.main(["spectrum", path, "--steps", "0"])
