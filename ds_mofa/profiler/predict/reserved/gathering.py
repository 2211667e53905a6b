"""Which whole weights DeepSpeed's stage 3 holds, and when: its coordinator (0.19), played through on an allocator.

Weights are gathered on a stream of their own, which has blocks of its own. A module that is entered fetches what is not
there, then prefetches a bucket of what the recorded order of modules says comes next, as long as fewer than
``stage3_max_live_parameters`` are there or on their way. What is gathered together comes in one flat buffer, which is cut
into weights, one copy each, when the first of them is needed, and is kept until the last of them is. A weight goes after
its module unless it comes again soon, or a prefetch has passed over its next use.

How soon, DeepSpeed counts in weights of the modules between. Where a leaf lets go, those are all that are below them: the
model, which is entered again when backward begins, has every layer, so the last ones within ``stage3_max_reuse_distance``
of that stay. Where another module does, they are those directly its own: leaves count nothing, and an embedding may stay
until backward ends. A head whose weight the model reads itself counts as the model's own, and is there all the time.

Played as if the device kept up with the host. Where it lags, weights that were let go are still in use, and the pool is
larger than here.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

from ds_mofa.profiler.predict.reserved.allocator import CachingAllocator, Handle
from ds_mofa.profiler.predict.simulated.micro_batch import Parameter
from ds_mofa.profiler.predict.zero import ZeroSettings

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
    flat: Handle | None
    unused: set[str]
    cut: bool = False


class _Coordinator:
    def __init__(self, zero: ZeroSettings, parameters: Sequence[Parameter]):
        self.zero, self.allocator, self.at_loss = zero, CachingAllocator(), 0
        self.numel = {p.name: p.numel for p in parameters if p.numel > zero.stage3_param_persistence_threshold}
        self.order = _order(list(self.numel), zero)
        self.there: dict[str, Handle] = {}
        self.flights: dict[str, _Flight] = {}

    def micro_batch(self) -> None:
        self.queue = deque((name, step) for step, call in enumerate(self.order) for name in call.fetched)
        self.passed_over: dict[str, int] = {}
        self.live = 0
        for step, call in enumerate(self.order):
            self._gather(call.fetched)
            for name in call.fetched:
                self._use(name)
            self._prefetch(step, call.fetched)
            if step == len(self.order) // 2 - 1:
                self.at_loss = self.allocator.allocated
            self._release(step + 1, call)
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
        together = len(names) > 1 and self.zero.world_size > 1  # one rank copies each weight to where it is used
        flight = _Flight(names, self.allocator.alloc(2 * numel) if together else None, set(names))
        if not together:
            self.there |= {name: self.allocator.alloc(2 * self.numel[name]) for name in names}
            flight.cut = True
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

    def _release(self, step: int, call: "_Call") -> None:
        soon: set[str] = set()
        distance = 0
        for later in self.order[step:]:
            if distance >= self.zero.stage3_max_reuse_distance:
                break
            seen = later.below if call.leaf else later.own
            soon.update(seen)
            distance += sum(self.numel[name] for name in seen)
        for name in [] if call.around else call.fetched:
            if name in self.there and name not in soon and self.passed_over.get(name, -1) <= step:
                self.allocator.free(self.there.pop(name))
                self.live -= self.numel[name]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A module that is entered: the weights that are directly its own, and all below it. A leaf fetches the latter.

    One that is ``around`` the others is left when forward ends, with backward's entry next, and at the end of backward.
    """

    own: Sequence[str] = ()
    below: Sequence[str] = ()
    leaf: bool = False
    around: bool = False

    @property
    def fetched(self) -> Sequence[str]:
        return self.below if self.leaf else self.own


def _order(names: Sequence[str], zero: ZeroSettings) -> list[_Call]:
    """The modules that forward and then backward enter; the halves are equally long."""
    if not zero.leaf_module:
        # A module without weights prefetches too, and there is at least one before each with some.
        calls = [_Call([name], [name]) for name in names]
        return [call for one in [*calls, *reversed(calls)] for call in (_Call(), one)]
    modules: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        modules.setdefault(name if number is None else ".".join(parts[: number + 1]), []).append(name)
    head: Sequence[str] = []
    if zero.head_read_outside and names:
        last = list(modules)[-1]
        head = modules.pop(last) if last in names else names[:1]  # else it is tied to the embedding
    model = _Call(head, names, around=True)
    inside = []
    for key, below in modules.items():
        inside.append(_Call(below, below) if key in below else _Call(below=below, leaf=True))
    last_leaf = max((i for i, call in enumerate(inside) if call.leaf), default=-1)
    inside.insert(last_leaf + 1, _Call())  # the final norm
    return [model, *inside, model, *reversed(inside)]
