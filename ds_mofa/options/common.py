"""What the engine needs, whatever the rule: which parameters are matrices, how they are sketched and written."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ds_mofa.options.checks import Checked, OptionError, check_flag, check_integer, check_number, check_patterns

__all__ = ["CaptureMode", "CommonOptions", "Rounding", "Weights"]

Rounding = Literal["stochastic", "nearest"]
CaptureMode = Literal["linear", "hook"]
Weights = Literal["int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonOptions(Checked):
    """The options of the matrix parameters: 2-D weights of linear maps that are not embeddings or output heads.

    Attributes:
        lr: learning rate of the matrices, per step, > 0: AdamW's for the same task (docs/learning/rates.md).
        rank: r, the number of momentum directions kept per matrix, >= 1. State is r (m + n + 1) fp32 numbers. MoFaSGD without
            one has 32, and explores 32.
        weight_decay: decoupled; each step multiplies the weights by 1 - lr * weight_decay.
        rounding: how an update is written into 16-bit weights: ``"stochastic"`` (right in the mean, however
            small the update) or ``"nearest"``; likewise into weights of eight bits. Without effect on fp32 weights.
        master_weights: keep an fp32 master of each 16-bit matrix, 4 more bytes a weight (a shard of it under
            ZeRO stage 3, a whole one on every rank else; in host memory with ``offload_optimizer``).
        weights: ``"int8"``: the matrices are kept in eight bits, with a power of two for every 32 neighbours in a row
            (:mod:`ds_mofa.kernels.int8`): 8.25 bits a weight, each of them a bf16 number, in one process, under
            DistributedDataParallel, ``fully_shard`` and at ZeRO stages 0 to 2. Forward and backward widen one matrix at a
            time. None: as they are.
        capture: how the sketches are taken: ``"linear"`` (``nn.Linear`` never computes its weight gradient;
            anything else falls under ``"hook"``) or ``"hook"`` (the gradient of one parameter at a time is
            sketched as soon as it is there, and dropped).
        include: regular expressions, searched in parameter names: 2-D parameters to make matrices although
            they are embeddings or output heads, or of no module that is known to be a linear map.
        exclude: likewise: parameters to leave to AdamW. Wins over ``include``.
        fused_head: compute the loss of a Hugging Face causal language model in its output head, by chunks of tokens
            (:mod:`ds_mofa.capture.head`): in training no tensor holds all logits, and the output's ``logits`` are None.
            A head that ``include`` makes a matrix has no weight gradient either, only sketches.
        fp8: multiply forward and dX of the linears in floats of eight bits (:mod:`ds_mofa.kernels.fp8`); sketches are of the
            activations and gradients themselves. For bf16, weights or autocast; on GPUs from compute capability 8.9 on. What
            ``include`` names, and linears of a side that is no multiple of 16, are multiplied as without.
        update_bytes: most bytes of temporaries of the factor update, on each rank, > 0: it works on so many matrices at
            a time, one at least. With the default all 224 matrices of LLaMA-8B at rank 32 are one batch on one GPU.
            Half of it takes half the memory and twice the kernel launches, and may round otherwise.
        seed: of the start's test matrices and of the stochastic rounding, 0 <= seed < 2^31.
    """

    lr: float = 1e-4
    rank: int = 8
    weight_decay: float = 0.0
    rounding: Rounding = "stochastic"
    master_weights: bool = False
    weights: Weights | None = None
    capture: CaptureMode = "linear"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    fused_head: bool = False
    fp8: bool = False
    update_bytes: float = 2e9
    seed: int = 0

    def __post_init__(self):
        check_number("lr", self.lr, low=0, open_low=True)
        check_integer("rank", self.rank, low=1, high=2**31)
        check_number("weight_decay", self.weight_decay, low=0)
        check_flag("master_weights", self.master_weights)
        check_patterns("include", self.include)
        check_patterns("exclude", self.exclude)
        check_flag("fused_head", self.fused_head)
        check_flag("fp8", self.fp8)
        check_number("update_bytes", self.update_bytes, low=0, open_low=True)
        check_integer("seed", self.seed, low=0, high=2**31)
        super().__post_init__()
        if self.fp8 and self.capture == "hook":
            raise OptionError(
                "fp8 is of linears that are captured, and capture='hook' captures none: leave one of them out"
            )
        if self.weights == "int8" and self.master_weights:
            raise OptionError(
                "weights='int8' keeps a matrix in one byte a weight, and master_weights in four more: leave one of them out"
            )
