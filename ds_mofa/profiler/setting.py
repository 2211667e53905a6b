"""What a run is, for all that measure, predict or count: written as ``zero2:MoFaSGD:r=32`` or ``fsdp2:AdamW``."""

import argparse
import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

from ds_mofa.optimizers.registry import OPTIMIZERS, Entry, find
from ds_mofa.options import OptimizerOptions, OptionError
from ds_mofa.profiler.spelling import SettingError, alternatives, read_fields, read_option, spell
from ds_mofa.rules.rule import Rule

__all__ = ["BACKENDS", "BASELINES", "RunSetting", "SettingError", "known_optimizers"]

# A plain loop in one process; torch's two ways to train on several GPUs; and DeepSpeed's stages.
BACKENDS = ("torch", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")

# What runs beside the optimizers of this package: torch's or DeepSpeed's own, and peft's adapters. The last two are
# predicted only, Muon everywhere but on torch's several GPUs, LoRA under ZeRO.
BASELINES = ("AdamW", "LoRA", "Muon")

# A command line that predicts several optimizers leaves out what some of them do not have, but for these: a column of
# AdamW would be taken for one with 8-bit moments.
_NEVER_LEFT_OUT = ("adamw_states", "fused_head")
_NEVER_OFFLOADED = ("LoRA", "Muon")
_UNKNOWN = object()


def known_optimizers() -> tuple[str, ...]:
    """Every name that :attr:`RunSetting.optimizer` takes."""
    return ("AdamW", *OPTIMIZERS, *(name for name in BASELINES if name != "AdamW"))


@dataclasses.dataclass(frozen=True)
class RunSetting:
    """A run: a model, a backend, an optimizer and the tokens of a step. See :meth:`of` and :meth:`parse`.

    Attributes:
        model_config: path of a model's shape.
        optimizer: one of :func:`known_optimizers`.
        backend: one of :data:`BACKENDS`.
        gpus: data-parallel ranks.
        seq: tokens of a sequence.
        micro_batch: sequences of one forward.
        micro_batches: of one optimizer step.
        rank: r, of the optimizers that have one.
        options: of the optimizer, the others than ``rank``, where they are not its defaults: (name, value) by name.
        states: "fp32" or "bf16": DeepSpeed's master weights and moments. Without DeepSpeed they are as the weights.
        weights: "bf16"; or "int8", the optimizer's option of that name; or under FSDP2 "fp32": shards in fp32, gathered and
            computed with in bf16, gradients reduced in fp32, torch's
            ``MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)``.
        reshard: FSDP2's ``reshard_after_forward`` of the decoder layers.
        gathered: FSDP2 gathers weights once a step, for its first micro-batch, and lets go of them in its last
            (``set_reshard_after_backward``).
        replicas: on how many ranks each shard stands; with more than one it is HSDP.
        offload: None, "optimizer" (DeepSpeed's offload_optimizer, to the host) or "param" (that and offload_param; under
            FSDP2 its ``CPUOffloadPolicy``).
        compiled: each decoder layer by ``torch.compile``.
        graphed: forward and backward as one CUDA graph, on one GPU without an engine.
        head: "matrix" where the optimizer's ``include`` names the output head, else "adamw".
        embed: "frozen" where the embedding is not trained, else "trained".
        checkpointing: recompute layers in backward.
        liger: liger-kernel's fused norms, rotary embedding, SwiGLU and loss, but for the last with ``fused_head``.
        loss: "model", or "trl" where TRL's SFTTrainer computes it around the head.
        leaf: whether stage 3 gathers a decoder layer as one, DeepSpeed's leaf_module.
        prefetch: DeepSpeed's stage3_prefetch_bucket_size, elements.
        contiguous: DeepSpeed's contiguous_gradients.
        overlap: DeepSpeed's overlap_comm.
        bucket: DeepSpeed's reduce_bucket_size, elements.
        card: run out of memory where a GPU of so many GiB would; None: where this one does.

    Raises:
        SettingError: a value out of range, or a combination that does not run.
    """

    model_config: str = ""
    optimizer: str = "MoFaSGD"
    backend: str = "torch"
    gpus: int = 1
    seq: int = 1024
    micro_batch: int = 1
    micro_batches: int = 8
    rank: int = 8
    options: tuple[tuple[str, Any], ...] = ()
    states: str = "fp32"
    weights: str = "bf16"
    reshard: bool = True
    gathered: bool = False
    replicas: int = 1
    offload: str | None = None
    compiled: bool = False
    graphed: bool = False
    head: str = "adamw"
    embed: str = "trained"
    checkpointing: bool = False
    liger: bool = False
    loss: str = "model"
    leaf: bool = False
    prefetch: int = 100_000_000
    contiguous: bool = True
    overlap: bool = True
    bucket: int = 100_000_000
    card: float | None = None

    def __post_init__(self):
        names = {name.lower(): name for name in known_optimizers()}
        if self.optimizer.lower() not in names:
            known = ", ".join(known_optimizers())
            raise SettingError(f"optimizer {self.optimizer!r} is unknown: choose one of {known}")
        object.__setattr__(self, "optimizer", names[self.optimizer.lower()])
        for field in ("gpus", "seq", "micro_batch", "micro_batches", "rank", "replicas"):
            if getattr(self, field) < 1:
                raise SettingError(f"{field} is {getattr(self, field)}: give 1 or more")
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise SettingError(f"{field} is {getattr(self, field)!r}: give {alternatives(known)}")
        object.__setattr__(self, "options", self._checked(dict(self.options)))
        self._check_backend()

    # ------------------------------------------------------------------ made from

    @classmethod
    def of(cls, model_config: str = "", optimizer: str = "MoFaSGD", **values: Any) -> "RunSetting":
        """From fields and options of the optimizer side by side: ``of(path, "MoFaSGD", zero=2, explore=8)``.

        ``zero`` is a short form of ``backend``: a stage, or None for ``torch``.
        """
        values = read_fields(values)
        own = {name: values.pop(name) for name in _FIELDS if name in values}
        return cls(model_config, optimizer, options=tuple(values.items()), **own)

    @classmethod
    def parse(cls, run: str, **others: Any) -> "RunSetting":
        """From ``BACKEND:OPTIMIZER[:OPTION=VALUE...]``, as ``str`` writes it.

        Args:
            run: BACKEND is one of :data:`BACKENDS`; an OPTION one of :data:`ds_mofa.profiler.spelling.WORDS`, or of the
                optimizer's own.
            others: what ``run`` does not say: ``model_config``, ``gpus``, or ``shape="1024x8"`` for the tokens of a
                sequence and the micro-batches of a step.
        """
        text, _, path = run.partition(":model=")
        backend, _, rest = text.partition(":")
        optimizer, *words = rest.split(":")
        names = [name.lower() for name in known_optimizers()]
        if backend not in BACKENDS or optimizer.lower() not in names:
            raise SettingError(
                f"{run!r} cannot be run: give {alternatives(BACKENDS)}, an optimizer ({', '.join(known_optimizers())}) "
                "after it, and options such as r=8, all with colons between them"
            )
        kinds = _option_kinds()
        values: dict[str, Any] = {"model_config": path} if path else {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                raise SettingError(f"{run!r}: an option is written NAME=VALUE, such as r=8, and not {word!r}")
            try:
                values |= read_option(name, value, kinds)
            except SettingError as error:
                raise SettingError(f"{run!r}: {error}") from error
        return cls.of(optimizer=optimizer, backend=backend, **others, **values)

    @classmethod
    def from_args(cls, args: argparse.Namespace, **others: Any) -> "RunSetting":
        """From a command line whose options bear the names of the fields, or of the optimizer's options.

        What is no such name is left out, and so is an option that this optimizer does not have and another has: one
        command line may serve several optimizers.
        """
        given = read_fields({**vars(args), **others})
        entry = find(given.get("optimizer", "MoFaSGD"))
        kept = {"model_config", "optimizer", *_FIELDS, *_NEVER_LEFT_OUT, *(_defaults(entry) if entry else ())}
        return cls.of(**{name: value for name, value in given.items() if name in kept})

    def but(self, **changes: Any) -> "RunSetting":
        """The same run with other values of fields or options, or another ``shape``."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "options"}
        return RunSetting.of(**{**own, **dict(self.options), **read_fields(changes)})

    # ------------------------------------------------------------------ written as

    @property
    def run(self) -> str:
        """``BACKEND:OPTIMIZER[:OPTION=VALUE...]``, for result rows, which name model, shape and GPUs beside it."""
        rank = {"rank": self.rank} if self.has_rank else {}
        values = {name: getattr(self, name) for name in _FIELDS if name not in _BESIDE_A_RUN and name != "rank"}
        changed = {name: value for name, value in values.items() if value != _FIELDS[name]}
        changed.pop("backend", None)
        return ":".join([self.backend, self.optimizer, *spell({**rank, **dict(self.options), **changed})])

    def __str__(self) -> str:
        """All of it; ``parse`` gives the same setting back."""
        beside = {name: getattr(self, name) for name in _BESIDE_A_RUN if getattr(self, name) != _FIELDS[name]}
        rank = {} if self.has_rank or self.rank == _FIELDS["rank"] else {"rank": self.rank}
        words = [self.run, *spell({**rank, **beside})]
        return ":".join([*words, *([f"model={self.model_config}"] if self.model_config else [])])

    @property
    def owners(self) -> int:
        """Processes that share the matrices out; under DDP each owns all, as it holds all weights."""
        return 1 if self.backend == "ddp" else self.gpus

    @property
    def zero(self) -> int | None:
        """ZeRO stage; None without DeepSpeed."""
        return int(self.backend.removeprefix("zero")) if self.backend.startswith("zero") else None

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the model."""
        return self.backend == "fsdp2"

    @property
    def shards(self) -> int:
        """Into how many parts the weights are cut."""
        return self.gpus // self.replicas if self.sharded else self.gpus if self.zero == 3 else 1

    @property
    def shape(self) -> str:
        """TOKENSxMICRO_BATCHES."""
        return f"{self.seq}x{self.micro_batches}"

    def as_dict(self) -> dict[str, Any]:
        """Fields, and all options of the optimizer with their values, for JSON."""
        own = dataclasses.asdict(self)
        del own["options"]
        return {**(dataclasses.asdict(self.parsed) if self.parsed is not None else {}), **own}

    # ------------------------------------------------------------------ what the optimizer is

    @property
    def entry(self) -> Entry | None:
        """Of the registry; None for one of :data:`BASELINES`."""
        return find(self.optimizer)

    @property
    def has_rank(self) -> bool:
        return self.entry is not None or self.optimizer == "LoRA"

    def params(self, include: tuple[str, ...] = ()) -> dict[str, Any]:
        """What to construct the optimizer with, but for its learning rate; of a baseline nothing.

        Args:
            include: patterns that name the output head where ``head`` is "matrix".
        """
        if self.entry is None:
            return {}
        params = {"rank": self.rank, **dict(self.options), **({"weights": "int8"} if self.weights == "int8" else {})}
        if self.head == "matrix":
            params["include"] = [*params.get("include", ()), *include]
        return params

    @functools.cached_property
    def parsed(self) -> OptimizerOptions | None:
        """The optimizer's options; None for a baseline."""
        return None if self.entry is None else self.entry.options(**self.params())

    def option(self, name: str, default: Any = None) -> Any:
        """One of the optimizer's options; ``default`` where it has none of that name."""
        return getattr(self.parsed, name, default)

    def rule(self) -> Rule | None:
        """The rule of the matrices, with these options; None for a baseline."""
        return None if self.entry is None else self.entry.rule(self.parsed)

    # ------------------------------------------------------------------ what cannot be

    def _checked(self, options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        """The options without those that are defaults, in the order in which the optimizer declares them."""
        own = {} if self.entry is None else _defaults(self.entry)
        others = {name: value for entry in OPTIMIZERS.values() for name, value in _defaults(entry).items()}
        given = {name: _hashable(value) for name, value in options.items()}
        given = {name: value for name, value in given.items() if name in own or value != others.get(name, _UNKNOWN)}
        if self.entry is None:
            named = [*given, *(["head"] if self.head == "matrix" else [])]
            if named:
                raise SettingError(f"{', '.join(named)}: of {_owners(given)}, not of {self.optimizer}. Leave it out")
            return ()
        try:
            parsed, _ = self.entry.options.from_config(
                {"rank": self.rank, **given}
            )  # it says what is close to a wrong name
        except OptionError as error:
            raise SettingError(str(error)) from error
        values = {name: _hashable(getattr(parsed, name)) for name in own if name in given}
        return tuple((name, value) for name, value in values.items() if value != own[name])

    def _check_backend(self) -> None:
        if self.loss == "trl" and self.option("fused_head"):
            raise SettingError("loss is 'trl' with fused_head: only one can compute it. Leave one of them out")
        if self.option("adamw_states") == "8bit" and self.offload:
            raise SettingError("adamw_states is '8bit' with offload: ds_mofa refuses that. Leave one of them out")
        if self.backend == "torch" and self.gpus > 1:
            raise SettingError("several GPUs without ZeRO, FSDP2 or DDP: give the backend ddp, fsdp2 or zero0 to zero3")
        if self.graphed and self.backend not in ("torch", "ddp"):
            raise SettingError(
                f"graphed with {self.backend}: a graph is of whole weights without an engine. Give the backend torch or ddp"
            )
        if self.zero == 0 and self.states == "bf16":
            raise SettingError("bf16 states at ZeRO stage 0: DeepSpeed keeps fp32 ones there. Use stage 1 or 2")
        if not self.sharded:
            own = [
                name
                for name in ("weights", "reshard", "gathered", "replicas")
                if getattr(self, name) not in (_FIELDS[name], "int8")
            ]
            if own:
                raise SettingError(f"{', '.join(own)} with {self.backend}: FSDP2's alone. Leave it out, or give fsdp2")
        if self.weights == "int8" and (self.entry is None or self.zero == 3 or self.offload == "param"):
            able = " and ".join(OPTIMIZERS)
            raise SettingError(
                f"weights is 'int8' with {self.run}: known of {able}, not at ZeRO stage 3 and not on the host. Give the "
                "backend torch, ddp, fsdp2, zero0, zero1 or zero2"
            )
        if self.gpus % self.replicas:
            raise SettingError(f"replicas is {self.replicas} on {self.gpus} GPUs: give a divisor of {self.gpus}")
        if self.backend in ("ddp", "fsdp2") and self.optimizer in _NEVER_OFFLOADED:
            raise SettingError(
                f"{self.optimizer} with {self.backend}: known of AdamW and {', '.join(OPTIMIZERS)} alone"
            )
        able = ", ".join(name for name in known_optimizers() if name not in _NEVER_OFFLOADED)
        if self.offload and (self.optimizer in _NEVER_OFFLOADED or not (self.sharded or self.zero in (1, 2, 3))):
            raise SettingError(f"offload is known of {able} in ZeRO stages 1 to 3 and FSDP2: give one of these")
        if self.offload == "param" and self.zero in (1, 2):
            raise SettingError(f"offload is 'param' at ZeRO stage {self.zero}: it needs stage 3, or give optimizer")
        if self.offload == "optimizer" and self.sharded:
            raise SettingError(
                "offload is 'optimizer' with fsdp2: its CPUOffloadPolicy takes the weights too. Give param"
            )


_FIELDS: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(RunSetting)
    if field.name not in ("model_config", "optimizer", "options")
}
_BESIDE_A_RUN = ("gpus", "seq", "micro_batch", "micro_batches")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "backend": BACKENDS,
    "states": ("fp32", "bf16"),
    "weights": ("bf16", "fp32", "int8"),
    "offload": (None, "optimizer", "param"),
    "head": ("adamw", "matrix"),
    "embed": ("trained", "frozen"),
    "loss": ("model", "trl"),
}


def _defaults(entry: Entry) -> dict[str, Any]:
    """The optimizer's options by name, but for those that are fields of a setting."""
    return {name: _hashable(getattr(_plain(entry), name)) for name in entry.options.names() if name not in _FIELDS}


@functools.cache
def _plain(entry: Entry) -> OptimizerOptions:
    return entry.options()


def _option_kinds() -> dict[str, Any]:
    """Type of each option of any optimizer."""
    hints = [(typing.get_type_hints(entry.options), _defaults(entry)) for entry in OPTIMIZERS.values()]
    return {name: kinds[name] for kinds, names in reversed(hints) for name in names}


def _owners(options: Mapping[str, Any]) -> str:
    able = [entry.name for entry in OPTIMIZERS.values() if set(options) <= set(_defaults(entry))]
    return " and ".join(able) or "no optimizer"


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
