"""One optimizer step of all matrices: reduce the sketches, update the owners' state, gather, write the weights.

This is the core that every backend and every update rule share. It knows other processes and the weights through a
:class:`~ds_mofa.step.backend.Backend`, and the maths through a :class:`~ds_mofa.rules.rule.Rule`.
"""

import contextlib
import itertools
import logging
import math
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_mofa.capture import together
from ds_mofa.capture.attach import attach
from ds_mofa.capture.head import FusedHead
from ds_mofa.capture.linear import multiply_in_eight_bits
from ds_mofa.capture.queue import Queue
from ds_mofa.capture.sketch import Sketch
from ds_mofa.kernels import triton_serves
from ds_mofa.kernels.random_bits import Rounding
from ds_mofa.kernels.shard import Shard, runs
from ds_mofa.options import OptimizerOptions
from ds_mofa.parameters import Matrix
from ds_mofa.partition.layout import FactorSegment, SketchSegment
from ds_mofa.partition.subbatches import Part
from ds_mofa.phases import phase
from ds_mofa.rules.diagnostics import Report, by_parameter
from ds_mofa.rules.rule import Rule
from ds_mofa.step import claims
from ds_mofa.step.backend import Backend
from ds_mofa.step.captured import CapturedUpdate
from ds_mofa.step.driver import RuleDriver
from ds_mofa.step.owner import Owner
from ds_mofa.step.state import packed, unpack
from ds_mofa.weights.host import write_wherever
from ds_mofa.weights.masters import Masters
from ds_mofa.weights.staging import Staging

__all__ = ["MatrixStep", "full_fp32"]

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


class MatrixStep:
    """Sketches, working copies and owners' state of all matrices, and the step that moves them.

    Memory on each of N ranks, with F = sum of r (m + n + 1) over the matrices: sketches 4 F bytes, working copies
    2 F (4 F for fp32 weights), and of the rule's fp32 state, which for MoFaSGD is 4 F bytes, an N-th. During a step
    another 4 F / N for the reduced sketches, over which the rule works, and at most ``options.update_bytes`` of
    temporaries. With ``options.explore`` = k all but the state has r + k columns, not r, and k (m + n) / 4
    bytes a matrix hold the random signs.

    With ``backend.host`` the fp32 state and masters lie there. The state of one sub-batch after the other is read through two
    buffers, less than a quarter of ``update_bytes`` each for MoFaSGD; masters, and weights that the backend keeps on
    the host, are written through two of ``host_weights.CHUNK_BYTES``.

    Args:
        matrices: what to train.
        options: of the optimizer.
        rule: the maths.
        backend: where the weights lie, and how processes reach each other.
        head: to change the model by, where the options say ``fused_head``.

    The matrices are this object's until :meth:`detach`, until another one is built over any of them, or until it is
    garbage: then the model is as it was before.

    Attributes:
        members: the matrices.
        factors: this rank's segment of the rule's state, flat.
        driver: of the rule, over them.
        captured: the sketch of each matrix.
        claim: on the matrices.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        options: OptimizerOptions,
        rule: Rule,
        backend: Backend,
        *,
        head: FusedHead | None = None,
    ):
        self._undo = contextlib.ExitStack()  # what puts the model back; it must not keep this object alive
        self.claim = claims.claim(options.title, {matrix.param: matrix.name for matrix in matrices}, self._undo.close)
        weakref.finalize(self, self._undo.close).atexit = False
        self.members, self.options, self.rule = list(matrices), options, rule
        self.backend, self.exchange = backend, backend.exchange
        self._device, self._staging = backend.device, Staging(backend.device)
        compute = backend.compute_dtype(matrices)
        exact = torch.float64 if compute == torch.float64 else torch.float32
        self.owner = Owner(
            [matrix.place for matrix in matrices],
            self.rule,
            options.update_bytes,
            backend=backend,
            dtype=exact,
            staging=self._staging,
        )
        self.layout, self.factors = self.owner.layout, self.owner.state
        self.sketches = torch.zeros(self.layout.numel, dtype=exact, device=self._device)
        self.working = torch.zeros(self.layout.numel, dtype=compute, device=self._device)
        self._pending: SketchSegment | None = None
        self._graphs: Callable[[], CapturedUpdate | None] = lambda: None
        self._norm: Tensor | None = None
        self._finite: bool | None = None
        self._owned: Tensor | None = None  # indices of this process's matrices, in the order of its pieces
        self.steps = 0
        self.skipped = 0
        self.report: Report | None = None  # the last one
        self.on_report: Callable[[Report], None] | None = None
        self.driver = RuleDriver(rule, self.owner, self.working, self.exchange, options.update_bytes)
        self.driver.prepare(self.steps)

        self.masters = Masters(
            options.master_weights, self.members, self.exchange, self._device, backend.shard_of, self.owner.zeros
        )

        views = [
            (self.layout.views(self.sketches, i), self.layout.views(self.working, i)) for i in range(len(matrices))
        ]
        self._queue = Queue.serving(self.working, self.sketches, self.rule.columns)
        if self._queue is not None:
            together.install()
        self.captured = [Sketch(Y, Z, U, V, self._queue) for (Y, Z, _), (U, V, _) in views]
        for matrix, sketch in zip(self.members, self.captured):
            sketch.arrived = backend.arrival(matrix)
        if options.fp8:
            multiply_in_eight_bits(self.members, self.captured, self._device, compute)
        attachment = attach(self.members, self.captured, options.capture, backend.gathered)
        self._undo.callback(attachment.remove)
        if head is not None:
            captured = zip(self.members, self.captured) if options.capture == "linear" else ()
            head.attach(next((sketch for matrix, sketch in captured if head.is_held_by(matrix.modules)), None))
            self._undo.callback(head.remove)

    # ------------------------------------------------------------------ the step, in its order

    @torch.no_grad()
    def reduce(self, loss_scale: float = 1.0, *, beside: bool = False) -> None:
        """Give every owner the mean sketches of its matrices, and every rank their norm. Collective.

        Args:
            loss_scale: what the loss was multiplied by.
            beside: add to what is pending, which else is dropped.

        Raises:
            LostError: another optimizer has taken the matrices over.
            RuntimeError: a CUDA graph is being captured.
        """
        self.claim.check()
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step cannot be captured in a CUDA graph: its rate, its random bits and what it may skip are the host's, and "
                "each replay would repeat them. Capture forward and backward (ds_mofa.GraphedMicroBatch), and step outside"
            )
        with phase("reduce"):
            self._reduce(loss_scale, beside)

    def _reduce(self, loss_scale: float, beside: bool) -> None:
        if self._queue is not None:
            self._queue.flush()
        reduced = self.exchange.reduce_scatter(self.sketches, self.layout.segment)
        scale = self.exchange.mean_scale / loss_scale
        if scale != 1:
            reduced.mul_(scale)
        self.sketches.zero_()
        if beside:
            reduced.add_(self._reduced)
        graphs = self._graphs()
        self._pending = reduced if graphs is None else graphs.take(reduced)
        self.measure()

    def measure(self) -> None:
        """Take the norm of the pending gradients. Collective."""
        graphs = self._ready_graphs()
        square = (self.driver if graphs is None else graphs).squared_norm(self._reduced, self.steps)
        norm = self.exchange.sum(square).sqrt()
        self._norm, self._finite = torch.where(norm < _LARGEST_NORM, norm, math.inf), None

    @property
    def norm(self) -> Tensor:
        """Norm of all matrices' projected gradients, from the last :meth:`reduce`; the same on every rank.

        In the first step an unbiased estimate of the whole gradient's norm. Inf if any sketch on any rank holds a
        NaN or Inf, or where it would be above 1e18.
        """
        assert self._norm is not None  # reduce has taken it
        return self._norm

    def norms(self) -> Tensor:
        """Norm of each parameter's pending gradient, (parameters,), fp32 or better, the same on every rank. Collective."""
        found = self.driver.squared_norms(self._reduced, self.steps)
        if self._owned is None:  # once: the host waits for the copy
            spans = [span for piece in self.owner.pieces(self._reduced) for span in piece.part.spans()]
            indices = torch.tensor([span.index for span in spans], dtype=torch.int64, device="cpu")
            counts = torch.tensor([span.count for span in spans], dtype=torch.int64, device="cpu")
            self._owned = indices.repeat_interleave(counts).to(self._device)
        squares = torch.zeros(len(self.members), dtype=torch.float64, device=self._device)
        if found:  # sorted, and so the same bits each time, where index_add_ is not
            squares.index_put_((self._owned,), torch.cat([square.double() for square in found]), accumulate=True)
        return self.exchange.sum(squares).sqrt().to(self._reduced.dtype)

    def scale_pending(self, factors: Mapping[int, Sequence[Tensor | float]]) -> None:
        """Multiply the pending gradient of each of these matrices by its factors; :meth:`measure` then."""
        for index, some in factors.items():
            for view, factor in itertools.product(self._pending_of(index)[:2], some):
                view.mul_(factor)

    def drop_pending_of(self, index: int) -> None:
        """Forget the pending gradient of one matrix; :meth:`measure` then."""
        for view in self._pending_of(index):
            view.zero_()

    def _pending_of(self, index: int) -> tuple[Tensor, ...]:
        """The pending sketches of one matrix, where this process owns it."""
        if self.layout.owners[index] != self.exchange.rank:
            return ()
        return self.layout.views(self._reduced, index, self.exchange.rank * self.layout.segment)

    @property
    def finite(self) -> bool:
        """Whether the reduced sketches can be used, the same on every rank; the host waits for it once a step."""
        if self._finite is None:
            self._finite = bool(torch.isfinite(self.norm))
        return self._finite

    @property
    def pending(self) -> bool:
        """Whether reduced sketches wait to be used or discarded."""
        return self._pending is not None

    @torch.no_grad()
    def update(self, groups: Sequence[Mapping[str, Any]], clip: float | Tensor = 1.0) -> None:
        """Move state and weights by the pending sketches. Collective.

        What ``on_report`` raises is raised here, after a whole step.

        Args:
            groups: the matrix param groups, for ``lr`` and ``weight_decay``.
            clip: factor on the gradient, <= 1, from clipping by the global norm.
        """
        moved, report = self._advance(clip)
        if not moved:
            self.discard(_NO_FACTORS)
            return
        self.driver.forget()
        self.steps += 1
        with phase("apply"):
            self._apply(groups)
            self._staging.finish()  # a checkpoint, ZeRO's gathering: whoever reads the host's memory next may do so
            self.driver.prepare(self.steps)
        if report is not None:
            self.report = report
            if self.on_report is not None:
                self.on_report(report)

    def _advance(self, clip: float | Tensor) -> tuple[bool, Report | None]:
        """State and working copies by the pending sketches. Collective.

        Returns:
            Whether they have moved, the same on every rank, and a report if one is due.
        """
        graphs = self._ready_graphs()
        with phase("factor update"), full_fp32():
            if graphs is not None and not self._reports_now() and graphs.update(self.steps, clip):
                self._pending = None
                return True, None
            new = self._updated(self._reduced, clip)
            self.driver.publish(new)
        self._pending = None
        with phase("gather"):
            self.exchange.all_gather(self.working, self.layout.segment)
            if self.driver.failed(self.steps):
                self._roll_back()
                return False, None
            assert new is not None  # else the owner's update has failed, and every rank has seen it
            report = self._report(new, clip) if self._reports_now() else None
            self.driver.commit(new)
        graphs = self._graphs()
        if graphs is not None:
            graphs.ran_eagerly(self.steps)
        return True, report

    def discard(self, reason: str = _NO_NUMBER) -> None:
        """Skip this step: state and weights stay as they are."""
        self.drop_pending()
        self.skipped += 1
        if self.exchange.rank == 0:
            logger.warning("ds_mofa: step skipped on every rank, %d so far: %s", self.skipped, reason)

    def drop_pending(self) -> None:
        """Forget what the last :meth:`reduce` has given."""
        self._pending = None
        self.driver.forget()

    def clear(self) -> None:
        """Forget what the micro-batches since the last :meth:`reduce` have added."""
        if self._queue is not None:
            self._queue.clear()
        self.sketches.zero_()

    def capture_in(self, pool: Any, stream: torch.cuda.Stream) -> CapturedUpdate | None:
        """Take norm and factor update as CUDA graphs from now on, as long as the caller keeps what is returned.

        Args:
            pool: of graphs that run before and after a step, and not beside it.
            stream: on which they were captured.

        Returns:
            None where that cannot be: with several processes, on the host, or by a rule that asks the host.
        """
        alone = self.exchange.world_size == 1 and self.backend.host is None
        if not (alone and self.rule.capturable and triton_serves(self.working)):
            return None
        graphs = CapturedUpdate(self.driver, pool, stream)
        self._graphs = weakref.ref(graphs)
        return graphs

    def on_detach(self, undo: Callable[[], Any]) -> None:
        """Have something else undone as well when the model is put back. ``undo`` must not keep this object alive."""
        self._undo.callback(undo)

    def detach(self) -> None:
        """Put the model back as it was before this object."""
        self.claim.give_up()
        self._undo.close()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The state by the names of its matrices, on the CPU of the group's rank 0; empty elsewhere. Collective."""
        flat = self.owner.whole()
        if flat is None:
            return {}
        layout = self.owner.state_layout
        return packed(flat, layout, self.members, self.rule, steps=self.steps, skipped=self.skipped)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any] | None, problem: str | None = None) -> None:
        """Take over a state, whoever owned it when it was saved. Collective; rank 0's ``state`` counts.

        Args:
            state: as :meth:`state_dict` gives it.
            problem: why this process has none that it could load, which all are told.

        One of another rank is made this run's by :meth:`ds_mofa.rules.rule.Rule.resized`, which is printed.

        Raises:
            ValueError: another format, or matrices of other names or shapes than this model's. Nothing has changed.
        """
        device, layout = self._device, self.owner.state_layout
        flat = torch.zeros(layout.numel, dtype=self.factors.dtype, device=device)
        counters = torch.zeros(2, dtype=torch.int64, device=device)
        if self.exchange.rank == 0 and problem is None:
            try:
                problem = unpack(state or {}, layout, self.members, self.rule, flat, counters)
            except Exception as error:  # whatever it is: the other ranks wait to be told
                problem = f"the state could not be read ({type(error).__name__}: {error}). Use another checkpoint"
        self._agree(problem)
        self.exchange.broadcast(flat, 0)
        self.exchange.broadcast(counters, 0)
        self.steps, self.skipped = (int(value) for value in counters)
        self.drop_pending()
        self.clear()
        self.owner.load(flat)
        if self.steps > 0:
            self.driver.restore(layout, flat, self.steps)
        self.driver.prepare(self.steps)

    def held(self) -> list[Tensor]:
        """What every rank keeps besides the working copies, for no checkpoint."""
        return self.driver.held()

    # ------------------------------------------------------------------ parts

    @property
    def _reduced(self) -> SketchSegment:
        """What the last :meth:`reduce` has given, and nothing has used or discarded yet."""
        assert self._pending is not None
        return self._pending

    def _ready_graphs(self) -> CapturedUpdate | None:
        graphs = self._graphs()
        return graphs if graphs is not None and graphs.ready(self._reduced, self.steps) else None

    def _updated(self, pending: SketchSegment, clip: float | Tensor) -> FactorSegment | None:
        """Have the rule turn the pending sketches into factors, in their memory.

        Returns:
            None if torch.linalg failed to converge; ``pending`` then holds neither.
        """
        try:
            return self.driver.update(pending, self.steps, clip)
        except torch.linalg.LinAlgError as error:
            logger.warning("ds_mofa: rank %d: %s", self.exchange.rank, error)
            return None

    def _roll_back(self) -> None:
        """Make the working copies what they were before the rule's results were published. Collective."""
        if self.steps == 0:
            self.working.zero_()
        else:
            self.driver.roll_back()
            self.exchange.all_gather(self.working, self.layout.segment)
        self.driver.prepare(self.steps)

    def _reports_now(self) -> bool:
        every = self.rule.diagnostics_every
        return every > 0 and (self.steps + 1) % every == 0

    def _report(self, new: FactorSegment, clip: float | Tensor) -> Report | None:
        """Measure this rank's matrices, and give every rank the measures of all. Collective."""
        values = self.driver.measures(new, clip)
        if values is None:
            return None
        names = [matrix.name for matrix in self.members]
        values = by_parameter(self.exchange.sum(values), [matrix.stack for matrix in self.members])
        return Report(self.steps + 1, self.skipped, names, values)

    def _apply(self, groups: Sequence[Mapping[str, Any]]) -> None:
        rounding = Rounding(self.options.rounding == "stochastic", self.options.seed, self.steps)
        for part in itertools.chain.from_iterable(map(self.driver.parts, self.layout.blocks)):
            U, V, coefficients = self.driver.written(part)
            lr, weight_decay = float(groups[part.block.group]["lr"]), float(groups[part.block.group]["weight_decay"])
            numbers = part.numbers()
            for some, factor, shards, masters in self._held(part):
                write_wherever(
                    self._staging,
                    shards,
                    U[some],
                    V[some],
                    coefficients[some],
                    numbers=numbers[some],
                    step_size=lr * factor,
                    decay=1.0 - lr * weight_decay,
                    rounding=rounding,
                    masters=masters,
                )

    def _held(self, part: Part) -> Iterator[tuple[slice, float, list[Shard], list[Tensor] | None]]:
        """What this process holds of a part, so many matrices at a time as are alike in that and follow each other: which
        of the part's they are, the factor on lr, where they lie, and their masters.
        """
        found: list[tuple] = []
        first = place = 0
        size = math.prod(part.block.shape)
        for span in part.spans():
            matrix = self.members[span.index]
            # One shape is not one orientation: beside a Conv1D's weight may lie that of a linear the other way round.
            factor = self.rule.lr_factor(*matrix.map_shape)
            shard, masters = self.backend.shard_of(matrix), self.masters.of([span.index])
            whole = None if masters is None else masters[0]
            if matrix.stack is None:
                parts = [(first, shard, whole)] if shard.length else []
            else:
                parts = [
                    (first + run.first - span.first, run.of(shard), whole if whole is None else run.cut(whole))
                    for run in runs(shard.start, shard.length, size, span.first, span.last)
                ]
            for at, own, copy in parts:
                # Of those that follow each other, at less their place among them is the same.
                kind = factor, own.start, own.length, own.exponents is None, at - place
                found.append((kind, at, own, copy))
                place += own.count
            first += span.count
        for (factor, *_), run_of in itertools.groupby(found, key=operator.itemgetter(0)):
            _, places, shards, copies = zip(*run_of)
            some = slice(places[0], places[0] + sum(shard.count for shard in shards))
            yield some, factor, list(shards), None if copies[0] is None else list(copies)

    def _agree(self, problem: str | None) -> None:
        """Raise on every rank if rank 0 has a problem."""
        failed = self.exchange.sum(torch.tensor([float(problem is not None)], dtype=torch.float32, device=self._device))
        if failed:
            raise ValueError(problem or f"another rank could not load the {self.rule.name} state; its message says why")


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
