"""Sharded models of ``fully_shard`` (FSDP2, HSDP) and ``replicate``: what a process holds is read off the DTensors.

A process's rows of each matrix are written in place; a linear finds the gathered weight where it always is, in its module.
A gradient that autograd computes all the same comes reduced: FSDP2 calls the hook of the sharded parameter with this
process's rows of the mean.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Rows
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ds_mofa.capture.sink import Arrived
from ds_mofa.kernels.int8 import Int8Weight
from ds_mofa.kernels.shard import Shard
from ds_mofa.options import OptionError
from ds_mofa.parameters import Matrix, local_part
from ds_mofa.partition.exchange import Exchange
from ds_mofa.step.backend import ENGINES, Backend, Engine, replaced, rows_from, whole_matrix

__all__ = ["FullyShard", "Shards"]


class ShardExchange(Exchange):
    """All processes of a mesh, with FSDP2's own divisor, which a script may set at any time."""

    def __init__(self, mesh: DeviceMesh, group: dist.ProcessGroup | None, units: Sequence[Any]):
        super().__init__(group if mesh.size() > 1 else None)
        self._size, self._units = mesh.size(), units

    @property
    def mean_scale(self) -> float:
        divisors = {float(unit.gradient_divide_factor or self._size) for unit in self._units} or {float(self._size)}
        if len(divisors) > 1:
            raise OptionError(
                f"set_gradient_divide_factor has set {len(divisors)} divisors, {sorted(divisors)}, for modules that hold "
                "matrices, whose sketches are reduced together: set the same one for all"
            )
        return 1 / divisors.pop()


class Shards(Backend):
    """The rows of each matrix, and the matrices of each stack, on the processes of one mesh. What ``ignored_params`` has left
    plain is whole.

    Args:
        model: with the modules that ``fully_shard`` was called on.
        matrices: of that model.
        group: of all the mesh's processes; None: the mesh's own, or all there are.

    Raises:
        OptionError: the matrices are cut otherwise than by rows, or there are several meshes.
    """

    host = gathered = None

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix], group: dist.ProcessGroup | None):
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        units = {
            held.sharded_param: unit for module in self._modules for unit in _units(module) for held in unit.fsdp_params
        }
        self._units = {m.index: _unit_of(m, units) for m in matrices if isinstance(m.param, DTensor)}
        self._mesh = _one_mesh(matrices, units)
        unique = list({id(unit): unit for unit in self._units.values()}.values())
        self.exchange = ShardExchange(self._mesh, _group_of(self._mesh, group), unique)
        kind = self._mesh.device_type
        self.device = (
            torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
        )
        for matrix in matrices:
            _check_eight_bits(matrix, self.device)
        self._slots = [(module, name, m) for m in matrices for module, name in m.slots]
        # Which rows these are takes as long to say as a layer's forward to launch: once, not once a step.
        self._first_rows = {m.index: _first_row(m.param) for m in matrices if isinstance(m.param, DTensor)}
        for matrix in matrices:
            if matrix.index not in self._units:
                self.exchange.broadcast(matrix.param.data, 0)

    def shard_of(self, matrix: Matrix) -> Shard:
        param = matrix.param
        if not isinstance(param, DTensor):
            return whole_matrix(matrix)
        return rows_from(self._first_rows[matrix.index] * math.prod(matrix.full_shape[1:]), local_part(param))

    def norms(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """One all-reduce for all: a part that several processes hold counts once."""
        if not grads:
            return []
        squares = [torch.linalg.vector_norm(_local(grad), dtype=torch.float64).square() for grad in grads]
        shares = [_parts(grad) / self._mesh.size() for grad in grads]
        total = torch.stack([square.to(self.device) * share for square, share in zip(squares, shares)])
        return list(self.exchange.sum(total).sqrt().float().unbind())

    def compute_dtype(self, matrices: Sequence[Matrix]) -> torch.dtype:
        """What the weights are gathered in."""
        own = [(self._units.get(matrix.index), matrix.param.dtype) for matrix in matrices]
        dtypes = {dtype if unit is None else unit.mp_policy.param_dtype or dtype for unit, dtype in own}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def arrival(self, matrix: Matrix) -> Callable[[Tensor], Arrived] | None:
        param = matrix.param
        if not isinstance(param, DTensor):
            return None
        first = self._first_rows[matrix.index]
        copies, device, exchange = self._mesh.size() / _parts(param), self.device, self.exchange

        def arrived(grad: Tensor) -> Arrived:
            # It is the mean already: this makes it a part of the sum that the mean is then taken of.
            return Arrived(_local(grad).to(device), first, 1 / (exchange.mean_scale * copies))

        return arrived

    def mark(self, matrix: Matrix, local: Tensor) -> Tensor:
        param = matrix.param
        return _like(param, local, torch.Size(matrix.full_shape)) if isinstance(param, DTensor) else local

    def parts(self, matrix: Matrix) -> int:
        return _parts(matrix.param)

    def check(self, rest: Sequence[Tensor]) -> None:
        """No gathered weight outlives the step, and the module's parameters are this optimizer's."""
        for sharded in self._modules:
            sharded.reshard()  # at once where it is; after set_reshard_after_backward(False) it is not
        for module, name, matrix in self._slots:
            now = module._parameters.get(name)
            if now is not matrix.param and (isinstance(now, DTensor) or not isinstance(matrix.param, DTensor)):
                raise RuntimeError(replaced(matrix))

    def rows(self, matrix: Matrix, whole: Tensor) -> Tensor:
        param = matrix.param
        if not isinstance(param, DTensor):
            return whole
        size, first = compute_local_shape_and_global_offset(whole.shape, param.device_mesh, param.placements)
        return _like(param, whole[first[0] :][: size[0]].to(param.device), whole.shape)

    def like_weight(self, matrix: Matrix, flat: Tensor) -> Tensor:
        param = matrix.param
        if not isinstance(param, DTensor):
            return flat.view(matrix.full_shape)
        return _like(param, flat.view(-1, *matrix.full_shape[1:]), param.shape)


class FullyShard(Engine):
    """Runs of :class:`Shards`."""

    def refuse(self, model: nn.Module) -> None:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise OptionError(
                "FullyShardedDataParallel (FSDP1) flattens the weights, of which no matrix is left: shard the model with "
                "torch.distributed.fsdp.fully_shard (in Accelerate, fsdp_version: 2)"
            )

    def connect(
        self, model: nn.Module | None, matrices: Sequence[Matrix], group: dist.ProcessGroup | None
    ) -> Backend | None:
        sharded = [matrix for matrix in matrices if isinstance(matrix.param, DTensor)]
        if model is None or not (sharded or any(isinstance(module, FSDPModule) for module in model.modules())):
            return None
        gone = [m for m in matrices if not isinstance(m.param, DTensor) and not _is_in_place(m)]
        if gone:
            raise OptionError(
                f"fully_shard has put another parameter in the place of {gone[0].name!r}, and {len(gone)} in all, since this "
                "optimizer was built: build it after fully_shard"
            )
        return Shards(model, matrices, group) if any(isinstance(p, DTensor) for p in model.parameters()) else None


# ---------------------------------------------------------------------- FSDP2's own names, in one place


def _units(module: FSDPModule) -> Iterator[Any]:
    """The groups of parameters that are gathered and reduced together; of each, ``fsdp_params``, ``mp_policy`` and
    ``gradient_divide_factor`` are read. The list has been one since torch 2.12.
    """
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    yield from groups if groups is not None else filter(None, [state._fsdp_param_group])


# ---------------------------------------------------------------------- where a parameter lies


def _unit_of(matrix: Matrix, units: dict[Tensor, Any]) -> Any:
    param: Any = matrix.param
    unit = units.get(param)
    placed = f"{matrix.name!r} of placements {param.placements} on the mesh {param.device_mesh}"
    if unit is None:
        raise OptionError(
            f"{placed} is sharded by none of the model's fully_shard modules. Tensor parallelism is not served yet: exclude "
            "the matrix, or keep it to fully_shard; and pass the module that fully_shard was called on"
        )
    if unit.mesh_info.mesh != param.device_mesh:
        raise OptionError(f"{placed} is cut by tensor parallelism too, which is not served yet: exclude it")
    for placement in param.placements:
        if type(placement) is not Replicate and not (type(placement) is Rows and placement.dim == 0):
            raise OptionError(f"{placed} is not cut by rows alone: leave shard_placement_fn out for it, or exclude it")
    return unit


def _check_eight_bits(matrix: Matrix, device: torch.device) -> None:
    param = matrix.param
    if not isinstance(local_part(param), Int8Weight):
        return
    if len(param) % _parts(param):
        raise OptionError(
            f"weights='int8' needs rows that {_parts(param)} shards divide, and {matrix.name!r} has {len(param)}: fully_shard "
            "over another number of processes, or exclude it"
        )
    if local_part(param).device.type != device.type:
        raise OptionError(
            f"weights='int8' with CPUOffloadPolicy is not served yet, and {matrix.name!r} lies on the host: leave one of them "
            "out"
        )


def _one_mesh(matrices: Sequence[Matrix], others: Iterable[Tensor]) -> DeviceMesh:
    """That of the matrices; where ``ignored_params`` has left all of them plain, that of the others."""
    for some in ([matrix.param for matrix in matrices], others):
        meshes = {param.device_mesh for param in some if isinstance(param, DTensor)}
        if len(meshes) > 1:
            raise OptionError(f"the matrices lie on {len(meshes)} meshes: give each of them an optimizer of its own")
        if meshes:
            return meshes.pop()
    raise AssertionError("a sharded model without a mesh")


def _group_of(mesh: DeviceMesh, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """All processes of the mesh: those of a row of an HSDP mesh alone would let the replicas drift apart."""
    ranks = sorted(mesh.mesh.flatten().tolist())
    if group is None and len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    if group is None and mesh.ndim == 1:
        return mesh.get_group()
    if group is None:
        raise OptionError(
            f"the mesh {mesh} has {len(ranks)} of {dist.get_world_size()} processes: pass process_group=, a group of them all"
        )
    if sorted(dist.get_process_group_ranks(group)) != ranks:
        raise OptionError(
            f"process_group has the ranks {sorted(dist.get_process_group_ranks(group))}, and the mesh of the matrices {ranks}: "
            "sketches are to be added up over all of the mesh, and over no others"
        )
    return group


def _is_in_place(matrix: Matrix) -> bool:
    return any(module._parameters[name] is matrix.param for module, name in matrix.slots)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parts(tensor: Tensor) -> int:
    """Into how many parts it is cut."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(tensor.placements) if placement.is_shard())


def _first_row(param: DTensor) -> int:
    """The first that this process holds; as many as there are where it holds none."""
    offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)[1]
    return min(offset[0], len(param))


def _like(param: DTensor, local: Tensor, shape: torch.Size) -> DTensor:
    """A DTensor that lies as ``param`` does, of this process's rows."""
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    meta = TensorMeta(shape, stride, local.dtype)
    # from_local would move it to the mesh's device, and with CPUOffloadPolicy the parameters lie elsewhere.
    return DTensor(local, DTensorSpec(param.device_mesh, param.placements, meta), requires_grad=False)


# Before DDP's, which takes whatever several processes have.
ENGINES.insert(0, FullyShard())
