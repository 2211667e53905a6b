"""A micro-batch as a CUDA graph: the host launches forward and backward at once, where it launches thousands of kernels else.

At a thousand tokens a GPU waits for its host. A graph holds kernels and addresses, and none of the Python that launched them.
So its gradients lie where they lay when it was captured, whatever ``zero_grad`` makes of ``.grad``; the matrices' sketches
always lie in one place.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.parameters import local_part
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

    Args:
        function: from the arguments of a call to the scalar to differentiate. It may not wait for the device, as ``.item()``
            or a boolean mask does.
        optimizer: the one that steps; any of torch's will do.

    Raises:
        RuntimeError: there are several processes, or the model is sharded.
    """

    WARM = 3

    def __init__(self, function: Callable[..., Tensor], optimizer: torch.optim.Optimizer):
        self._function, self._optimizer = function, optimizer
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several or any(local_part(param) is not param for param in self._params()):
            raise RuntimeError(
                "GraphedMicroBatch serves one process and whole weights: gathering weights and sending gradients is not "
                "captured. Use torch.compile for several processes"
            )
        self._graphs: dict[_Key, _Graph] = {}
        self._seen: dict[_Key, int] = {}
        self._gradients: dict[Tensor, Tensor] = {}
        self._places: list[int] = []
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._update: CapturedUpdate | None = None  # who drops it has steps run eagerly

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch.

        Returns:
            What ``function`` has returned, detached, (); later calls leave it as it is.

        Raises:
            RuntimeError: it cannot be captured.
            LostError: another optimizer has taken the matrices over.
        """
        if isinstance(self._optimizer, MatrixOptimizer):
            self._optimizer.matrices.claim.check()  # of another's sketches a graph would know nothing
        leaves, tree = tree_flatten((args, kwargs))
        params = self._params()
        if not params[0].is_cuda:
            return self._run(leaves, tree)
        self._settle(params)
        key = tree, tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if key not in self._graphs:
            if self._seen.setdefault(key, 0) < self.WARM:
                self._seen[key] += 1
                return self._beside(leaves, tree)
            self._graphs[key] = self._captured(leaves, tree)
        loss = self._graphs[key].replay(leaves)
        if isinstance(self._optimizer, MatrixOptimizer):
            self._optimizer.replayed()
        return loss

    def _params(self) -> list[Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]

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

    def _captured(self, leaves: list[Any], tree: TreeSpec) -> "_Graph":
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
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
        if self._pool is None and self._stream is not None and isinstance(self._optimizer, MatrixOptimizer):
            self._update = self._optimizer.matrices.capture_in(graph.pool(), self._stream)
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
