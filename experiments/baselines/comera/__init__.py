"""CoMERA (arXiv 2405.14377, NeurIPS 2024): training of weights that are tensor trains, whose ranks shrink.

Not an optimizer of the tensors that the others train: it replaces them, as LoRA does. A linear's W^T (n x m) is seen as a
tensor of 2 d dimensions, n = n_1 ... n_d and m = n_{d+1} ... n_{2d}, an embedding (V x e) as one of d pairs, V <= v_1 ... v_d
and e = e_1 ... e_d, n_k = v_k e_k:

    W = G_1 D_1 G_2 D_2 ... D_{K-1} G_K          G_k (r_{k-1}, n_k, r_k), D_k diagonal (r_k), ones at the start
    S = sum_k r_{k-1} n_k r_k                    its numbers; D's entries at or below tau = 0.01 count as zero
    R = |D|_1 / |D|_0 over all trains            the penalty ("mean")

    early stage:   minimise  L + gamma R
    late stage:    minimise  (0.1 + 1 - b) L + (0.01 + b) R,   b = 1 if (L - L*) / L < (S - S*) / S, else 0

with L the loss of the batch, L* the loss that is good enough and S* = ``target_ratio`` times the size at which the late
stage begins: whichever of the two is farther from its target is lowered, and a little of the other. All parameters are
AdamW's, in three groups: cores, diagonals (at ten times the rate) and the rest.

A layer multiplies its input with the cores in the order of the fewest multiplications
(:mod:`experiments.baselines.comera.contraction`); an embedding takes each row that occurs once, from one table for either
half of its cores (:class:`experiments.baselines.comera.layers.TensorTrainEmbedding`).

The equations are those of the published code (read, none of it used); the paper's text was at hand as reported alone. Its
penalty, as reported, is the size with l1 in the place of l0, sum_k |D_{k-1}|_1 n_k |D_k|_1: that is ``penalty="size"`` here,
as a share of the size at the start. Other choices of ours:

- Pruned entries are taken out of cores and moments every ``prune_every`` steps, so that memory falls with S; the published
  code keeps them as zeros. The function is the same. An entry cannot come back, as AdamW's momentum could bring it there.
- A bond keeps one entry, and counts as one in S, where the code lets S of such a layer be 0. That layer is its bias in both.
- Factors are found by their least sum, the largest at the ends of the train; the code lists them by hand. For 768 and 3072
  they are the same.
- The embedding's ids are made unique, as the paper is reported to do; the code has that switched off.
- Neither CUDA graphs nor quantisation. The published times are with CUDA graphs.

Kept: with P numbers in cores, diagonals and the rest, 4 P bytes of parameters, 4 P of gradients, 8 P of moments (fp32);
:func:`footprint` counts them.
"""

from experiments.baselines.comera.accounting import Footprint, footprint
from experiments.baselines.comera.optimizer import CoMERA, build
from experiments.baselines.comera.tensorize import densify

__all__ = ["CoMERA", "Footprint", "build", "densify", "footprint"]
