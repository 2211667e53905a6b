"""MoFaSGD with the ideas of :mod:`experiments.baselines.laboratory`, each off by default."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ds_mofa.kernels.random_bits import Rounding, rounding_key
from ds_mofa.linalg.factors import Factors, live_directions, resized, start_factors
from ds_mofa.options import AdjustLr, MoFaSGDRuleOptions
from ds_mofa.step.step import full_fp32
from experiments.baselines.laboratory.batch import Batch, Terms, keep_factors, masked_factors
from experiments.baselines.laboratory.exact import exact_steps
from experiments.baselines.laboratory.momentum import by_sketches
from experiments.baselines.laboratory.oracles import by_oracle
from experiments.baselines.laboratory.probes import observe_norm
from experiments.baselines.laboratory.ranks import allotted_ranks
from experiments.baselines.laboratory.scaling import balancing, row_scaled, size_of, softened, trusted
from experiments.baselines.laboratory.settings import (
    BalanceBy,
    ExploreBy,
    ExploreSides,
    Oracle,
    ProbeRule,
    RankRule,
    SecondMoment,
    Sides,
    check_settings,
    decay_of,
    largest_rank,
)
from experiments.baselines.matrix_method import MatrixMethod

__all__ = ["MoFaSGDLab"]


class MoFaSGDLab(MatrixMethod):
    """See :mod:`experiments.baselines.laboratory`.

    Args:
        params: param groups with ``lr`` and ``weight_decay``.
        rank: r.
        beta: decay of the momentum.
        adjust_lr_fn: f, as for :class:`ds_mofa.options.MoFaSGDRuleOptions`.
        seed: of the start's test matrices and of all other random columns.
        balance, balance_by, rank_scale, trust: what multiplies D.
        nesterov, update_rank, soft, second_moment, second_moment_power, second_moment_sides, explore, explore_scale,
            explore_by, explore_sides, explore_hold, exact: what D is made of.
        probes, probe_rule, probe_weight, rank_budget, rank_rule, shrink, beta_warmup, momentum_reset:
            what the momentum learns.
        beta2: decay of the second moments.
        oracle: not to be shipped.
    """

    def __init__(
        self,
        params,
        *,
        rank: int,
        beta: float = 0.85,
        adjust_lr_fn: AdjustLr = "match_rms_adamw",
        seed: int = 0,
        balance: float = 0.0,
        balance_by: BalanceBy = "momentum",
        rank_scale: float = 0.0,
        nesterov: bool = False,
        update_rank: float = 1.0,
        soft: float = 0.0,
        second_moment: SecondMoment = "none",
        second_moment_power: float = 1.0,
        second_moment_sides: Sides = "both",
        beta2: float = 0.95,
        explore: int = 0,
        explore_scale: float = 1.0,
        explore_by: ExploreBy = "gaussian",
        explore_sides: ExploreSides = "right",
        explore_hold: int = 1,
        exact: int = 0,
        trust: float = 0.0,
        probes: int = 0,
        probe_rule: ProbeRule = "range",
        probe_weight: float = 1.0,
        rank_budget: int = 0,
        rank_rule: RankRule = "gain",
        shrink: float = 0.0,
        beta_warmup: int = 0,
        momentum_reset: int = 0,
        oracle: Oracle = "none",
    ):
        settings = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        check_settings(settings)
        self._options = MoFaSGDRuleOptions(adjust_lr_fn=adjust_lr_fn, beta=beta)
        super().__init__(params, **settings)

    def _move_all(self) -> None:
        with full_fp32():
            self._step(self.param_groups[0])

    def _step(self, s: dict[str, Any]) -> None:
        batches = self._batches()
        fresh = [batch for batch in batches if "U" not in batch.states[0] and s["oracle"] != "momentum"]
        known = [batch for batch in batches if batch not in fresh]
        moves = [self._first(batch, s) for batch in fresh]
        if known:
            moves += by_oracle(known, s) if s["oracle"] != "none" else by_sketches(known, s)
        batches = fresh + known
        for i, batch in enumerate(batches):
            moves[i] = row_scaled(batch, moves[i], s)
        if s["rank_budget"]:
            self._reallot(batches, s)
        if s["exact"]:
            moves = exact_steps(batches, moves, s)
        sizes = [size_of(batch, s) for batch in batches]
        factors = balancing(sizes, s["balance"]) if s["balance"] else [torch.ones_like(size) for size in sizes]
        if s["trust"]:
            factors = [factor * trust for factor, trust in zip(factors, trusted(batches, s["trust"]))]
        for batch, move, factor in zip(batches, moves, factors):
            self._write(batch, move, factor, s)

    def _batches(self) -> list[Batch]:
        members: dict[Any, list[nn.Parameter]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    members.setdefault((tuple(p.shape), p.dtype, state["step"]), []).append(p)
        return [
            Batch(params, [self.state[p] for p in params], [self._places[p][1] for p in params])
            for params in members.values()
        ]

    @staticmethod
    def _first(batch: Batch, s: dict[str, Any]) -> Terms:
        """The start of :class:`ds_mofa.step.step.MatrixStep`, from the same test matrices."""
        r, G = s["rank"], batch.G
        psi, omega = [], []
        for index in batch.indices:
            generator = torch.Generator().manual_seed(rounding_key(Rounding(False, s["seed"]), index))
            for draws, rows in ((psi, batch.shape[0]), (omega, batch.shape[1])):
                drawn = torch.randn(rows, r, generator=generator, dtype=torch.float32, device="cpu")
                draws.append(drawn / math.sqrt(r))
        psi, omega = (torch.stack(draws).to(G) for draws in (psi, omega))
        gamma = 1 - decay_of(s, batch.t)
        factors = start_factors(G @ omega, G.mT @ psi, psi, gamma=gamma)
        live = live_directions(factors.sigma)
        if s["rank_budget"]:
            cap = largest_rank(batch.shape, r)
            batch.put("rank", torch.full((len(G),), r, device=G.device))
            factors = masked_factors(resized(factors, cap), batch.get("rank"))
            batch.put("spectrum", factors.sigma)
        keep_factors(batch, factors)
        if s["probes"]:
            observe_norm(batch, G @ batch.gaussian(s["probes"], s["seed"], 0), s)
        U, sigma, V = factors
        return Terms(U[..., :r], softened(sigma[..., :r], live, s["soft"]), V[..., :r])

    def _reallot(self, batches: list[Batch], s: dict[str, Any]) -> None:
        if batches[0].t % s["rank_budget"]:
            return
        costs = [sum(batch.shape) + 1 for batch in batches]
        spectra = [batch.get("spectrum") for batch in batches]
        if s["rank_rule"] == "gain":
            values = [spectrum * self._options.shape_factor(*b.shape) for b, spectrum in zip(batches, spectra)]
        else:
            values = [(x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)).square() for x in spectra]
        for batch, ranks in zip(batches, allotted_ranks(values, costs, s["rank"])):
            batch.put("rank", ranks)
            keep_factors(batch, masked_factors(Factors(batch.get("U"), batch.get("sigma"), batch.get("V")), ranks))

    def _write(self, batch: Batch, move: Terms, factor: Tensor, s: dict[str, Any]) -> None:
        m, n = batch.shape
        scale = self._options.shape_factor(m, n) * (min(m, n) / s["rank"]) ** (s["rank_scale"] / 2)
        D = (move.U * (scale * factor.unsqueeze(-1) * move.coefficients).unsqueeze(-2)) @ move.V.mT
        for p, d in zip(batch.params, D.unbind()):
            group = self.param_groups[self._places[p][0]]
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(d, alpha=-group["lr"])
