"""MoFaSGD's laboratory: MoFaSGD with one more idea at a time, on gradients that are at hand in one process.

Each option is off by default, and with all of them off this is :class:`ds_mofa.MoFaSGD` on fp32 weights. None needs
more of the gradient G (m x n) than sketches that are linear in it, so each could be shipped under ZeRO without G ever
being stored; the oracles alone are not of that kind, and are there to say what an idea could gain at most.

U, sigma, V are the momentum's factors of rank r, Y = G V, Z = G^T U, A = U^T Y, and with [U Q_U], [V Q_V] the bases of
:mod:`ds_mofa.factors`, in their coordinates

    M = [[diag(sigma), 0], [0, 0]]      T = [[A, Z^T Q_V], [Q_U^T Y, N]]      the momentum, the gradient (N = 0)
    K = beta M + gamma T                M' = SVD_r(K) = P diag(sigma') Q^T    gamma = 1 - beta
    D = sum_j c_j u_j v_j^T             W <- (1 - lr wd) W - lr f(m, n) D     u_j, v_j, s_j: SVD of L

where plainly L = M' and c_j = 1 (0 where s_j = 0). Prices are beyond MoFaSGD's r (m + n + 1) numbers a matrix.

*What multiplies D*, one number a matrix:

balance = p: D <- D (b / b_i)^p, b_i = |sigma'| of this matrix, b the geometric mean of all matrices that move.
    Price: one number a matrix known to all ranks.
balance_by = "gradient": b_i^2 = the average (decay ``beta2``, debiased) of |G Omega|^2 / k, an unbiased estimate of
    |G|^2 from the k = ``probes`` columns; Adam's second moment, one for a matrix. Price: that of the probes.
rank_scale = p: D <- D (min(m, n) / r)^(p / 2), p = 1: |D| is that of a full-rank Muon. Price: none.

*What D is made of*:

nesterov: L = beta M' + gamma T. Price: none (another SVD of the core).
update_rank = c: the leading c r directions of L (without nesterov, of K). c < 1: r is oversampled by 1 / c; c = 2: all
    that the core knows. Price for c > 1: working copies of rank c r.
soft = q: c_j = s_j^q, scaled to |c| = sqrt(how many s_j > 0). q = -1 is the paper's code, q = 1 the momentum itself.
    Price: none.
second_moment = "gradient": x (m), z (n) = the averages (decay ``beta2``, debiased) of the squared row norms of Y and Z;
    D <- diag(x)^(-w/2) D diag(z)^(-w/2), scaled back to its norm, w = ``second_moment_power``: with w = 1 Adafactor's
    second moment. "update": the same with the squared row and column norms of U V^T, which U and V hold; with
    ``second_moment_sides`` = "rows" and w = 1 that is NorMuon's (2510.05491). A row's factor is at most 100 times the
    mean row's. Price: m + n numbers ("rows": m, "columns": n), with the owner.
explore = k: D <- D + explore_scale polar(H) E^T, H = (1 - U U^T) G E, E (n x k) = orth((1 - V V^T) Omega), Omega
    Gaussian, new in each step: directions without momentum that nobody chose. Price: k columns in Y and in what is
    gathered; Omega comes from the seed, and E is there during backward. explore_by = "coordinates": E is k columns of
    the unit matrix, H = (1 - U U^T) G (1 - V V^T) E: D moves k columns of W, and instead of E there are k numbers.
    "signs": the same with E of random signs / sqrt(n), which need neither V nor a decomposition to be drawn.
    explore_sides = "both": besides, explore_scale F polar(J)^T, J = (1 - V V^T) G^T (1 - U U^T) F, F (m x k) as E.
    Price: k columns in Z too.

*What the momentum learns*:

probes = k, probe_rule = "range": G_perp = (1 - U U^T) G (1 - V V^T), of which Theorem 4.3 keeps nothing, is estimated
    by one pass of the randomised SVD, H = G_perp Omega (m x k), J = G_perp^T Psi (n x 2 k + 1), B = orth(H),
    G_perp ~ B (Psi^T B)^+ J^T; ``probe_weight`` times that is added to T. Price: k columns in Y, 2 k + 1 in Z.
    "random": instead N = G_perp E E^T, exact on random directions E as above. Price: k columns in Y. With
    probe_weight = 0 the probes only measure.
rank_budget = k: each k steps the ranks r_i of all matrices are chosen anew within the same sum of r_i (m_i + n_i + 1):
    the directions that are worth most for what they cost, f_i s_ij / (m_i + n_i + 1) (rank_rule "gain": what U V^T
    lowers the loss by in first order is the sum of the s_ij) or (s_ij / |s_i|)^2 / (m_i + n_i + 1) ("share"), s_i being
    the averaged spectrum (decay 0.9) of K. r / 2 <= r_i <= 2 r. Price: one spectrum of 2 r numbers a matrix known to
    all ranks each k steps, and buffers laid out anew. Here buffers of 2 r columns are kept, zero beyond r_i.
shrink = c: sigma_j <- sigma_j - c s_(r + 1) in what is kept, s the spectrum of K: what Frequent Directions (1501.01711,
    with squares) does so that old directions do not keep new ones out for ever. U V^T is the same, but for c = 1 where
    two are equal. Price: none.
beta_warmup = k: beta_t = beta min(1, t / k).  momentum_reset = k: each k steps sigma <- 0, U and V stay. Price: none.

*Oracles*: "gradient": K = beta U sigma V^T + gamma G with all of G, what the tangent space loses. "momentum": a whole
momentum m x n, of which D has the r leading directions, what the rank alone loses.

Kept per m x n matrix: 4 r (m + n + 1) bytes, and what an option adds.
"""

import math
from collections.abc import Generator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ds_mofa.batching import together
from ds_mofa.factors import Factors, leading_svd, live_directions, resized, start_factors
from ds_mofa.options import AdjustLr, OptionError, Options, check_integer, check_number
from ds_mofa.orthonormal import Basis, Side, complements
from ds_mofa.step import full_fp32
from ds_mofa.weights import Rounding, rounding_key
from experiments.baselines.matrix_method import MatrixMethod
from experiments.baselines.randomness import keyed_generator

__all__ = ["MoFaSGDLab", "allotted_ranks", "range_estimate", "softened"]

BalanceBy = Literal["momentum", "gradient"]
ProbeRule = Literal["range", "random"]
RankRule = Literal["gain", "share"]
SecondMoment = Literal["none", "gradient", "update"]
ExploreBy = Literal["gaussian", "coordinates", "signs"]
ExploreSides = Literal["right", "both"]
Sides = Literal["both", "rows", "columns"]
Oracle = Literal["none", "gradient", "momentum"]

_SMALLEST_ROW = 1e-2  # rms of a row against the mean row's, below which it is not scaled further
_SPECTRUM_DECAY = 0.9


class Terms(NamedTuple):
    """A matrix as sum_j coefficients_j U_j V_j^T: U (B, m, k), coefficients (B, k), V (B, n, k)."""

    U: Tensor
    coefficients: Tensor
    V: Tensor


class _Batch:
    """All matrices of one shape that move in this step, stacked."""

    def __init__(self, params: list[nn.Parameter], states: list[dict[str, Any]], indices: list[int]):
        self.params, self.states, self.indices = params, states, indices
        exact = torch.promote_types(params[0].dtype, torch.float32)
        self.G = torch.stack([p.grad for p in params]).to(exact)  # (B, m, n)
        self.t: int = states[0]["step"]
        self.shape: tuple[int, int] = tuple(params[0].shape)

    def get(self, key: str) -> Tensor:
        return torch.stack([state[key] for state in self.states])

    def put(self, key: str, value: Tensor) -> None:
        for state, part in zip(self.states, value.unbind()):
            state[key] = part

    def averaged(self, key: str, value: Tensor, decay: float) -> Tensor:
        """The debiased average over the steps of ``value``, kept under ``key``."""
        old = self.get(key) if key in self.states[0] else torch.zeros_like(value)
        new = decay * old + (1 - decay) * value
        self.put(key, new)
        return new / (1 - decay**self.t)

    def gaussian(self, columns: int, seed: int, stream: int) -> Tensor:
        """(B, n, columns) for stream 0, (B, m, columns) for stream 1; of each matrix's own in each step."""
        rows = self.shape[1 - stream]
        draws = [
            torch.randn(
                rows,
                columns,
                generator=keyed_generator(seed + stream, self.t, index, self.G.device),
                device=self.G.device,
                dtype=self.G.dtype,
            )
            for index in self.indices
        ]
        return torch.stack(draws)


class MoFaSGDLab(MatrixMethod):
    """See :mod:`experiments.baselines.mofasgd_lab`.

    Args:
        params: param groups with ``lr`` and ``weight_decay``.
        rank: r.
        beta: decay of the momentum.
        adjust_lr_fn: f, as for :class:`ds_mofa.options.Options`.
        seed: of the start's test matrices and of all other random columns.
        balance, balance_by, rank_scale: what multiplies D.
        nesterov, update_rank, soft, second_moment, second_moment_power, second_moment_sides, explore, explore_scale,
            explore_by, explore_sides: what D is made of.
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
        _check(settings)
        self._options = Options(adjust_lr_fn=adjust_lr_fn, beta=beta)
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
            moves += _by_oracle(known, s) if s["oracle"] != "none" else _by_sketches(known, s)
        batches = fresh + known
        for i, batch in enumerate(batches):
            moves[i] = _row_scaled(batch, moves[i], s)
        if s["rank_budget"]:
            self._reallot(batches, s)
        sizes = [_size(batch, s) for batch in batches]
        factors = balancing(sizes, s["balance"]) if s["balance"] else [torch.ones_like(size) for size in sizes]
        for batch, move, factor in zip(batches, moves, factors):
            self._write(batch, move, factor, s)

    def _batches(self) -> list[_Batch]:
        members: dict[Any, list[nn.Parameter]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    members.setdefault((tuple(p.shape), p.dtype, state["step"]), []).append(p)
        return [
            _Batch(params, [self.state[p] for p in params], [self._places[p][1] for p in params])
            for params in members.values()
        ]

    @staticmethod
    def _first(batch: _Batch, s: dict[str, Any]) -> Terms:
        """The start of :class:`ds_mofa.step.MatrixStep`, from the same test matrices."""
        r, G = s["rank"], batch.G
        psi, omega = [], []
        for index in batch.indices:
            generator = torch.Generator().manual_seed(rounding_key(Rounding(False, s["seed"]), index))
            for draws, rows in ((psi, batch.shape[0]), (omega, batch.shape[1])):
                drawn = torch.randn(rows, r, generator=generator, dtype=torch.float32, device="cpu")
                draws.append(drawn / math.sqrt(r))
        psi, omega = (torch.stack(draws).to(G) for draws in (psi, omega))
        gamma = 1 - _beta(s, batch.t)
        factors = start_factors(G @ omega, G.mT @ psi, psi, gamma=gamma)
        live = live_directions(factors.sigma)
        if s["rank_budget"]:
            cap = _cap(batch.shape, r)
            batch.put("rank", torch.full((len(G),), r, device=G.device))
            factors = _masked(resized(factors, cap), batch.get("rank"))
            batch.put("spectrum", factors.sigma)
        _keep(batch, factors)
        if s["probes"]:
            _observe(batch, G @ batch.gaussian(s["probes"], s["seed"], 0), s)
        U, sigma, V = factors
        return Terms(U[..., :r], softened(sigma[..., :r], live, s["soft"]), V[..., :r])

    def _reallot(self, batches: list[_Batch], s: dict[str, Any]) -> None:
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
            _keep(batch, _masked(Factors(batch.get("U"), batch.get("sigma"), batch.get("V")), ranks))

    def _write(self, batch: _Batch, move: Terms, factor: Tensor, s: dict[str, Any]) -> None:
        m, n = batch.shape
        scale = self._options.shape_factor(m, n) * (min(m, n) / s["rank"]) ** (s["rank_scale"] / 2)
        D = (move.U * (scale * factor.unsqueeze(-1) * move.coefficients).unsqueeze(-2)) @ move.V.mT
        for p, d in zip(batch.params, D.unbind()):
            group = self.param_groups[self._places[p][0]]
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(d, alpha=-group["lr"])


# ---------------------------------------------------------------------- the momentum and its direction


def _by_sketches(batches: list[_Batch], s: dict[str, Any]) -> list[Terms]:
    old, wide, sides = [], [], []
    for batch in batches:
        U, sigma, V = (batch.get(key) for key in ("U", "sigma", "V"))
        if s["momentum_reset"] and (batch.t - 1) % s["momentum_reset"] == 0:
            sigma = torch.zeros_like(sigma)
        old.append(Factors(U, sigma, V))
        Y, Z = batch.G @ V, batch.G.mT @ U
        H, J, W = _probed(batch, old[-1], s)
        wide.append((Y, Z, H, J, W))
        sides += [Side(U, torch.cat([Y, H], dim=-1)), Side(V, torch.cat([Z, J], dim=-1))]
    bases = complements(sides)
    works = []
    for batch, factors, sketches, left, right in zip(batches, old, wide, bases[::2], bases[1::2]):
        _observe_rows(batch, sketches[0], sketches[1], s)
        works.append(_turned(batch, factors, sketches, left, right, s))
    return _with_svds(works)


SVDs = Generator[tuple[Tensor, int], tuple[Tensor, Tensor, Tensor], Terms]


def _with_svds(works: list[SVDs]) -> list[Terms]:
    """What each returns, given the leading singular triplets that it asks for; on a GPU few calls count, so all are
    served at once. They ask equally often.
    """
    results = []
    answers: list[Any] = [None] * len(works)
    while len(results) < len(works):
        asked = []
        for work, answer in zip(works, answers):
            try:
                asked.append(work.send(answer))
            except StopIteration as done:
                results.append(done.value)
        if asked:
            answers = together([K for K, _ in asked], leading_svd, [r for _, r in asked])
    return results


def _turned(
    batch: _Batch, old: Factors, sketches: tuple[Tensor, ...], left: Basis, right: Basis, s: dict[str, Any]
) -> SVDs:
    """Move the factors of ``batch``; the terms of its direction. Asks for SVDs."""
    (U, sigma, V), (Y, _, H, J, W) = old, sketches
    c, beta = sigma.shape[-1], _beta(s, batch.t)
    gamma = 1 - beta
    T = _core(U, Y, left, right, c)
    if H.shape[-1]:
        missed = _missed(H, J, W, left.R[..., c:], right.R[..., c:], s)
        T[..., c:, c:] += s["probe_weight"] * missed
    M = torch.zeros_like(T)
    M[..., :c, :c] = torch.diag_embed(sigma)
    K = beta * M + gamma * T
    wanted = c
    if s["shrink"] or (s["update_rank"] > 1 and not s["nesterov"]):
        wanted = min(K.shape[-2:])
    P, spectrum, Q = yield K, wanted
    still = (spectrum[..., :1] == 0).unsqueeze(-1)  # any orthonormal P and Q diagonalise a zero core
    new = Factors(
        torch.where(still, U, left.turned(P[..., :c])),
        spectrum[..., :c],
        torch.where(still, V, right.turned(Q[..., :c])),
    )
    whole = new
    if s["shrink"] and wanted > c:
        new = new._replace(sigma=(new.sigma - s["shrink"] * spectrum[..., c : c + 1]).clamp_min(0))
    ranks = None
    if s["rank_budget"]:
        ranks = batch.get("rank")
        old_spectrum = batch.get("spectrum")
        batch.put("spectrum", _SPECTRUM_DECAY * old_spectrum + (1 - _SPECTRUM_DECAY) * new.sigma)
        new = _masked(new, ranks)
    _keep(batch, new)

    count = _count(s, batch.shape)
    if s["nesterov"]:
        kept = P[..., :c] * new.sigma.unsqueeze(-2) @ Q[..., :c].mT
        P, spectrum, Q = yield beta * kept.to(T.dtype) + gamma * T, min(count, *K.shape[-2:])
    if s["nesterov"] or count > c:
        chosen = P[..., :count], spectrum[..., :count], Q[..., :count]
        move = Terms(left.turned(chosen[0]), chosen[1], right.turned(chosen[2]))
        live = live_directions(move.coefficients)
        if ranks is not None:
            live = live * (torch.arange(live.shape[-1], device=live.device) < ranks.unsqueeze(-1))
    else:
        move = Terms(*(new if ranks is not None else whole))
        live = live_directions(move.coefficients)
        if count < c and ranks is None:  # oversampled
            move, live = Terms(*(part[..., :count] for part in move)), live[..., :count]
    move = Terms(move.U, softened(move.coefficients, live, s["soft"]), move.V)
    return (yield from _explored(batch, old, move, s))


def _core(U: Tensor, Y: Tensor, left: Basis, right: Basis, c: int) -> Tensor:
    """The tangent projection of G in the coordinates of the two bases, (B, c + k_U, c + k_V)."""
    A = (U.double().mT @ Y.double()).to(Y.dtype)
    R_U, R_V = left.R[..., :c].to(Y.dtype), right.R[..., :c].to(Y.dtype)
    corner = A.new_zeros(len(A), R_U.shape[-2], R_V.shape[-2])
    return torch.cat([torch.cat([A, R_V.mT], dim=-1), torch.cat([R_U, corner], dim=-1)], dim=-2)


def _probed(batch: _Batch, old: Factors, s: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """H (B, m, k), J and, for the rule "range", Psi^T H (B, 2 k + 1, k); all of G_perp. For "random" J is E."""
    G, (U, _, V), k = batch.G, old, s["probes"]
    if not k:
        return G[..., :0], G.mT[..., :0], None
    omega = batch.gaussian(k, s["seed"], 0)
    seen = G @ omega
    _observe(batch, seen, s)
    if s["probe_weight"] == 0:
        return G[..., :0], G.mT[..., :0], None
    if s["probe_rule"] == "random":
        E = _orthonormal_beside(V, omega)
        return _beside(U, G @ E), E, None
    psi = batch.gaussian(2 * k + 1, s["seed"], 1)
    # (1 - U U^T) (G Omega - Y V^T Omega), so that what was sketched is G Omega alone; likewise G^T Psi.
    H = _beside(U, seen - (G @ V) @ (V.mT @ omega))
    J = _beside(V, G.mT @ psi - (G.mT @ U) @ (U.mT @ psi))
    return H, J, psi.mT @ H


def _missed(H: Tensor, J: Tensor, W: Tensor | None, H_Q: Tensor, J_Q: Tensor, s: dict[str, Any]) -> Tensor:
    """N, (B, k_U, k_V): the estimate of G_perp between Q_U and Q_V, from H and J in their coordinates."""
    H_Q, J_Q = H_Q.to(H.dtype), J_Q.to(J.dtype)
    return H_Q @ J_Q.mT if W is None else range_estimate(H_Q, J_Q, W)


def range_estimate(H: Tensor, J: Tensor, W: Tensor) -> Tensor:
    """H W^+ J^T ~ G, from H = G Omega, J = G^T Psi and W = Psi^T G Omega; exact where G has rank <= columns of Omega.

    It is B (Psi^T B)^+ J^T with B = orth(H), and does not depend on which basis of span H stands in B's place.
    """
    # W^+ through its Gram matrix, in float64: no decomposition that would wait for the device.
    W = W.double()
    gram = W.mT @ W
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    size = torch.where(size > 0, size, 1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    L = torch.linalg.cholesky_ex(gram / size + 1e-10 * eye).L
    X = torch.cholesky_solve(W.mT @ J.double().mT / size, L)
    return (H.double() @ X).to(H.dtype)


def _explored(batch: _Batch, old: Factors, move: Terms, s: dict[str, Any]) -> SVDs:
    if not s["explore"]:
        return move
    G, terms = batch.G, [move]
    for side, (near, far) in enumerate([(old.U, old.V), (old.V, old.U)][: 1 + (s["explore_sides"] == "both")]):
        E = _test_columns(batch, far, side, s)
        H = _beside(near, (G.mT if side else G) @ (E if s["explore_by"] == "gaussian" else _beside(far, E)))
        P, coefficients, Q = yield from _polar(H, s["explore_scale"])
        outer = (E.double() @ Q).to(E.dtype)
        terms.append(Terms(outer, coefficients, P) if side else Terms(P, coefficients, outer))
    return Terms(*(torch.cat(parts, dim=-1) for parts in zip(*terms)))


def _polar(H: Tensor, scale: float) -> Generator[tuple[Tensor, int], tuple[Tensor, Tensor, Tensor], Terms]:
    """P, c, Q with scale polar(H) = P diag(c) Q^T."""
    [basis] = complements([Side(H[..., :0], H)])
    P, sigma, Q = yield basis.R.to(H.dtype), min(H.shape[-1], *basis.R.shape[-2:])
    return Terms(basis.turned(P), scale * live_directions(sigma), Q)


def _test_columns(batch: _Batch, V: Tensor, stream: int, s: dict[str, Any]) -> Tensor:
    """E (stream 0) or F: k columns to explore along, (B, n or m, k)."""
    k, seed, rows = s["explore"], s["seed"] + 2, V.shape[-2]
    if s["explore_by"] == "coordinates":
        chosen = batch.gaussian(1, seed, stream).squeeze(-1).argsort(-1)[:, :k]
        return torch.nn.functional.one_hot(chosen, rows).mT.to(batch.G)
    draw = batch.gaussian(k, seed, stream)
    return draw.sign() / math.sqrt(rows) if s["explore_by"] == "signs" else _orthonormal_beside(V, draw)


def _by_oracle(batches: list[_Batch], s: dict[str, Any]) -> list[Terms]:
    moves = []
    for batch in batches:
        beta = _beta(s, batch.t)
        if s["oracle"] == "momentum":
            old = batch.get("M") if "M" in batch.states[0] else torch.zeros_like(batch.G)
        else:
            U, sigma, V = (batch.get(key) for key in ("U", "sigma", "V"))
            old = U * sigma.unsqueeze(-2) @ V.mT
        M = beta * old + (1 - beta) * batch.G
        count = _count(s, batch.shape)
        leading = _dense_leading(M, max(count, s["rank"]))
        if s["oracle"] == "momentum":
            batch.put("M", M)
            batch.put("sigma", leading.sigma[..., : s["rank"]])
        else:
            _keep(batch, Factors(*(part[..., : s["rank"]] for part in leading)))
        if s["nesterov"]:
            leading = _dense_leading(beta * M + (1 - beta) * batch.G, count)
        U, sigma, V = (part[..., :count] for part in leading)
        moves.append(Terms(U, softened(sigma, live_directions(sigma), s["soft"]), V))
    return moves


def _dense_leading(M: Tensor, r: int) -> Factors:
    """The r leading singular triplets of M (B, m, n), through the smaller Gram matrix."""
    given, M = M.dtype, M.double()
    tall = M.shape[-2] > M.shape[-1]
    X = M.mT if tall else M
    values, vectors = torch.linalg.eigh(X @ X.mT)
    near = vectors[..., -r:].flip(-1)
    sigma = values[..., -r:].flip(-1).clamp_min(0).sqrt()
    sigma = torch.where(sigma > 1e-6 * sigma[..., :1], sigma, 0)
    far = X.mT @ near / torch.where(sigma > 0, sigma, 1).unsqueeze(-2)
    U, V = (far, near) if tall else (near, far)
    return Factors(U.to(given), sigma.to(given), V.to(given))


# ---------------------------------------------------------------------- what is measured, and what is scaled by it


def _observe(batch: _Batch, seen: Tensor, s: dict[str, Any]) -> None:
    """Take |G Omega|^2 / k into the average of |G|^2."""
    if s["balance_by"] == "gradient":
        batch.averaged("square", seen.square().sum((-2, -1)) / seen.shape[-1], s["beta2"])


def _observe_rows(batch: _Batch, Y: Tensor, Z: Tensor, s: dict[str, Any]) -> None:
    if s["second_moment"] == "gradient":
        for key, side in (("rows", Y), ("columns", Z)):
            if s["second_moment_sides"] in ("both", key):
                _average_rows(batch, key, side.square().sum(-1), s)


def _average_rows(batch: _Batch, key: str, squares: Tensor, s: dict[str, Any]) -> None:
    old = batch.get(key) if key in batch.states[0] else squares  # the first is no average with zero
    batch.put(key, s["beta2"] * old + (1 - s["beta2"]) * squares)


def _row_scaled(batch: _Batch, move: Terms, s: dict[str, Any]) -> Terms:
    """D with the second moments of its rows and columns taken out, and the norm that it had."""
    if s["second_moment"] == "none":
        return move
    U, c, V = move
    if s["second_moment"] == "update":
        # |row i of D|^2 = sum of c_j c_k u_ij u_ik (V^T V)_jk, and c_j^2 u_ij^2 where V is orthonormal
        for key, near, far in (("rows", U, V), ("columns", V, U)):
            if s["second_moment_sides"] in ("both", key):
                part = near * c.unsqueeze(-2)
                _average_rows(batch, key, (part @ (far.mT @ far) * part).sum(-1).clamp_min(0), s)
    before = _norm(move)
    for key in ("rows", "columns"):
        if key not in batch.states[0]:
            continue
        mean_square = batch.get(key)
        mean = mean_square.mean(-1, keepdim=True)
        relative = (mean_square / torch.where(mean > 0, mean, 1)).sqrt().clamp_min(_SMALLEST_ROW)
        factor = torch.where(mean > 0, relative ** -s["second_moment_power"], 1.0).unsqueeze(-1)
        U, V = (U * factor, V) if key == "rows" else (U, V * factor)
    after = _norm(Terms(U, c, V))
    return Terms(U, c * (before / torch.where(after > 0, after, 1)).unsqueeze(-1), V)


def _norm(terms: Terms) -> Tensor:
    """|sum_j c_j U_j V_j^T|, (B,)."""
    U, c, V = terms
    gram = (U.mT @ U) * (V.mT @ V)
    return (c.unsqueeze(-2) @ gram @ c.unsqueeze(-1)).squeeze((-2, -1)).clamp_min(0).sqrt()


def _size(batch: _Batch, s: dict[str, Any]) -> Tensor:
    """b_i, (B,)."""
    if s["balance_by"] == "gradient":
        return (batch.get("square") / (1 - s["beta2"] ** batch.t)).sqrt()
    return batch.get("sigma").norm(dim=-1)


def balancing(sizes: list[Tensor], power: float) -> list[Tensor]:
    """(geometric mean of all positive sizes / size)^power, for each; 1 where a size is zero."""
    joined = torch.cat(sizes)
    moving = joined > 0
    logs = torch.where(moving, joined, 1).log()
    mean = logs.sum() / moving.sum().clamp_min(1)
    factors = torch.where(moving, (power * (mean - logs)).exp(), 1)
    return list(factors.split([len(size) for size in sizes]))


def softened(sigma: Tensor, live: Tensor, power: float) -> Tensor:
    """live sigma^power, scaled to the norm of ``live``; (B, k)."""
    if power == 0:
        return live
    largest = sigma[..., :1]
    relative = torch.where(live > 0, sigma / torch.where(largest > 0, largest, 1), 1)
    soft = live * relative**power
    norm = soft.norm(dim=-1, keepdim=True)
    return soft * (live.norm(dim=-1, keepdim=True) / torch.where(norm > 0, norm, 1))


def allotted_ranks(values: list[Tensor], costs: list[int], rank: int) -> list[Tensor]:
    """Ranks (B,) for batches of matrices, rank / 2 at least, within what ``rank`` for each would cost in all.

    Args:
        values: (B, cap) of each batch, what each direction is worth, falling.
        costs: of one direction of a matrix of each batch.
        rank: the mean.
    """
    least = max(1, rank // 2)
    worth, price, owner = [], [], []
    budget, matrices = 0, 0
    for value, cost in zip(values, costs):
        count, cap = value.shape
        first = torch.arange(cap, device=value.device) < least
        worth.append(torch.where(first, math.inf, value / cost).flatten())
        price.append(torch.full((count * cap,), float(cost), device=value.device, dtype=torch.float64))
        owner.append(matrices + torch.arange(count, device=value.device).repeat_interleave(cap))
        budget, matrices = budget + rank * cost * count, matrices + count
    worth, price, owner = torch.cat(worth), torch.cat(price), torch.cat(owner)
    order = worth.argsort(descending=True, stable=True)
    taken = (price[order].cumsum(0) <= budget).to(torch.int64)
    ranks = torch.zeros(matrices, dtype=torch.int64, device=worth.device).index_add_(0, owner[order], taken)
    return list(ranks.split([len(value) for value in values]))


# ---------------------------------------------------------------------- small parts


def _beta(s: dict[str, Any], t: int) -> float:
    return s["beta"] * min(1.0, t / s["beta_warmup"]) if s["beta_warmup"] else s["beta"]


def _cap(shape: tuple[int, int], rank: int) -> int:
    return min(2 * rank, *shape)


def _count(s: dict[str, Any], shape: tuple[int, int]) -> int:
    """Of the directions in an update."""
    cap = 2 * s["rank"] if s["rank_budget"] else max(1, round(s["update_rank"] * s["rank"]))
    return min(cap, *shape)


def _keep(batch: _Batch, factors: Factors) -> None:
    for key, value in zip(("U", "sigma", "V"), factors):
        batch.put(key, value)


def _masked(factors: Factors, ranks: Tensor) -> Factors:
    """Zero beyond each matrix's rank; ranks (B,)."""
    U, sigma, V = factors
    kept = torch.arange(sigma.shape[-1], device=sigma.device) < ranks.unsqueeze(-1)
    return Factors(U * kept.unsqueeze(-2), sigma * kept, V * kept.unsqueeze(-2))


def _beside(U: Tensor, X: Tensor) -> Tensor:
    """(1 - U U^T) X."""
    return X - U @ (U.mT @ X)


def _orthonormal_beside(V: Tensor, X: Tensor) -> Tensor:
    """Orthonormal columns that span (1 - V V^T) X, (B, n, k)."""
    [basis] = complements([Side(V, X)])
    c, k = V.shape[-1], basis.R.shape[-2]
    chosen = torch.eye(c + k, k, dtype=V.dtype, device=V.device).roll(c, 0)
    return basis.turned(chosen.expand(len(V), -1, -1))


def _check(s: dict[str, Any]) -> None:
    """Raise an OptionError where a setting cannot be right."""
    check_number("beta", s["beta"], low=0, high=1)
    check_number("beta2", s["beta2"], low=0, high=1)
    for name in ("balance", "rank_scale", "second_moment_power", "explore_scale", "probe_weight"):
        check_number(name, s[name], low=0)
    check_number("shrink", s["shrink"], low=0, high=1.0001)
    check_number("update_rank", s["update_rank"], low=0, high=2.0001, open_low=True)
    check_number("soft", s["soft"], low=-1, high=1.0001)
    for name in ("explore", "probes", "rank_budget", "beta_warmup", "momentum_reset"):
        check_integer(name, s[name], low=0, high=2**31)
    if not isinstance(s["nesterov"], bool):
        raise OptionError(f"nesterov={s['nesterov']!r} must be true or false")
    for name, choices in _CHOICES.items():
        if s[name] not in get_args(choices):
            raise OptionError(f"{name}={s[name]!r} must be one of {', '.join(map(repr, get_args(choices)))}")
    if s["balance_by"] == "gradient" and not s["probes"]:
        raise OptionError('balance_by="gradient" is measured by probes: set probes to 1 or more')
    if s["rank_budget"] and s["update_rank"] != 1:
        raise OptionError("rank_budget and update_rank both say how many directions move: set one of them")
    if s["oracle"] != "none" and (s["rank_budget"] or s["probes"] or s["explore"]):
        raise OptionError("an oracle sees all of the gradient: no rank_budget, probes or explore beside it")


_CHOICES = {
    "balance_by": BalanceBy,
    "explore_by": ExploreBy,
    "explore_sides": ExploreSides,
    "probe_rule": ProbeRule,
    "rank_rule": RankRule,
    "second_moment": SecondMoment,
    "second_moment_sides": Sides,
    "oracle": Oracle,
}
