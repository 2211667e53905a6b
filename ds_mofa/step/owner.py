"""What one rank keeps of the matrices that it owns, on the device or on the host, and the passes over it.

A rule (:mod:`ds_mofa.rules`) says which tensors those are; here they are a flat buffer, worked on in sub-batches.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_mofa.partition.layout import FactorSegment, Layout, SketchSegment
from ds_mofa.partition.subbatches import Part, split, temporaries
from ds_mofa.rules.rule import Rule
from ds_mofa.step.backend import Backend
from ds_mofa.weights.staging import Staging

__all__ = ["Owner", "Piece"]

_SLICE = 1 << 24  # elements of a rank's state that are gathered at a time


class Piece(NamedTuple):
    """Matrices of one shape that a rule works on together.

    Attributes:
        part: which.
        state: the rule's tensors of them, on the device; empty where they were not asked for.
        Y: (B, m, R), the mean sketch, or the new left.
        Z: (B, n, R), likewise, or the new right.
        spectrum: (B, R), room beside the sketches, or the new spectrum.
    """

    part: Part
    state: tuple[Tensor, ...]
    Y: Tensor
    Z: Tensor
    spectrum: Tensor


class Owner:
    """This rank's matrices.

    Args:
        places: :class:`ds_mofa.partition.layout.Place` of every parameter.
        rule: what is kept of each.
        update_bytes: bound on the temporaries of a sub-batch.
        backend: which ranks share them, where the state is worked on, and where it is kept.
        dtype: of the state.
        staging: the way between the two.

    Attributes:
        layout: of the buffers that are sent.
        sub_batches: of this rank's matrices, in that layout.
        blocks: likewise, whole.
        state_layout: of the state.
        state: this rank's segment of it, flat.
    """

    def __init__(
        self,
        places: Sequence[tuple],
        rule: Rule,
        update_bytes: float,
        *,
        backend: Backend,
        dtype: torch.dtype,
        staging: Staging,
    ):
        exchange = backend.exchange
        self.layout = Layout(places, rule.columns, exchange.world_size)
        self.state_layout = Layout(places, rule.r, exchange.world_size, rule.field_shapes)
        self.blocks = self.layout.owned_by(exchange.rank)
        self.sub_batches = split(self.blocks, update_bytes, functools.partial(temporaries, r=rule.r))
        states = dict(zip(self.blocks, self.state_layout.owned_by(exchange.rank), strict=True))
        self._states = [[Part(states[p.block], p.first, p.last) for p in parts] for parts in self.sub_batches]
        self._exchange, self._device, self._host, self._staging = exchange, backend.device, backend.host, staging
        self._start = exchange.rank * self.layout.segment
        self._state_start = exchange.rank * self.state_layout.segment
        self.state = self.zeros(self.state_layout.segment, dtype, backend.device)

    def zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what offloading moves to the host, or on ``device``."""
        return torch.zeros(numel, dtype=dtype, device=device) if self._host is None else self._host.zeros(numel, dtype)

    def passes(self, segment: SketchSegment | FactorSegment, *, back: bool = False) -> Iterator[list[Piece]]:
        """The pieces of each sub-batch in turn. Of offloaded state only the current sub-batch's is on the device.

        Args:
            segment: of this rank, of the sketches or of what is made of them.
            back: keep what has been written into the state. Exhaust the iterator then.
        """
        for parts, states in zip(self.sub_batches, self._states_here(back), strict=True):
            yield [Piece(part, tuple(state), *part.views(segment, self._start)) for part, state in zip(parts, states)]

    def pieces(self, segment: SketchSegment | FactorSegment) -> Iterator[Piece]:
        """All pieces, without their state."""
        for parts in self.sub_batches:
            for part in parts:
                yield Piece(part, (), *part.views(segment, self._start))

    def kept(self, flat: Tensor | None = None) -> Iterator[tuple[Part, tuple[Tensor, ...]]]:
        """Each piece's state where it is kept, or in ``flat``, of the same layout."""
        flat = self.state if flat is None else flat
        for parts, states in zip(self.sub_batches, self._states):
            for part, state in zip(parts, states):
                yield part, state.views(flat, self._state_start)

    def store(self, new: Tensor) -> None:
        """Let ``new``, of the state's layout, be the state. Neither may be written before the staging has finished."""
        if self._host is None:
            self.state.copy_(new)
        else:
            self._staging.send(new, self.state)

    def whole(self) -> Tensor | None:
        """Every rank's state on the CPU of the group's rank 0, gathered by slices; None elsewhere. Collective."""
        world, segment = self._exchange.world_size, self.state_layout.segment
        if world == 1:
            return self.state.cpu()
        whole = self.state.new_empty(world, segment, device="cpu") if self._exchange.rank == 0 else None
        for first in range(0, segment, _SLICE):
            parts = self._exchange.gather(self.state[first : first + _SLICE].to(self._device))
            if whole is not None and parts is not None:
                whole[:, first : first + _SLICE] = torch.stack([part.cpu() for part in parts])
        return None if whole is None else whole.view(-1)

    def everywhere(self) -> Tensor:
        """Every rank's state, on every rank's device. Collective."""
        flat = torch.zeros(self.state_layout.numel, dtype=self.state.dtype, device=self._device)
        flat.narrow(0, self._state_start, self.state_layout.segment).copy_(self.state)
        self._exchange.all_gather(flat, self.state_layout.segment)
        return flat

    def load(self, whole: Tensor) -> None:
        """This rank's segment of what :meth:`whole` has given."""
        self.state.copy_(whole.narrow(0, self._state_start, self.state_layout.segment))

    def _states_here(self, back: bool) -> Iterator[Sequence[Sequence[Tensor]]]:
        """The state of each part of each sub-batch, on the device."""
        views = [[part.views(self.state, self._state_start) for part in parts] for parts in self._states]
        if self._host is None:
            yield from views
            return
        flat = [[view for state in states for view in state] for states in views]
        for states, staged in zip(views, self._staging.passes(flat, back=back), strict=True):
            remaining = iter(staged)
            yield [[next(remaining) for _ in state] for state in states]
