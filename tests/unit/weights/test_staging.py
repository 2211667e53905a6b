"""Two buffers between the host and a device: what arrives, what goes back, how much is held, and in which order."""

import contextlib
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_mofa.weights.staging import HostMemory, Staging

CPU = torch.device("cpu")


def _pieces(count, size=5):
    """Of one to three tensors each, of several dtypes and shapes."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    return [
        [torch.full((size, 2 + i % 2), 10 * number + i, dtype=dtypes[i]) for i in range(1 + number % 3)]
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_piece_arrives_in_its_turn(count):
    pieces = _pieces(count)
    for piece, staged in zip(pieces, Staging(CPU).passes(pieces), strict=True):
        for here, there in zip(piece, staged, strict=True):
            assert torch.equal(here, there) and here.dtype == there.dtype
            assert here.data_ptr() != there.data_ptr() and there.data_ptr() % 16 == 0


@pytest.mark.parametrize("back", [False, True])
def test_what_was_done_goes_back_if_it_is_to(back):
    pieces = _pieces(5)
    before = [[tensor.clone() for tensor in piece] for piece in pieces]
    staging = Staging(CPU)
    for staged in staging.passes(pieces, back=back):
        for tensor in staged:
            tensor += 1
    staging.finish()
    for piece, old in zip(pieces, before):
        assert all(torch.equal(a, b + back) for a, b in zip(piece, old))


def test_the_buffers_are_twice_the_largest_piece_and_one_where_one_is_enough():
    pieces = [[torch.zeros(1000)], [torch.zeros(300), torch.zeros(7)], [torch.zeros(10)]]
    staging = Staging(CPU)
    list(staging.passes(pieces))
    assert staging.peak == 2 * 4096  # 4000 bytes, in steps of 256
    staging = Staging(CPU)
    list(staging.passes(pieces[1:2]))
    assert staging.peak == 1280 + 256


def test_nothing_is_held_between_two_uses():
    staging = Staging(CPU)
    for staged in staging.passes(_pieces(3), back=True):
        del staged
    staging.send(torch.ones(3), torch.zeros(3))
    staging.finish()
    assert not any(isinstance(value, torch.Tensor) or value == [0] for value in vars(staging).values())
    assert staging._sent == []


def test_host_memory_is_pinned_where_there_is_a_gpu_alone():
    for pin in (False, True):
        memory = HostMemory(pin).zeros(7, torch.float32)
        assert memory.shape == (7,) and not memory.any() and memory.device == CPU
        assert memory.is_pinned() == (pin and torch.cuda.is_available())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would pin it")
def test_memory_that_cannot_be_pinned_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r'0.40 GB.*could not be page-locked.*ulimit -l.*"pin_memory": false'):
        HostMemory(True).zeros(10**8, torch.float32)


# ---------------------------------------------------------------------- the order, on a GPU that does things late


class _Event:
    happened = False


class _Stream:
    """A queue of (event to wait for, work), which nothing but its own order and those events holds up."""

    def __init__(self):
        self.queue = []

    def do(self, work, *, after=None):
        self.queue.append((after, work))

    def record_event(self):
        event = _Event()
        self.do(lambda: setattr(event, "happened", True))
        return event

    def wait_event(self, event):
        self.do(lambda: None, after=event)

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())


class _LateGpu(TorchDispatchMode):
    """Copies within a stream's context are queued there; ``run`` does all work in a random order that is allowed."""

    def __init__(self, staging):
        super().__init__()
        self.compute, self._active = _Stream(), None
        staging._in, staging._out = _Stream(), _Stream()
        staging._current, staging._within = lambda: self.compute, self._within
        self._streams = [self.compute, staging._in, staging._out]

    @contextlib.contextmanager
    def _within(self, stream):
        self._active = stream
        yield
        self._active = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and self._active is not None:
            target, source = args[:2]
            self._active.do(lambda: target.copy_(source))
            return target
        return func(*args, **(kwargs or {}))

    def run(self, chance):
        while any(stream.queue for stream in self._streams):
            heads = [stream.queue for stream in self._streams if stream.queue]
            ready = [queue for queue in heads if queue[0][0] is None or queue[0][0].happened]
            assert ready, "every stream waits for another"
            _, work = chance.choice(ready).pop(0)
            work()


@pytest.mark.parametrize("seed", range(50))
def test_no_copy_overtakes_what_it_depends_on(seed):
    """As a GPU may: every copy and every computation as late, or as early, as streams and events allow."""
    host = [torch.full((4,), float(i)) for i in range(7)]
    seen = [torch.zeros(4) for _ in host]
    new, kept, total = torch.zeros(4), torch.full((4,), -1.0), torch.zeros(4)
    staging = Staging(CPU)
    with _LateGpu(staging) as gpu:
        gpu.compute.do(lambda: host[0].add_(0.5))  # what was sent to the host before
        for i, (staged,) in enumerate(staging.passes([[tensor] for tensor in host], back=True)):
            gpu.compute.do(lambda staged=staged, i=i: seen[i].copy_(staged))
            gpu.compute.do(lambda staged=staged: staged.add_(100))
        buffers = staged.untyped_storage()
        gpu.compute.do(lambda: buffers.fill_(255))  # the allocator has given them to another
        gpu.compute.do(lambda: new.add_(7))
        staging.send(new, kept)
        for staged in staging.passes([[tensor] for tensor in (kept, *host)]):  # what has left can be read again
            for tensor in staged:
                gpu.compute.do(lambda tensor=tensor: total.add_(tensor))
        gpu.run(random.Random(seed))
    assert [float(tensor[0]) for tensor in seen] == [0.5, 1, 2, 3, 4, 5, 6]
    assert [float(tensor[0]) for tensor in host] == [100.5, 101, 102, 103, 104, 105, 106]
    assert float(kept[0]) == 7
    assert float(total[0]) == 721.5 + 7


@pytest.mark.parametrize("seed", range(20))
def test_nothing_arrives_in_buffers_that_were_given_up(seed):
    """An SVD that fails ends the loop, with the next piece on its way."""
    staging = Staging(CPU)
    with _LateGpu(staging) as gpu:
        for (staged,) in staging.passes([[torch.zeros(4)] for _ in range(3)]):
            buffers = staged.untyped_storage()
            break
        gpu.compute.do(lambda: buffers.fill_(255))
        gpu.run(random.Random(seed))
    assert set(buffers.tolist()) == {255}
