"""The capture of stacked experts, (E, m, n): each token goes to some of E linear maps (:mod:`ds_mofa.capture.grouped`).

It serves transformers' modules whose forward is a function of its registry of experts functions, whichever is chosen there, and
some with a forward of their own (:mod:`ds_mofa.parameters.experts`): the forward becomes one that computes the same, with
grouped products.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_mofa.capture.grouped import Permuted, SketchedExperts, product
from ds_mofa.capture.held import holds, leaf_in, own_weight, refuse_replaced, replace_forward
from ds_mofa.capture.sink import Gathered, Sink
from ds_mofa.parameters import Matrix
from ds_mofa.parameters.experts import Kind, is_transposed, kind_of, weights_of

__all__ = ["ExpertsCapture"]

Sinks = dict[str, tuple[Sink, Gathered | None, Callable[[nn.Module, Tensor], bool]]]  # by the parameter's name


class ExpertsCapture:
    """Replaces the ``forward`` of each of transformers' modules of stacked experts."""

    def serves(self, module: nn.Module, matrix: Matrix) -> bool:
        name = matrix.name.rpartition(".")[2]
        return name in weights_of(module) and holds(module, matrix, name)

    def attach(self, module: nn.Module, matrix: Matrix, sink: Sink, gathered: Gathered | None) -> Callable[[], None]:
        """See :class:`ds_mofa.capture.sink.Capture`. The forward is replaced with the first of its weights, and put back with
        the last.
        """
        name = matrix.name.rpartition(".")[2]
        sink.leaf = leaf_in(module, name)
        present = vars(module).get("forward")
        own = getattr(present, "__func__", None)
        if isinstance(getattr(own, _SINKS, None), dict):
            sinks, undo = getattr(own, _SINKS), getattr(own, _UNDO)
        else:
            refuse_replaced(module, type(module).forward)
            sinks = {}
            function = _forward_of(module, sinks)
            undo = replace_forward(module, function)
            setattr(function, _SINKS, sinks)
            setattr(function, _UNDO, undo)
        entry = sinks[name] = sink, gathered, own_weight(matrix.param, name)

        def remove() -> None:
            if sinks.get(name) is entry:
                del sinks[name]
            if not sinks:
                undo()

        return remove


_SINKS, _UNDO = "ds_mofa_sinks", "ds_mofa_undo"


def _forward_of(module: Any, sinks: Sinks) -> Callable[..., Tensor]:
    compute = functools.partial(_COMPUTED[kind_of(module)], module, _Projections(module, sinks))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        plain = self is not module or torch._C._get_tracing_state() is not None
        if plain or torch._C._are_functorch_transforms_active():
            return type(module).forward(self, *args, **kwargs)
        if not all(is_own(self, getattr(self, name)) for name, (_, _, is_own) in sinks.items()):
            return type(module).forward(self, *args, **kwargs)
        return compute(*args, **kwargs)

    return forward


class _Projections:
    """A module's products with its experts; see :class:`ds_mofa.capture.grouped.SketchedExperts`."""

    def __init__(self, module: nn.Module, sinks: Sinks):
        self._module, self._sinks, self._transposed = module, sinks, is_transposed(module)

    def __call__(
        self, name: str, x: Tensor, ends: Tensor, rows: Tensor | None = None, back: Tensor | None = None
    ) -> Tensor:
        """x times the weights of this name."""
        weight: Any = getattr(self._module, name)
        x = x.to(_autocast(x) or weight.dtype)
        if torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad):
            any_gathered = next((gathered for _, gathered, _ in self._sinks.values()), None)
            sink, gathered = self._sinks[name][:2] if name in self._sinks else (None, any_gathered)
            return SketchedExperts.apply(x, weight, ends, self._transposed, sink, gathered, rows, back)
        return product(x if rows is None else x[rows], weight, ends, self._transposed)


def _registered(
    module: Any, project: _Projections, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers' experts functions compute."""
    tokens, k = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    ends = _ends(experts, module.num_experts)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    x = project(first, hidden_states, ends, (order // k).int(), back)
    x = x + _bias(module, first, experts, x) if module.has_bias else x
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = project("down_proj", x, ends)
    x = x + _bias(module, "down_proj", experts, x) if module.has_bias else x
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    x = Permuted.apply(x, back, order)
    return x.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def _sorted(module: Any, project: _Projections, x: Tensor, counts: Tensor | Sequence[int]) -> Tensor:
    """Of rows that are sorted by expert already: x (S, in), and how many each expert has, (E,)."""
    ends = torch.as_tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
    return project("weight", x, ends)


def _batched(module: Any, project: _Projections, hidden_states: Tensor) -> Tensor:
    """Llama 4's: every expert has all tokens, (E * T, in), of which the router has weighed most with zero."""
    E = module.num_experts
    ends = hidden_states.shape[0] // E * torch.arange(1, E + 1, dtype=torch.int32, device=hidden_states.device)
    gate, up = project("gate_up_proj", hidden_states, ends).chunk(2, dim=-1)
    return project("down_proj", up * module.act_fn(gate), ends)


_COMPUTED: dict[Kind | None, Callable[..., Tensor]] = {
    Kind.REGISTERED: _registered,
    Kind.SORTED: _sorted,
    Kind.BATCHED: _batched,
}


def _autocast(x: Tensor) -> torch.dtype | None:
    """What products are to be computed in, where that is not the weights' dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else None


def _ends(experts: Tensor, count: int) -> Tensor:
    """Where each expert's rows end, (count,), int32, of the sorted experts of all rows; the host waits for nothing."""
    numbers = torch.arange(count, dtype=experts.dtype, device=experts.device)
    return torch.searchsorted(experts, numbers, right=True, out_int32=True)


def _bias(module: nn.Module, name: str, experts: Tensor, like: Tensor) -> Tensor:
    """Each row's, (S, out)."""
    return getattr(module, f"{name}_bias").to(like.dtype)[experts]
