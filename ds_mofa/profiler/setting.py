"""What a run is, for a prediction of its memory."""

import dataclasses

from ds_mofa.profiler.simulate import PredictionError

__all__ = ["OPTIMIZERS", "Setting"]

OPTIMIZERS = ("AdamW", "MoFaSGD", "LoRA", "Muon", "GaLore")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run to predict.

    Attributes:
        model_config: path of a model's shape.
        optimizer: one of :data:`OPTIMIZERS`.
        zero: ZeRO stage, or None for a plain PyTorch loop.
        gpus: data-parallel ranks.
        seq: tokens of a sequence.
        micro_batch: sequences of one forward.
        micro_batches: of one optimizer step.
        rank: of MoFaSGD, LoRA and GaLore.
        explore: random directions beside the rank, of MoFaSGD.
        states: "fp32" or "bf16": DeepSpeed's master weights and moments. A plain loop keeps all in bf16.
        checkpointing: recompute layers in backward.
        liger: liger-kernel's fused norms, rotary embedding, SwiGLU and loss.
        bucket: DeepSpeed's reduce_bucket_size, elements.
        contiguous: DeepSpeed's contiguous_gradients.
        prefetch: DeepSpeed's stage3_prefetch_bucket_size, elements.
        leaf: whether stage 3 gathers a decoder layer as one, DeepSpeed's leaf_module.
        adamw_reduce: ds_mofa's option of that name: "step", or "micro_batch".
        adamw_states: ds_mofa's option of that name: "full", or "8bit".
        fused_head: ds_mofa's option of that name; in the place of liger-kernel's loss.
        head: "matrix" where MoFaSGD's ``include`` names the output head, else "adamw".
        embed: "frozen" where the embedding is not trained, else "trained".
        offload: None, "optimizer" (DeepSpeed's offload_optimizer, to the host) or "param" (that and offload_param).
    """

    model_config: str
    optimizer: str = "MoFaSGD"
    zero: int | None = None
    gpus: int = 1
    seq: int = 1024
    micro_batch: int = 1
    micro_batches: int = 8
    rank: int = 8
    explore: int = 0
    states: str = "fp32"
    checkpointing: bool = False
    liger: bool = False
    bucket: int = 100_000_000
    contiguous: bool = True
    prefetch: int = 100_000_000
    leaf: bool = False
    adamw_reduce: str = "step"
    adamw_states: str = "full"
    fused_head: bool = False
    head: str = "adamw"
    embed: str = "trained"
    offload: str | None = None

    def __post_init__(self):
        names = {name.lower(): name for name in OPTIMIZERS}
        if self.optimizer.lower() not in names:
            raise PredictionError(f"optimizer {self.optimizer!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")
        object.__setattr__(self, "optimizer", names[self.optimizer.lower()])
        for field in ("gpus", "seq", "micro_batch", "micro_batches", "rank"):
            if getattr(self, field) < 1:
                raise PredictionError(f"{field} is {getattr(self, field)}: give 1 or more")
        if self.explore < 0:
            raise PredictionError(f"explore is {self.explore}: give 0 or more")
        if self.zero not in (None, 0, 1, 2, 3):
            raise PredictionError(f"zero is {self.zero}: give none, 0, 1, 2 or 3")
        if self.states not in ("fp32", "bf16"):
            raise PredictionError(f"states is {self.states!r}: give fp32 or bf16")
        if self.adamw_reduce not in ("step", "micro_batch"):
            raise PredictionError(f"adamw_reduce is {self.adamw_reduce!r}: give step or micro_batch")
        for field, known in (
            ("adamw_states", ("full", "8bit")), ("head", ("adamw", "matrix")), ("embed", ("trained", "frozen")),
        ):  # fmt: skip
            if getattr(self, field) not in known:
                raise PredictionError(f"{field} is {getattr(self, field)!r}: give {' or '.join(known)}")
        ours = {
            "adamw_states": self.adamw_states == "8bit",
            "fused_head": self.fused_head,
            "head": self.head == "matrix",
        }
        if self.optimizer != "MoFaSGD" and any(ours.values()):
            found = ", ".join(field for field, given in ours.items() if given)
            raise PredictionError(f"{found}: of MoFaSGD alone, not of {self.optimizer}")
        if self.adamw_states == "8bit" and self.offload:
            raise PredictionError("adamw_states is '8bit' with offload: ds_mofa refuses that. Leave one of them out")
        if self.zero is None and self.gpus > 1:
            raise PredictionError("several GPUs without ZeRO: ds_mofa has no such backend. Give --zero 0, 1, 2 or 3")
        if self.zero == 0 and self.states == "bf16":
            raise PredictionError("bf16 states at ZeRO stage 0: DeepSpeed keeps fp32 ones there. Use stage 1 or 2")
        if self.optimizer == "GaLore" and self.zero is not None:
            raise PredictionError("GaLore does not run under ZeRO: predict it with --zero none")
        if self.offload not in (None, "optimizer", "param"):
            raise PredictionError(f"offload is {self.offload!r}: give optimizer or param, or leave it out")
        if self.offload and (self.optimizer not in ("AdamW", "MoFaSGD") or self.zero not in (1, 2, 3)):
            raise PredictionError("offload is predicted of AdamW and MoFaSGD in ZeRO stages 1 to 3: give one of these")
        if self.offload == "param" and self.zero != 3:
            raise PredictionError(f"offload is 'param' at ZeRO stage {self.zero}: it needs stage 3, or give optimizer")
