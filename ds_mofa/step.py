"""One optimizer step of all matrices: reduce the sketches, update the factors, gather them, write the weights.

This is the core that every backend shares. It knows a process group through :class:`~ds_mofa.partition.Exchange`
and the weights through a function that gives this rank's shard of a matrix; it does not know DeepSpeed.
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_mofa import sketch as sketching
from ds_mofa.diagnostics import MEASURES, Report, measure
from ds_mofa.factors import (
    Batch,
    Factors,
    Grams,
    gram_matrices,
    live_directions,
    projected_norm,
    start_factors,
    update_many,
)
from ds_mofa.head import FusedHead
from ds_mofa.host_weights import write_wherever
from ds_mofa.kernels import triton_serves
from ds_mofa.masters import Masters
from ds_mofa.options import Options
from ds_mofa.parameters import Matrix
from ds_mofa.partition import Exchange, Layout
from ds_mofa.phases import phase
from ds_mofa.staging import HostMemory, Staging
from ds_mofa.state import packed, unpack
from ds_mofa.subbatches import Part, split
from ds_mofa.weights import Rounding, Shard, rounding_key

__all__ = ["MatrixStep", "full_fp32", "whole_matrix"]

_SLICE = 1 << 24  # elements of a rank's factors that are gathered at a time
_MOST_BALANCED = 10.0  # a matrix without new gradients, an expert that no token goes to, has ever less momentum
_LARGEST_NORM = 1e18  # the square of more overflows in fp32, in which DeepSpeed adds the norms up
_NO_NUMBER = (
    f"the gradient holds a NaN or Inf, or its norm is above {_LARGEST_NORM:g}. In fp16 a few such steps are how the "
    'loss scale is found; else look for bad records, lower "lr", or set "gradient_clipping"'
)
_NO_FACTORS = (
    "an SVD has not converged on one of them, so the matrices stay as they are (AdamW's part is done). If it happens "
    'again, lower "lr" or "rank", or resume from a checkpoint before the first time'
)

logger = logging.getLogger("ds_mofa")


def whole_matrix(matrix: Matrix) -> Shard:
    """The shard of a rank that holds all of W."""
    return Shard(matrix.param.data.view(-1))


class MatrixStep:
    """Factors, sketches and working copies of all matrices, and the step that moves them.

    Memory on each of N ranks, with F = sum of r (m + n + 1) over the matrices: sketches 4 F bytes, working copies
    2 F (4 F for fp32 weights), fp32 factors 4 F / N. During a step another 4 F / N for the reduced sketches, over which
    the new factors are written, and at most ``options.update_bytes`` of temporaries.

    With ``host`` the fp32 factors and masters lie there. The factors of one sub-batch after the other are read through
    two buffers, less than a quarter of ``update_bytes`` each; masters, and weights that the backend keeps on the host,
    are written through two of ``host_weights.CHUNK_BYTES``.

    Args:
        matrices: what to train.
        options: of the optimizer.
        exchange: the collectives.
        device: of the buffers.
        shard_of: this rank's part of a matrix; asked anew in every step.
        gathered: see :func:`ds_mofa.sketch.attach`.
        host: where to keep the fp32 factors and masters; None for ``device``.
        head: to change the model by, where the options say ``fused_head``.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        options: Options,
        *,
        exchange: Exchange,
        device: torch.device,
        shard_of: Callable[[Matrix], Shard] = whole_matrix,
        gathered=None,
        host: HostMemory | None = None,
        head: FusedHead | None = None,
    ):
        self.matrices, self.options, self.exchange, self._shard_of = list(matrices), options, exchange, shard_of
        self._device, self._host, self._staging = device, host, Staging(device)
        places = [(matrix.shape, matrix.group) for matrix in matrices]
        self.layout = Layout(places, options.rank, exchange.world_size)
        self._mine = self.layout.owned_by(exchange.rank)
        self._sub_batches = split(self._mine, options.update_bytes)
        self._segment_start = exchange.rank * self.layout.segment

        compute = _compute_dtype(matrices)
        exact = torch.float64 if compute == torch.float64 else torch.float32
        self.sketches = torch.zeros(self.layout.numel, dtype=exact, device=device)
        self.working = torch.zeros(self.layout.numel, dtype=compute, device=device)
        self.factors = self._state_zeros(self.layout.segment, exact, device)
        self._pending: Tensor | None = None
        self._grams: list[Grams] | None = None
        self._norm: Tensor | None = None
        self._finite: bool | None = None
        self.steps = 0
        self.skipped = 0
        self.report: Report | None = None  # the last one
        self.on_report: Callable[[Report], None] | None = None
        self._draw_test_matrices()

        wanted = options.master_weights and compute in (torch.bfloat16, torch.float16)
        self.masters = Masters(wanted, self.matrices, exchange, device, shard_of, self._state_zeros)

        views = [
            (self.layout.views(self.sketches, i), self.layout.views(self.working, i)) for i in range(len(matrices))
        ]
        self._queue = sketching.Queue.serving(self.working, self.sketches, options.rank)
        sketches = [sketching.Sketch(Y, Z, U, V, self._queue) for (Y, Z, _), (U, V, _) in views]
        self._attachment = sketching.attach(self.matrices, sketches, options.capture, gathered)
        self._head = head
        if head is not None:
            captured = zip(self.matrices, sketches) if options.capture == "linear" else ()
            head.attach(next((sketch for matrix, sketch in captured if matrix.param is head.weight), None))

    # ------------------------------------------------------------------ the step, in its order

    @torch.no_grad()
    def reduce(self, loss_scale: float = 1.0) -> None:
        """Give every owner the mean sketches of its matrices, and every rank their norm. Collective.

        Args:
            loss_scale: what the loss was multiplied by.
        """
        with phase("reduce"):
            self._reduce(loss_scale)

    def _reduce(self, loss_scale: float) -> None:
        if self._queue is not None:
            self._queue.take()
        pending = self.exchange.reduce_scatter(self.sketches, self.layout.segment)
        pending.mul_(self.exchange.mean_scale / loss_scale)
        self.sketches.zero_()
        if self.started:
            self._grams = [gram_matrices(*batch) for batch in self._batches(pending)]  # one after the other
            nothing = pending.new_zeros((), dtype=torch.float64)  # an owner of no matrix adds up in the others' dtype
            square = sum((projected_norm(*grams).sum() for grams in self._grams), nothing)
        else:  # E |G Omega|^2 = |G|^2, and the same of the other sketch
            square = pending.square().sum() / 2
        norm = self.exchange.sum(square).sqrt()
        self._norm, self._finite = torch.where(norm < _LARGEST_NORM, norm, math.inf), None
        self._pending = pending

    def _batches(self, pending: Tensor) -> Iterator[Batch]:
        """Factors, Y and Z of each part of the sub-batches; of those before the last, offloaded factors are gone."""
        for batches in self._batches_together(pending):
            yield from batches

    def _batches_together(self, pending: Tensor) -> Iterator[list[Batch]]:
        for parts, factors in zip(self._sub_batches, self._factors_here(), strict=True):
            sketches = [part.views(pending, self._segment_start) for part in parts]
            yield [(Factors(U, sigma, V), Y, Z) for (U, V, sigma), (Y, Z, _) in zip(factors, sketches)]

    def _factors_here(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """U, V and sigma of each part of each sub-batch, on the device."""
        views = [[part.views(self.factors, self._segment_start) for part in parts] for parts in self._sub_batches]
        if self._host is None:
            yield from views
            return
        for staged in self._staging.passes([[view for triple in triples for view in triple] for triples in views]):
            yield [tuple(staged[i : i + 3]) for i in range(0, len(staged), 3)]

    @property
    def norm(self) -> Tensor:
        """Norm of all matrices' projected gradients, from the last :meth:`reduce`; the same on every rank.

        In the first step an unbiased estimate of the whole gradient's norm. Inf if any sketch on any rank holds a
        NaN or Inf, or where it would be above 1e18.
        """
        return self._norm

    @property
    def finite(self) -> bool:
        """Whether the reduced sketches can be used, the same on every rank; the host waits for it once a step."""
        if self._finite is None:
            self._finite = bool(torch.isfinite(self._norm))
        return self._finite

    @property
    def pending(self) -> bool:
        """Whether reduced sketches wait to be used or discarded."""
        return self._pending is not None

    @property
    def started(self) -> bool:
        return self.steps > 0

    @torch.no_grad()
    def update(self, groups: Sequence[Mapping[str, Any]], clip: float | Tensor = 1.0) -> None:
        """Move factors and weights by the pending sketches. Collective.

        Args:
            groups: the matrix param groups, for ``lr`` and ``weight_decay``.
            clip: factor on the gradient, <= 1, from clipping by the global norm.
        """
        new, grams = self._pending, self._grams
        with phase("factor update"), full_fp32():
            self._publish(new if self._update_factors(clip) else None)
        self.drop_pending()
        with phase("gather"):
            self.exchange.all_gather(self.working, self.layout.segment)
            if self._an_owner_failed():
                self._take_back()
                self.discard(_NO_FACTORS)
                return
            if grams is not None and self._reports_now():
                self._report(grams, new, clip)
            self._keep(new)
        self.steps += 1
        with phase("apply"):
            self._apply(groups)
            self._staging.finish()  # a checkpoint, ZeRO's gathering: whoever reads the host's memory next may do so

    def discard(self, reason: str = _NO_NUMBER) -> None:
        """Skip this step: factors and weights stay as they are."""
        self.drop_pending()
        self.skipped += 1
        if self.exchange.rank == 0:
            logger.warning("ds_mofa: step skipped on every rank, %d so far: %s", self.skipped, reason)

    def drop_pending(self) -> None:
        """Forget what the last :meth:`reduce` has given."""
        self._pending, self._grams = None, None

    def clear(self) -> None:
        """Forget what the micro-batches since the last :meth:`reduce` have added."""
        if self._queue is not None:
            self._queue.forget()
        self.sketches.zero_()

    def detach(self) -> None:
        """Put the model back as it was before this object."""
        if self._head is not None:
            self._head.remove()
        self._attachment.remove()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All factors by the names of their matrices, on the CPU of the group's rank 0; empty elsewhere. Collective."""
        flat = self._gather_factors()
        if flat is None:
            return {}
        return packed(flat, self.layout, self.matrices, steps=self.steps, skipped=self.skipped)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over factors, whoever owned them when they were saved. Collective; rank 0's ``state`` counts.

        Factors of another rank are grown or truncated to this run's, see :func:`ds_mofa.factors.resized`, which is
        printed.

        Raises:
            ValueError: another format, or matrices of other names or shapes than this model's. Nothing has changed.
        """
        device, exact = self._device, self.factors.dtype
        flat = torch.zeros(self.layout.numel, dtype=exact, device=device)
        counters = torch.zeros(2, dtype=torch.int64, device=device)
        problem = None
        if self.exchange.rank == 0:
            problem = unpack(state or {}, self.layout, self.matrices, self.options.rank, flat, counters)
        self._agree(problem)
        self.exchange.broadcast(flat, 0)
        self.exchange.broadcast(counters, 0)
        self.steps, self.skipped = (int(value) for value in counters)
        self.drop_pending()
        self.clear()
        self.factors.copy_(flat.narrow(0, self._segment_start, self.layout.segment))
        if self.started:
            self.working.copy_(flat)
        else:
            self._draw_test_matrices()

    def _state_zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what offloading moves to the host, or on ``device``."""
        return torch.zeros(numel, dtype=dtype, device=device) if self._host is None else self._host.zeros(numel, dtype)

    # ------------------------------------------------------------------ parts

    def _update_factors(self, clip: float | Tensor) -> bool:
        """Write the new factors over the pending sketches that they come from. False where a decomposition of the
        library's has failed; then what is there is neither.
        """
        beta, gamma = self.options.beta, self.options.gamma * clip  # a clipped gradient is a lighter one
        try:
            if self.started:
                grams = iter(self._grams)
                for parts, batches in zip(self._sub_batches, self._batches_together(self._pending), strict=True):
                    own = list(itertools.islice(grams, len(batches)))
                    self._put(parts, update_many(batches, beta=beta, gamma=gamma, grams=own))  # and let go of them
            else:
                for part in itertools.chain.from_iterable(self._sub_batches):
                    self._put([part], [self._start(part, gamma)])
        except torch.linalg.LinAlgError as error:
            logger.warning("ds_mofa: rank %d: %s", self.exchange.rank, error)
            return False
        return True

    def _start(self, part: Part, gamma: float | Tensor) -> Factors:
        Y, Z, _ = part.views(self._pending, self._segment_start)
        psi, _, _ = part.views(self.working)
        return start_factors(Y, Z, psi.to(Y.dtype), gamma=gamma)

    def _put(self, parts: Sequence[Part], updated: Sequence[Factors]) -> None:
        for part, new in zip(parts, updated, strict=True):
            views = part.views(self._pending, self._segment_start)
            for view, value in zip(views, (new.U, new.V, new.sigma), strict=True):
                view.copy_(value)

    def _publish(self, flat: Tensor | None) -> None:
        """Write this rank's part of the working copies. NaN in the place of coefficients says that it has none: so the
        other owners learn of it by the all-gather that they are about to make.

        Args:
            flat: the factors of this rank's segment, on any device.
        """
        level = self._level(flat) if self.options.balance else None
        for block in self._mine:
            left, right, coefficients = block.views(self.working)
            if flat is None:
                coefficients.fill_(math.nan)
                continue
            U, V, sigma = block.views(flat, self._segment_start)
            left.copy_(U)
            right.copy_(V)
            coefficients.copy_(self._coefficients(sigma.to(self._device), level))

    def _level(self, flat: Tensor | None) -> Tensor:
        """The mean of log |sigma| over all matrices with momentum. Collective."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        if flat is not None and self._mine:
            sigmas = [block.views(flat, self._segment_start)[2] for block in self._mine]
            norms = torch.cat([sigma.norm(dim=-1) for sigma in sigmas]).to(self._device, torch.float64)
            moving = norms > 0
            sums = torch.stack([torch.where(moving, norms, 1.0).log().sum(), moving.sum().double()])
        total, count = self.exchange.sum(sums)
        return total / count.clamp_min(1)

    def _an_owner_failed(self) -> bool:
        if self.started and triton_serves(self.working):
            return False  # its SVD raises nothing, and the host need not wait for the gathered coefficients
        coefficients = [block.views(self.working)[2] for block in self.layout.blocks]
        return not bool(torch.stack([torch.isfinite(part).all() for part in coefficients]).all())

    def _take_back(self) -> None:
        """Make the working copies once more what they were before :meth:`_publish`. Collective."""
        if not self.started:
            self.working.zero_()
            self._draw_test_matrices()
            return
        self._publish(self.factors)
        self.exchange.all_gather(self.working, self.layout.segment)

    def _keep(self, new: Tensor) -> None:
        if self._host is None:
            self.factors.copy_(new)
        else:
            self._staging.send(new, self.factors)

    def _reports_now(self) -> bool:
        every = self.options.diagnostics_every
        return every > 0 and (self.steps + 1) % every == 0

    def _report(self, grams: Sequence[Grams], new: Tensor, clip: float | Tensor) -> None:
        """Measure this rank's matrices, and give every rank the measures of all. Collective, before ``_keep``."""
        gamma = self.options.gamma * clip
        values = torch.zeros(len(self.matrices), len(MEASURES), dtype=torch.float64, device=self._device)
        parts = itertools.chain.from_iterable(self._sub_batches)
        for part, (left, right) in zip(parts, grams, strict=True):
            old_sigma, new_sigma = (part.views(flat, self._segment_start)[2] for flat in (self.factors, new))
            members = torch.tensor(part.members, device=self._device)
            values[members] = measure(
                old_sigma.to(self._device), left, right, new_sigma, beta=self.options.beta, gamma=gamma
            )
        names = [matrix.name for matrix in self.matrices]
        self.report = Report(self.steps + 1, self.skipped, names, self.exchange.sum(values))
        if self.on_report is not None:
            self.on_report(self.report)

    def _coefficients(self, sigma: Tensor, level: Tensor | None) -> Tensor:
        """What the columns of U are multiplied by in the update, (B, r); ``level`` where matrices are balanced."""
        coefficients = live_directions(sigma)
        if self.options.update_rule == "inverse_sigma":
            coefficients = coefficients * sigma.reciprocal().clamp_max(self.options.inverse_sigma_clamp)
        if level is not None:
            norm = sigma.norm(dim=-1, keepdim=True)
            factor = (self.options.balance * (level - norm.double().log())).exp()  # without momentum nothing moves
            coefficients = coefficients * factor.clamp(1 / _MOST_BALANCED, _MOST_BALANCED).to(sigma.dtype)
        return coefficients

    def _apply(self, groups: Sequence[Mapping[str, Any]]) -> None:
        rounding = Rounding(self.options.rounding == "stochastic", self.options.seed, self.steps)
        for block in self.layout.blocks:
            U, V, coefficients = block.views(self.working)
            group = groups[block.group]
            write_wherever(
                self._staging,
                [self._shard_of(self.matrices[index]) for index in block.members],
                U,
                V,
                coefficients,
                indices=block.members,
                step_size=float(group["lr"]) * self.options.shape_factor(*block.shape),
                decay=1.0 - float(group["lr"]) * group["weight_decay"],
                rounding=rounding,
                masters=self.masters.of(block.members),
            )

    def _draw_test_matrices(self) -> None:
        """Psi in the place of U and Omega in that of V: Gaussian of variance 1 / r, so that |G Omega| ~ |G|."""
        for matrix in self.matrices:
            generator = torch.Generator().manual_seed(rounding_key(Rounding(False, self.options.seed), matrix.index))
            for view in self.layout.views(self.working, matrix.index)[:2]:
                draw = torch.randn(view.shape, generator=generator) / math.sqrt(self.options.rank)
                view.copy_(draw)

    def _gather_factors(self) -> Tensor | None:
        """A whole flat buffer on the CPU of the group's rank 0, gathered by slices; None elsewhere."""
        if self.exchange.world_size == 1:
            return self.factors.cpu()
        root, group = self.exchange.rank == 0, self.exchange.group
        whole = self.factors.new_empty(self.exchange.world_size, self.layout.segment, device="cpu") if root else None
        for first in range(0, self.layout.segment, _SLICE):
            mine = self.factors[first : first + _SLICE].to(self._device)
            parts = [torch.empty_like(mine) for _ in range(self.exchange.world_size)] if root else None
            dist.gather(mine, parts, dst=dist.get_global_rank(group, 0), group=group)
            if root:
                whole[:, first : first + _SLICE] = torch.stack([part.cpu() for part in parts])
        return whole.view(-1) if root else None

    def _agree(self, problem: str | None) -> None:
        """Raise on every rank if rank 0 has a problem."""
        failed = self.exchange.sum(torch.tensor([float(problem is not None)], device=self._device))
        if failed:
            raise ValueError(problem or "rank 0 could not load the MoFaSGD state; its message says why")


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Within: fp32 products on a GPU are fp32. Scripts switch TF32 on for the model; it has three digits, and the
    factors would lose their orthonormality to it.
    """
    matmul = torch.backends.cuda.matmul
    chosen = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = chosen


def _compute_dtype(matrices: Sequence[Matrix]) -> torch.dtype:
    """The dtype of the working copies: the matrices' own, or fp32 where they differ."""
    dtypes = {matrix.param.dtype for matrix in matrices}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
