"""Several processes that each hold the whole model: DistributedDataParallel, or ranks that reduce gradients themselves.

DDP would send a gradient of every parameter that requires one, zeros where there is none. So the matrices' names are put
where DDP looks for what it is to leave alone, before it wraps the model; it broadcasts the first weights of all others, and
this file those of the matrices. Every process owns every matrix: one all-reduce of the sketches takes the place of the
reduce-scatter and the all-gather, and the state is whole everywhere, for HF's Trainer saves it on the first process alone.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ds_mofa.kernels.shard import Shard
from ds_mofa.options import OptionError
from ds_mofa.parameters import Matrix
from ds_mofa.partition.exchange import Exchange
from ds_mofa.partition.layout import SketchSegment
from ds_mofa.partition.replicas import wrappers_of
from ds_mofa.step.backend import ENGINES, Backend, Engine, in_several_processes, replaced, whole_matrix

__all__ = ["Replicas", "WholeModels"]

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks for names, of the module that it wraps
_TOLERANCE = 1e-3  # of the norms of one gradient on two processes that have reduced it


class ReplicaExchange(Exchange):
    """Every process owns every matrix."""

    def __init__(self, group: dist.ProcessGroup):
        self._replicas, count = group, dist.get_world_size(group)
        super().__init__(None, 1 / count)
        self.processes = count

    def reduce_scatter(self, flat: Tensor, segment: int) -> SketchSegment:
        flat = flat.clone()
        dist.all_reduce(flat, group=self._replicas)
        return SketchSegment(flat)


class Replicas(Backend):
    """Whole weights on every process of ``group``."""

    host = gathered = None

    def __init__(self, matrices: Sequence[Matrix], group: dist.ProcessGroup):
        self.exchange = ReplicaExchange(group)
        self.device: torch.device = matrices[0].param.device
        self._group, self._checked = group, False
        self._slots = [(module, name, matrix) for matrix in matrices for module, name in matrix.slots]
        for matrix in matrices:
            dist.broadcast(matrix.param.data, dist.get_global_rank(group, 0), group=group)

    def shard_of(self, matrix: Matrix) -> Shard:
        return whole_matrix(matrix)

    def check(self, rest: Sequence[Tensor]) -> None:
        """The module's parameters are this optimizer's; and, when there are any first, somebody reduces AdamW's gradients."""
        for module, name, matrix in self._slots:
            if module._parameters.get(name, matrix.param) is not matrix.param:
                raise RuntimeError(replaced(matrix))
        if self._checked or not rest:
            return
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in rest if p.grad is not None]
        norm = torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64)
        bounds = torch.stack([norm, -norm]).to(self.device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._group)
        most, least = float(bounds[0]), -float(bounds[1])
        self._checked = most > 0  # on every process
        if most - least > _TOLERANCE * most:
            raise RuntimeError(
                "the processes have different gradients of the parameters that AdamW trains, so nobody adds them up, and the "
                "models would drift apart: wrap the model in DistributedDataParallel after the optimizer is built, reduce the "
                "gradients of optimizer.adamw_groups before each step, or take the last micro-batch outside of no_sync()"
            )


class WholeModels(Engine):
    """Runs of :class:`Replicas`."""

    def refuse(self, model: nn.Module) -> None:
        if isinstance(model, DistributedDataParallel):
            raise OptionError(
                "DistributedDataParallel has wrapped this model already, and would send zeros in the place of every matrix's "
                "gradient: build the optimizer over the module first, and wrap that"
            )

    def announce(self, model: nn.Module, matrices: Sequence[Matrix]) -> Callable[[], None] | None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        before = getattr(model, _IGNORED, None)
        ours = {matrix.param for matrix in matrices}
        # Each name of a shared one: DDP would reduce it under any that it does not know.
        every = [name for name, param in model.named_parameters(remove_duplicate=False) if param in ours]
        names = [known for name in every for known in _names(name)]
        # DDP's own way of setting them; it marks the parameters as well.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*(before or ()), *names])
        return functools.partial(_take_back, weakref.ref(model), before, every)

    def connect(
        self, model: nn.Module | None, matrices: Sequence[Matrix], group: dist.ProcessGroup | None
    ) -> Backend | None:
        if not in_several_processes(group):
            return None
        _refuse_wrapped(matrices)
        world = dist.distributed_c10d._get_default_group()
        return Replicas(matrices, world if group is None else group)


def _names(name: str) -> Iterable[str]:
    """What DDP may call a parameter: one of the root's own has a dot before it, and torch.compile wraps the model too."""
    for known in (name, f"_orig_mod.{name}"):
        yield known
        if "." not in known:
            yield f".{known}"


def _take_back(reference: "weakref.ref[nn.Module]", before: list[str] | None, names: Iterable[str]) -> None:
    model = reference()
    if model is None:
        return
    if before is None:
        vars(model).pop(_IGNORED, None)
    else:
        setattr(model, _IGNORED, before)
    params = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        vars(params.get(name, model)).pop("_ddp_ignored", None)


def _refuse_wrapped(matrices: Sequence[Matrix]) -> None:
    """A DDP that reduces matrices was made before the optimizer, or around a module that holds the model."""
    ours = {matrix.param: matrix.name for matrix in matrices}
    for found in wrappers_of(ours):
        for name, param in found.module.named_parameters():
            if param in ours and name not in found.parameters_to_ignore:
                raise OptionError(
                    f"DistributedDataParallel reduces {name!r}, of which there are sketches alone: it would send zeros. Build "
                    "the optimizer before DistributedDataParallel, over the very module that it wraps"
                )


ENGINES.append(WholeModels())
