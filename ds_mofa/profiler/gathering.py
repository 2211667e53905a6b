"""Which whole weights DeepSpeed's stage 3 holds, and when: its coordinator (0.19), played through on an allocator.

Weights are gathered on a stream of their own, which has blocks of its own. A module that is entered fetches what is not
there, then prefetches a bucket of what the recorded order of modules says comes next, as long as fewer than
``stage3_max_live_parameters`` are there or on their way. What is gathered together comes in one flat buffer, which is cut
into weights, one copy each, when the first of them is needed, and is kept until the last of them is. A weight goes after
its module unless it comes again soon, or a prefetch has passed over its next use.

Played as if the device kept up with the host. Where it lags, weights that were let go are still in use, and the pool is
larger than here.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

from ds_mofa.profiler.reserve import CachingAllocator
from ds_mofa.profiler.simulate import Parameter
from ds_mofa.profiler.zero import ZeroSettings

__all__ = ["Gathered", "gathered"]


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Bytes on the gathering stream: in use between forward and backward, and taken from the driver."""

    at_loss: int
    reserved: int


def gathered(zero: ZeroSettings, parameters: Sequence[Parameter]) -> Gathered:
    """What a few micro-batches gather. ``parameters``: of the model, in the order of its modules."""
    coordinator = _Coordinator(zero, parameters)
    for _ in range(2):
        coordinator.micro_batch()
    return Gathered(coordinator.at_loss, coordinator.allocator.reserved)


@dataclasses.dataclass
class _Flight:
    """Weights gathered together; ``flat`` is their common buffer, None for one alone, which needs none."""

    names: list[str]
    flat: tuple | None
    unused: set[str]
    cut: bool = False


class _Coordinator:
    def __init__(self, zero: ZeroSettings, parameters: Sequence[Parameter]):
        self.zero, self.allocator, self.at_loss = zero, CachingAllocator(), 0
        self.numel = {p.name: p.numel for p in parameters if p.numel > zero.stage3_param_persistence_threshold}
        modules = _modules(list(self.numel), zero.leaf_module)
        # A module without weights prefetches too, and there is at least one before each with some.
        self.order = [call for module in [*modules, *reversed(modules)] for call in ([], module)]
        self.there: dict[str, tuple] = {}
        self.flights: dict[str, _Flight] = {}

    def micro_batch(self) -> None:
        self.queue = deque((name, step) for step, module in enumerate(self.order) for name in module)
        self.passed_over: dict[str, int] = {}
        self.live = 0
        for step, module in enumerate(self.order):
            self._gather(module)
            for name in module:
                self._use(name)
            self._prefetch(step, module)
            if step == len(self.order) // 2 - 1:
                self.at_loss = self.allocator.allocated
            self._release(step + 1, module)
        for name in list(self.flights):
            self._use(name)
        for name in list(self.there):
            self.allocator.free(self.there.pop(name))

    def _gather(self, names: Sequence[str]) -> None:
        names = [name for name in names if name not in self.there and name not in self.flights]
        if not names:
            return
        numel = sum(self.numel[name] for name in names)
        self.live += numel
        block = self.allocator.alloc(2 * numel)
        flight = _Flight(names, block if len(names) > 1 else None, set(names))
        if flight.flat is None:
            self.there[names[0]], flight.cut = block, True
        self.flights |= dict.fromkeys(names, flight)

    def _use(self, name: str) -> None:
        flight = self.flights.pop(name, None)
        if flight is None:
            return
        if not flight.cut:
            self.there |= {one: self.allocator.alloc(2 * self.numel[one]) for one in flight.names}
            flight.cut = True
        flight.unused.discard(name)
        if flight.flat is not None and not flight.unused:
            self.allocator.free(flight.flat)

    def _prefetch(self, step: int, module: Sequence[str]) -> None:
        taken = {name for name in module if self.passed_over.get(name, -1) < step}
        while self.queue and taken:
            name, used = self.queue.popleft()
            self.passed_over[name] = used
            taken.discard(name)
        room = min(self.zero.stage3_max_live_parameters - self.live, self.zero.stage3_prefetch_bucket_size)
        chosen: list[str] = []
        while self.queue and sum(self.numel[name] for name in chosen) < room:
            name, used = self.queue.popleft()
            self.passed_over[name] = max(self.passed_over.get(name, -1), used)
            if name not in self.there and name not in self.flights and name not in chosen:
                chosen.append(name)
        self._gather(chosen)

    def _release(self, step: int, module: Sequence[str]) -> None:
        soon, distance = set(), 0
        for later in self.order[step:]:
            if distance >= self.zero.stage3_max_reuse_distance:
                break
            soon.update(later)
            distance += sum(self.numel[name] for name in later)
        for name in module:
            if name in self.there and name not in soon and self.passed_over.get(name, -1) <= step:
                self.allocator.free(self.there.pop(name))
                self.live -= self.numel[name]


def _modules(names: Sequence[str], leaf: bool) -> list[list[str]]:
    """The weights that one module fetches: of a linear or table its own, of a leaf all that are in the layer."""
    if not leaf:
        return [[name] for name in names]
    modules: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        modules.setdefault(name if number is None else ".".join(parts[: number + 1]), []).append(name)
    return list(modules.values())
