"""MoFaSGD's laboratory: MoFaSGD with one more idea at a time, on gradients that are at hand in one process.

Each option is off by default, and with all of them off this is :class:`ds_mofa.MoFaSGD` on fp32 weights. None needs
more of the gradient G (m x n) than sketches that are linear in it, so each could be shipped under ZeRO without G ever
being stored; the oracles alone are not of that kind, and are there to say what an idea could gain at most.

U, sigma, V are the momentum's factors of rank r, Y = G V, Z = G^T U, A = U^T Y, and with [U Q_U], [V Q_V] the bases of
:mod:`ds_mofa.linalg.factors`, in their coordinates

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
trust = p: D <- D (w_i / w)^p, w_i the rms of the matrix' weights, w the geometric mean of all: LAMB's ratio (1904.00962),
    for updates that are alike long. Price: one number a matrix known to all ranks.

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
explore_hold = T: E (and F) stay for T steps, and H (and J) are averages over these with decay beta: held directions have a
    momentum of their own. With explore_by = "signs" alone. Price: k (m + n) numbers with the owner.
exact = N: in each step every N-th matrix, in turn, moves by polar(G), all directions of its gradient, and not by its
    factors, which learn all the same. Price: its gradient for a moment, reduced whole.

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

optimizer.py has the step; momentum.py K, M' and L from the sketches, oracles.py the same from all of G; probes.py,
exploring.py, exact.py, scaling.py and ranks.py an idea each; settings.py what each may be.
"""

from experiments.baselines.laboratory.optimizer import MoFaSGDLab

__all__ = ["MoFaSGDLab"]
