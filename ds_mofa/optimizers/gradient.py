"""A ``.grad`` without memory: what torch finds on a matrix whose gradient exists as sketches alone.

Autograd's users talk to an optimizer through ``.grad``: they ask for its norm and scale it (``clip_grad_norm_`` of torch,
Accelerate, the HF Trainer, Lightning), unscale it (``GradScaler``), drop it (``zero_grad``, ``p.grad = None``), set it by
hand. So each matrix gets a tensor of its own shape and dtype without storage, from its first sketch of a step until the
gradient is let go. It answers with the *projected* gradient's norm, scales what the step will use, sketches what is added
to it, and raises by name where numbers are asked for that do not exist.

Where a matrix is sharded, a DTensor stands in ``.grad``, as FSDP2 wants it, and this is its local part: it answers with the
process's share of the norm, which DTensor puts together, and FSDP2 adds to it a gradient that it has reduced.

Several processes must do the same to the same matrices, or their norms differ. So the first backward of a step marks every
matrix, for another process may use a module that is not used here.
"""

import functools
import itertools
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_mofa.capture.sink import Sink
from ds_mofa.step.step import MatrixStep

__all__ = ["Gradients", "SketchedGradient"]

aten = torch.ops.aten


class SketchedGradient(torch.Tensor):
    """The gradient of one parameter, (m, n) or (E, m, n), or of this process's part, (k, ...): no elements, only what can be
    known.

    Args:
        shape: of it.
        param: of whose dtype and device it is.
        name: of the matrix.
        gradients: of all matrices.
        index: of the matrix among them.

    Raises:
        NotImplementedError: an operation that would need the elements.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], param: Tensor, name: str, gradients: "Gradients", index: int):
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=param.dtype, device=param.device)

    def __init__(self, shape: tuple[int, ...], param: Tensor, name: str, gradients: "Gradients", index: int):
        self.matrix, self._index = name, index
        self._gradients = weakref.ref(gradients)  # the parameter keeps this alive, which must not keep the optimizer

    def __repr__(self, *, tensor_contents=None):
        return f"SketchedGradient({self.matrix!r}, shape={tuple(self.shape)})"

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        answer = _ANSWERS.get(func.overloadpacket)
        if answer is None:
            raise _unknown(func, args)
        return answer(func, *args, **(kwargs or {}))

    def gradients(self, func) -> "Gradients":
        gradients = self._gradients()
        if gradients is None:
            raise _unknown(func, (self,))
        return gradients


def _unknown(func, args) -> NotImplementedError:
    grad = next(a for a in _flat(args) if isinstance(a, SketchedGradient))
    gradients = grad._gradients()
    title = "its optimizer" if gradients is None else gradients.title
    return NotImplementedError(
        f"{func.overloadpacket.__name__} asks for the elements of the gradient of {grad.matrix!r}, of which {title} keeps "
        "two thin sketches and no more. It can be normed and scaled (torch.nn.utils.clip_grad_norm_, GradScaler), dropped "
        "(zero_grad) and set. To have whole gradients of this parameter, name it in "
        '"exclude"; for another optimizer of the same model call detach() on this one, and to move or cast the model '
        "zero_grad()"
    )


def _flat(args: Iterable[Any]) -> Iterable[Any]:
    return itertools.chain.from_iterable(a if isinstance(a, list | tuple) else (a,) for a in args)


# ---------------------------------------------------------------------- what it answers


def _itself(func, grad, *_args, **_kwargs):
    return grad


def _viewed(func, grad, size):
    if tuple(size) != tuple(grad.shape):
        raise _unknown(func, (grad,))
    return SketchedGradient(grad.shape, grad, grad.matrix, grad.gradients(func), grad._index)  # of the same gradient


def _norm(func, grad, ord=2, dim=None, keepdim=False, *, dtype=None):
    if float(ord) != 2 or dim is not None:
        raise NotImplementedError(
            f"a norm of order {ord}{'' if dim is None else ' along a dimension'} asks for the elements of the gradient of "
            f"{grad.matrix!r}; the 2-norm of its projection is what can be had: clip_grad_norm_ with norm_type=2"
        )
    norm = grad.gradients(func).norm_of(grad._index)
    return norm.to(grad.device, dtype or torch.promote_types(grad.dtype, torch.float32))


def _scale(func, grad, factor):
    grad.gradients(func).scale(grad._index, factor)
    return grad


def _divide(func, grad, divisor):
    return _scale(func, grad, 1 / divisor)


def _add(func, grad, other, *, alpha=1):
    if isinstance(other, SketchedGradient):
        raise _unknown(func, (other,))
    grad.gradients(func).add(grad._index, other if alpha == 1 else other * alpha)
    return grad


def _zero(func, grad):
    grad.gradients(func).drop(grad._index)
    return grad


def _norms(func, grads, ord=2, dtype=None):
    return [_each_norm(grad, ord, dtype) for grad in grads]


def _each_norm(grad, ord, dtype):
    if isinstance(grad, SketchedGradient):
        return _norm(aten.linalg_vector_norm, grad, ord, dtype=dtype)
    return torch.linalg.vector_norm(grad, ord, dtype=dtype)


def _scale_each(func, grads, factors):
    for i, grad in enumerate(grads):
        factor = factors[i] if isinstance(factors, list | tuple) else factors
        grad.mul_(factor)


def _zero_each(func, grads):
    for grad in grads:
        grad.zero_()


def _overwritten(func, grad, *_args, **_kwargs):
    raise NotImplementedError(
        f"something writes a whole gradient over that of {grad.matrix!r}, of which {grad.gradients(func).title} keeps two thin "
        "sketches. DistributedDataParallel does so if it wraps a model before the optimizer is built: build the "
        "optimizer first, over the module that is then wrapped"
    )


def _unscale(func, grads, found_inf, inv_scale):
    """GradScaler: scale by ``inv_scale``, and set ``found_inf`` to 1 where anything is not finite."""
    real = [grad for grad in grads if not isinstance(grad, SketchedGradient)]
    if real:
        func(real, found_inf, inv_scale)
    for grad in grads:
        if isinstance(grad, SketchedGradient):
            bad = ~torch.isfinite(grad.gradients(func).norm_of(grad._index))
            found_inf.copy_(torch.maximum(found_inf, bad.to(found_inf)))
            _scale(func, grad, inv_scale)


_ANSWERS = {
    aten.linalg_vector_norm: _norm,
    aten.mul_: _scale,
    aten.div_: _divide,
    aten.add_: _add,
    aten.zero_: _zero,
    aten.detach: _itself,
    aten.detach_: _itself,
    aten.alias: _itself,
    aten.view: _viewed,
    aten.copy_: _overwritten,
    aten._foreach_norm: _norms,
    aten._foreach_mul_: _scale_each,
    aten._foreach_zero_: _zero_each,
    aten._amp_foreach_non_finite_check_and_unscale_: _unscale,
}


# ---------------------------------------------------------------------- of all matrices


class Gradients:
    """The ``.grad`` of all matrices in a plain loop, and what becomes of it until the step.

    What counts at the step is what a torch optimizer would find: the sum of the backwards since the gradient was let go,
    scaled by whoever scaled it on the way, or what was set in its place.

    Args:
        matrices: whose sketches these are.
    """

    def __init__(self, matrices: MatrixStep):
        self._step = matrices
        self.title = matrices.options.title
        self._factors: dict[int, tuple[Any, ...]] = {}  # of matrices that were scaled, not yet in the sketches
        self._norms: Tensor | None = None  # this process's share of those of the pending gradients, before the factors
        self._fresh = False  # whether a backward has added something since the last reduce
        self._reduced: set[int] = set()  # the matrices that the pending sketches hold something of
        self._stale = False  # whether the pending sketches have changed since they were measured
        self._together = matrices.exchange.processes > 1
        self._params = [matrix.param for matrix in matrices.members]
        parts = [matrices.backend.parts(matrix) for matrix in matrices.members]
        self._shares: Tensor | None = None  # of each norm, where not all of it is this process's
        if max(parts) > 1:
            dtype, device = matrices.factors.dtype, matrices.backend.device
            self._shares = torch.tensor(parts, dtype=dtype, device=device).rsqrt()
        own = weakref.ref(self)
        for index, sketch in enumerate(matrices.captured):
            sketch.grad = self._mark(index)
            sketch.begin = functools.partial(_begin, own, index)
        matrices.on_detach(functools.partial(_take_off, self._params, matrices.captured))

    # ------------------------------------------------------------------ backward

    def begin(self, index: int) -> None:
        """A backward is about to add to a sketch, and ``.grad`` does not say that there is a gradient to add to.

        Where it was let go, what it stood for is dropped, as autograd would have it; where it holds a gradient of another
        making, this is taken in.
        """
        if self._together and self._params[index].grad is not self._step.captured[index].grad:
            # Another process may use what this one does not: .grad, and so a norm, is to be the same on all.
            for other, param in enumerate(self._params):
                if other != index and param.grad is None and param.requires_grad:
                    self._open(other)
        sketch = self._step.captured[index]
        grad = self._open(index)
        sketch.filled = self._fresh = True
        if grad is not None:
            sketch.add_gradient(grad)

    def replayed(self) -> None:
        """Something was added to the sketches of all whose ``.grad`` is the mark, without :meth:`begin`."""
        self._fresh = True
        for param, sketch in zip(self._params, self._step.captured):
            if param.grad is sketch.grad:
                sketch.filled = True

    def _open(self, index: int) -> Tensor | None:
        """Let ``.grad`` be the mark, and return what it was in its place. What was let go is dropped."""
        sketch, param = self._step.captured[index], self._params[index]
        grad, mark = param.grad, sketch.grad
        assert mark is not None  # every sketch here has one
        if mark.dtype != param.dtype or mark.device != param.device:
            sketch.grad = mark = self._renewed(index)
        if grad is None and sketch.filled and sketch.unmarked:
            raise RuntimeError(
                f"{self._name(index)!r} has a gradient of an earlier backward, and compiled autograd does not let .grad say "
                "whether it was let go since: take one backward a step under compiled autograd, or accumulate without it"
            )
        if grad is mark:
            return None
        if sketch.filled:
            sketch.clear()
            sketch.filled = False
        self._drop_reduced(index)
        param.grad = mark
        return grad

    def _name(self, index: int) -> str:
        return self._step.members[index].name

    def _mark(self, index: int) -> Tensor:
        """What stands in ``.grad`` of a matrix."""
        backend, matrix = self._step.backend, self._step.members[index]
        shard, row = backend.shard_of(matrix), matrix.full_shape[1:]
        shape = (shard.flat.numel() // math.prod(row), *row)
        like = shard.flat if shard.exponents is None else matrix.param  # of the weights, not of their codes
        return backend.mark(matrix, SketchedGradient(shape, like, matrix.name, self, index))

    def _renewed(self, index: int) -> Tensor:
        """A mark for a parameter that was cast since the last one was made."""
        mark, param = self._step.captured[index].grad, self._params[index]
        if mark is not None and param.device != mark.device:
            raise RuntimeError(
                f"{self._name(index)!r} was on {mark.device} when the optimizer was first used, where its sketches are, and is "
                f"on {param.device}: move the model before that"
            )
        return self._mark(index)

    # ------------------------------------------------------------------ what .grad is asked

    def norm_of(self, index: int) -> Tensor:
        """Norm of one matrix's projected gradient as it stands, 0-dim; in the first step an estimate of the whole one's.
        Of a sharded one this process's share: the squares of all add up to the whole's. Collective once a step.
        """
        self.reduce()
        if self._norms is None:
            norms = self._step.norms()
            self._norms = norms if self._shares is None else norms * self._shares
        norm = self._norms[index]
        for factor in self._factors.get(index, ()):
            norm = norm * (factor.to(norm) if isinstance(factor, Tensor) else factor)
        return norm

    def scale(self, index: int, factor: Tensor | float) -> None:
        """Multiply one matrix's gradient as it stands; what backwards add later is not scaled."""
        self.reduce()
        self._factors[index] = (*self._factors.get(index, ()), factor)

    def scale_all(self, factor: Tensor | float) -> None:
        """Multiply every matrix's gradient as it stands."""
        for index, param in enumerate(self._params):
            if param.grad is not None:
                self.scale(index, factor)

    def add(self, index: int, grad: Tensor) -> None:
        """Sketch a gradient that exists, (m, n) or of a stack (E, m, n), beside what is there."""
        self._step.captured[index].add_gradient(grad)

    def drop(self, index: int) -> None:
        """Forget one matrix's gradient."""
        sketch = self._step.captured[index]
        if sketch.filled:
            sketch.clear()
        sketch.filled = False
        self._drop_reduced(index)

    def _drop_reduced(self, index: int) -> None:
        self._factors.pop(index, None)
        if index in self._reduced:
            self._reduced.remove(index)
            self._step.drop_pending_of(index)
            self._stale = True

    # ------------------------------------------------------------------ the step

    def are_a_dry_run(self, rates: Iterable[float]) -> bool:
        """Whether this is the step of torch.distributed.checkpoint that is to bring the state about: every rate 0, and
        every ``.grad`` set to zeros. Then they are let go.
        """
        if any(rates):
            return False
        pairs = zip(self._params, self._step.captured)
        given = [param.grad for param, sketch in pairs if param.grad is not None and param.grad is not sketch.grad]
        if len(given) < len(self._params) or any(bool(grad.any()) for grad in given):
            return False
        self.let_go()
        return True

    def settle(self) -> None:
        """Take each ``.grad`` as it is: one that was let go is dropped, one set by hand is sketched; and reduce."""
        for index, (param, sketch) in enumerate(zip(self._params, self._step.captured)):
            grad, mark = param.grad, sketch.grad
            if grad is None and sketch.filled and sketch.unmarked:
                param.grad = mark
            elif grad is None:
                self.drop(index)
            elif grad is not mark:
                sketch.open()
        self.reduce()

    def reduce(self) -> None:
        """Have all that backwards have added in the pending sketches."""
        step = self._step
        if not step.pending or self._fresh:
            self._fold()
            step.reduce(beside=step.pending)
            for index, sketch in enumerate(step.captured):
                if sketch.filled or self._together and self._params[index].grad is sketch.grad:
                    self._reduced.add(index)
                    sketch.filled = sketch.unmarked = False
            self._fresh = self._stale = False
            self._norms = None
        elif self._stale:
            step.measure()
            self._stale, self._norms = False, None

    def clip(self) -> Tensor | float:
        """The factor on every gradient; where factors differ they are folded into the sketches, and it is 1."""
        chains = [self._factors.get(i, ()) for i, param in enumerate(self._params) if param.grad is not None]
        if any(not _same(chains[0], chain) for chain in chains):
            self._fold()
            self.reduce()
        factor = math.prod(chains[0]) if self._factors else 1.0
        # Offloaded gradients are scaled by a tensor of the host's.
        return factor.to(self._step.norm.device) if isinstance(factor, Tensor) else factor

    def _fold(self) -> None:
        """Multiply the pending sketches by their factors."""
        if self._factors:
            self._step.scale_pending(self._factors)
            self._factors, self._stale = {}, True

    def forget(self) -> None:
        """After a step: what is known of its gradient is of no use to the next."""
        self._factors, self._norms, self._stale = {}, None, False
        self._reduced.clear()

    def let_go(self) -> None:
        """Set every ``.grad`` to None and drop what they stand for."""
        self._step.clear()
        self._step.drop_pending()
        for param, sketch in zip(self._params, self._step.captured):
            param.grad, sketch.filled, sketch.unmarked = None, False, False
        self._fresh = False
        self.forget()


def _begin(gradients: "weakref.ref[Gradients]", index: int) -> None:
    own = gradients()
    if own is not None:
        own.begin(index)


def _take_off(params: Sequence[nn.Parameter], sinks: Sequence[Sink]) -> None:
    for param, sink in zip(params, sinks):
        if param.grad is sink.grad:
            param.grad = None


def _same(one: tuple, other: tuple) -> bool:
    """Whether these are the same factors; a DTensor hands out its local tensor as a new view each time."""
    return len(one) == len(other) and all(a is b or _place(a) == _place(b) is not None for a, b in zip(one, other))


def _place(factor: Tensor | float) -> tuple[int, torch.dtype] | None:
    return (factor.data_ptr(), factor.dtype) if isinstance(factor, Tensor) else None
