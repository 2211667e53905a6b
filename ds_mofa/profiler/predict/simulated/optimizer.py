"""What an optimizer attaches to the model, as far as forward and backward notice: sketches, or adapters."""

import contextlib
import dataclasses
import io
import unittest.mock
import warnings
from typing import Any

from torch import Tensor, nn

from ds_mofa.kernels import int8
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.registry import Entry
from ds_mofa.options import AdamWOptions, OptionError
from ds_mofa.parameters import split_parameters
from ds_mofa.profiler.predict.simulated.errors import PredictionError
from ds_mofa.profiler.predict.simulated.model import head_names
from ds_mofa.profiler.setting import RunSetting

__all__ = ["OF_ADAMW", "Attached", "attach", "put_in_eight_bits"]

_ALL = 1 << 62
OF_ADAMW = frozenset(field.name for field in dataclasses.fields(AdamWOptions))  # neither forward nor backward sees them


@dataclasses.dataclass(frozen=True)
class Attached:
    """A model with its optimizer.

    Attributes:
        kinds: of each parameter: "sketched", "matrix" (a 2-D weight of the layers), "other", "frozen" or "adapter".
        buffers: tensors of the optimizer that backward writes into, which no micro-batch allocates.
        places: :class:`ds_mofa.partition.layout.Place` of each matrix or stack that is sketched.
        held: bytes that the rule keeps on every rank beside its state.
        optimizer: attached for as long as it is kept.
    """

    kinds: dict[nn.Parameter, str]
    buffers: list[Tensor]
    places: tuple[tuple, ...] = ()
    held: int = 0
    optimizer: MatrixOptimizer | None = None


def attach(model: nn.Module, setting: RunSetting) -> Attached:
    """The setting's optimizer to ``model``; of one that computes every gradient there is nothing to attach.

    Raises:
        PredictionError: the optimizer refuses the model.
    """
    if setting.entry is not None:
        return _sketched(model, setting, setting.entry)
    # Any of the optimizers that train matrices says which those are.
    alike = RunSetting.of(rank=1).parsed
    assert alike is not None  # the default is one of them
    split = split_parameters(model, model.parameters(), alike)
    matrices = {matrix.param for matrix in split.matrices}
    if setting.optimizer == "LoRA":
        return _adapted(model, setting.rank, matrices)
    return Attached({p: "matrix" if p in matrices else _other(p) for p in model.parameters()}, [])


def put_in_eight_bits(model: nn.Module, setting: RunSetting) -> None:
    """Before anything is sharded.

    Raises:
        PredictionError: the optimizer refuses the model.
    """
    assert setting.entry is not None  # else the setting is refused
    params = setting.params(head_names(model))
    try:
        with unittest.mock.patch.object(int8, "CHUNK", _ALL):  # thousands of passes over memory that is not there
            setting.entry.optimizer.to_int8(model, **{name: params[name] for name in params if name not in OF_ADAMW})
    except OptionError as error:
        raise PredictionError(str(error)) from error


def _sketched(model: nn.Module, setting: RunSetting, entry: Entry) -> Attached:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # It notes addresses, which fake tensors lack, and does not use them here.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            params = setting.params(head_names(model))
            optimizer = entry.optimizer(model, **{name: params[name] for name in params if name not in OF_ADAMW})
    except OptionError as error:
        raise PredictionError(str(error)) from error
    matrices = {matrix.param for matrix in optimizer.split.matrices}
    kinds = {p: "sketched" if p in matrices else _other(p) for p in model.parameters()}
    step = optimizer.matrices
    places = tuple(matrix.place for matrix in optimizer.split.matrices)
    held = sum(tensor.nbytes for tensor in step.held())
    return Attached(kinds, [step.sketches, step.working, step.factors], places, held, optimizer)


def _adapted(model: nn.Module, rank: int, matrices: set[nn.Parameter]) -> Attached:
    frozen = set(model.parameters())
    for p in frozen:
        p.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.weight in matrices:
                setattr(parent, name, _LoRALinear(child, rank))
    return Attached({p: "frozen" if p in frozen else "adapter" for p in model.parameters()}, [])


def _other(param: nn.Parameter) -> str:
    return "other" if param.requires_grad else "frozen"


class _LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        options: dict[str, Any] = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.A, self.B = nn.Linear(base.in_features, rank, **options), nn.Linear(rank, base.out_features, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x)) * 2.0
