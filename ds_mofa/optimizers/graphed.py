"""A micro-batch as a CUDA graph: the host launches forward and backward at once, where it launches thousands of kernels else.

At a thousand tokens a GPU waits for its host. A graph holds kernels and addresses, and none of the Python that launched them.
So its gradients lie where they lay when it was captured, whatever ``zero_grad`` makes of ``.grad``; the matrices' sketches
always lie in one place.

Several processes that each hold the whole model send nothing while they compute: the gradients of what is no matrix are added
up when a micro-batch is over, and the sketches in the step. So a graph holds no collective.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.parameters import local_part
from ds_mofa.partition.replicas import Replicated, wrappers_of
from ds_mofa.step.backend import in_several_processes
from ds_mofa.step.captured import CapturedUpdate

__all__ = ["GraphedMicroBatch"]

_Key = tuple[TreeSpec, tuple[Any, ...]]


class GraphedMicroBatch:
    """Forward and backward of a micro-batch, captured in a CUDA graph.

    >>> micro_batch = GraphedMicroBatch(lambda ids: model(input_ids=ids, labels=ids).loss / 8, optimizer)
    >>> for batches in data:
    ...     losses = [micro_batch(ids) for ids in batches]
    ...     optimizer.step()
    ...     optimizer.zero_grad()

    The first ``WARM`` calls with tensors of new shapes run eagerly, the next one is captured, and from then on the graph is
    replayed, on the values that the tensors have then. Arguments that are no tensors tell graphs apart, as shapes do. All else
    stays as it was captured: whether the model trains, its hooks, what is frozen.

    The graphs share their memory, and have it as long as this object lives: as much as an eager micro-batch takes. On a CPU
    every call runs eagerly. The step is taken outside, for it depends on numbers of the host, such as the rate; MoFaSGD's norm
    and factor update become graphs in the same memory, and take another fp32 copy of the sketches.

    Several processes may each hold the whole model, without DistributedDataParallel, whose part this takes: the first call
    gives all of them the first one's weights, of which an optimizer of torch's knows those that it trains (buffers are to be
    the same already), and each call leaves in ``.grad`` the mean over processes. Put all micro-batches of a step but the last
    into :meth:`no_sync`.

    Args:
        function: from the arguments of a call to the scalar to differentiate. It may not wait for the device, as ``.item()``
            or a boolean mask does.
        optimizer: the one that steps; any of torch's will do.
        process_group: of an optimizer of torch's, the processes that see different data; by default all. ds_mofa's have their
            own.

    Raises:
        RuntimeError: the weights are sharded, or DeepSpeed's, or a second process group is given; at the first call,
            DistributedDataParallel wraps them.
    """

    WARM = 3

    def __init__(
        self,
        function: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        process_group: dist.ProcessGroup | None = None,
    ):
        self._function, self._optimizer = function, optimizer
        self._ours = ours = optimizer if isinstance(optimizer, MatrixOptimizer) else None
        engine = ours is not None and not ours.plain
        if engine or any(local_part(param) is not param for param in self._params()):
            raise RuntimeError(
                "GraphedMicroBatch serves whole weights in a plain loop: gathering weights, as FSDP2 does, or DeepSpeed's "
                "sending of gradients is not captured. Where the model fits, leave it whole on every process"
            )
        if ours is not None:
            if process_group is not None and process_group is not ours.process_group:
                raise RuntimeError(
                    f"process_group: the sketches are added up over {ours.options.title}'s. Give it to that, and leave it "
                    "out here"
                )
            process_group = ours.process_group
        self._replicated = Replicated(process_group) if in_several_processes(process_group) else None
        self._alike = False  # whether all processes have been given the same weights
        self._sends = True
        # The thread that watches NCCL asks CUDA for things that a whole process may not ask for while it captures.
        self._mode = "global" if self._replicated is None else "thread_local"
        self._graphs: dict[_Key, _Graph] = {}
        self._seen: dict[_Key, int] = {}
        self._gradients: dict[Tensor, Tensor] = {}
        self._places: list[int] = []
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._largest = 0  # elements of the tensors of any graph's call
        self._update: CapturedUpdate | None = None  # who drops it has steps run eagerly

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch.

        Returns:
            What ``function`` has returned, detached, (); later calls leave it as it is.

        Raises:
            RuntimeError: it cannot be captured.
            LostError: another optimizer has taken the matrices over.
        """
        if self._ours is not None:
            self._ours.matrices.claim.check()  # of another's sketches a graph would know nothing
        leaves, tree = tree_flatten((args, kwargs))
        loss = self._computed(leaves, tree)
        if self._replicated is not None and self._sends:
            self._replicated.average(self._averaged())
        return loss

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within: calls leave each process's own gradients in ``.grad``. The first call after it puts in the mean of all."""
        before, self._sends = self._sends, False
        try:
            yield
        finally:
            self._sends = before

    def _computed(self, leaves: list[Any], tree: TreeSpec) -> Tensor:
        params = self._params()
        if self._replicated is not None and not self._alike:
            self._begin(self._replicated)
        if not params[0].is_cuda:
            return self._run(leaves, tree)
        index, current = params[0].device.index, torch.cuda.current_device()
        if index != current:
            raise RuntimeError(
                f"the weights are on cuda:{index}, and graphs are captured on the current device, cuda:{current}: call "
                f"torch.cuda.set_device({index}) first"
            )
        self._settle(params)
        key = tree, tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if key not in self._graphs:
            if self._seen.setdefault(key, 0) < self.WARM:
                self._seen[key] += 1
                return self._beside(leaves, tree)
            self._make_room(leaves)
            self._graphs[key] = self._captured(leaves, tree)
        loss = self._graphs[key].replay(leaves)
        if self._ours is not None:
            self._ours.replayed()
        return loss

    def _params(self) -> list[Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]

    def _begin(self, replicated: Replicated) -> None:
        if wrappers_of(set(self._params())):
            raise RuntimeError(
                "DistributedDataParallel wraps what GraphedMicroBatch is to capture: it has autograd add gradients up on the "
                "stream on which it was built, where nothing can be captured. Leave it out: the processes' gradients are "
                "averaged here, see no_sync()"
            )
        frozen = [frozen.param for frozen in self._ours.split.frozen] if self._ours is not None else []
        replicated.broadcast([*self._averaged(), *frozen])
        self._alike = True

    def _averaged(self) -> list[Tensor]:
        """What is no matrix, of whose sketches the optimizer itself takes the mean."""
        groups = self._optimizer.param_groups if self._ours is None else self._ours.adamw_groups
        return [param for group in groups for param in group["params"] if param.requires_grad]

    def _run(self, leaves: list[Any], tree: TreeSpec) -> Tensor:
        args, kwargs = tree_unflatten(leaves, tree)
        loss = self._function(*args, **kwargs)
        loss.backward()
        return loss.detach()

    def _settle(self, params: list[Tensor]) -> None:
        """Put gradients where the graphs add to them, and forget graphs of weights that lie elsewhere now, or were others."""
        places = [param.data_ptr() for param in params]
        if places != self._places:
            self._graphs, self._seen, self._gradients, self._places = {}, {}, {}, places
            self._pool = self._update = None
            self._largest = 0
        fresh = []
        for param, gradient in self._gradients.items():
            if param.grad is None:
                fresh.append(gradient)
                param.grad = gradient
            elif param.grad is not gradient:
                gradient.copy_(param.grad)
                param.grad = gradient
        if fresh:
            torch._foreach_zero_(fresh)

    def _beside(self, leaves: list[Any], tree: TreeSpec) -> Tensor:
        """An eager run, on the stream on which it will be captured: autograd runs a backward where its forward ran."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._run(leaves, tree)
        current.wait_stream(self._stream)
        for param in self._params():
            if param.grad is not None:
                self._gradients.setdefault(param, param.grad)
        return loss

    def _make_room(self, leaves: list[Any]) -> None:
        """Before larger tensors than any so far are captured, let go of the graphs: what smaller ones have left of their memory
        is in pieces that the larger one could not use. They are captured again when they come, at once, in its memory.
        """
        size = sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
        if size > self._largest:
            self._graphs, self._largest = {}, size
            self._pool = self._update = None

    def _captured(self, leaves: list[Any], tree: TreeSpec) -> "_Graph":
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=self._mode):
                loss = self._run(inputs, tree)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # which torch leaves changed where the end of a capture fails too
            self._optimizer.zero_grad()  # sketches wait for tensors that were never computed
            raise RuntimeError(
                "this micro-batch cannot be captured in a CUDA graph: something in it waits for the device (.item(), a "
                "boolean mask, a copy to the host) or copies from the host. Leave it out, or train without GraphedMicroBatch"
            ) from error
        if self._pool is None and self._stream is not None and self._ours is not None:
            self._update = self._ours.matrices.capture_in(graph.pool(), self._stream)
        self._pool = graph.pool()
        return _Graph(graph, inputs, loss)


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[Any], loss: Tensor):
        self._graph, self._inputs, self._loss = graph, inputs, loss

    def replay(self, leaves: list[Any]) -> Tensor:
        for own, given in zip(self._inputs, leaves):
            if isinstance(own, Tensor):
                own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._loss.clone()
