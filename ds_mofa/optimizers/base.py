"""The base of what users construct and learning-rate schedulers see: a rule for the matrices, AdamW for the rest."""

import contextlib
import dataclasses
import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_mofa.adamw.eight_bit import AdamW8bit
from ds_mofa.capture.head import FusedHead
from ds_mofa.groups import check_rates
from ds_mofa.optimizers import binding
from ds_mofa.optimizers.absentees import Absentees
from ds_mofa.optimizers.eight_bits import check_still_kept, keep_in_eight_bits
from ds_mofa.optimizers.gradient import Gradients
from ds_mofa.optimizers.rest import adamw_of, beside, fuse
from ds_mofa.optimizers.stateful import Stateful
from ds_mofa.options import OptimizerOptions, OptionError
from ds_mofa.parameters import Frozen, Split, split_parameters
from ds_mofa.phases import phase
from ds_mofa.rules.rule import Rule
from ds_mofa.step.step import MatrixStep, claims

__all__ = ["MatrixOptimizer", "clip_factor"]


class MatrixOptimizer(Stateful):
    """A rule for the matrices of a model, AdamW for everything else; the base of :class:`ds_mofa.MoFaSGD`.

    Args:
        params: the model, or parameters, named parameters or param groups of it together with ``model``.
            A group's own ``lr`` and ``weight_decay`` go before the options'; what else it may say is in
            :func:`ds_mofa.groups.check_group`.
        model: the model that owns the parameters; which module holds a parameter tells an embedding from a
            matrix.
        process_group: all processes that see different data. By default those of the mesh that ``fully_shard`` was given,
            or all there are.
        **options: see ``options_class``, where each has its range, unit and source.

    Raises:
        OptionError: an option or a group's value out of range, nothing to train, or a model that is wrapped already in what
            would have to be told of the optimizer first.

    One process, several, DistributedDataParallel (build it before the model is wrapped), ``fully_shard`` (after; or before
    Accelerate's or the HF Trainer's ``prepare``): it is *bound* to its parameters at once, or where they may still be
    sharded, wrapped or moved, before the first forward. All processes come there together.

    Of the matrices, ``param_groups`` come first, then AdamW's. One schedule moves them all: AdamW's groups
    carry the matrices' ``lr`` and step at ``lr * lr_scale``, lr_scale = adamw_lr / lr of the options. A group's own
    ``lr`` (``{"params": ..., "lr": lr * 0.9**k}``) so scales both its parts by one ratio, and schedulers see it in
    both.
    """

    options_class: ClassVar[type[OptimizerOptions]]
    rule_class: ClassVar[Callable[..., Rule]]
    __signature__: ClassVar[inspect.Signature]

    process_group: dist.ProcessGroup | None = None  # as given to the constructor
    adamw_gradients: Any  # of a backend where a script can drop AdamW's gradients, and the sketches must follow

    _gradients: Gradients | None = None  # None where a backend has its own
    _waits: binding.FirstForward | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show each option in ``inspect.signature(cls)``, and so in help() and notebooks: from the options' class."""
        super().__init_subclass__(**kwargs)
        if "options_class" in vars(cls):
            cls.__signature__ = _signature(cls)

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        *,
        model: nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ):
        if isinstance(params, nn.Module):
            model = params
            params = model.parameters()
        title = self.options_class.title
        if model is None:
            raise OptionError(
                f"{title} needs the model, to tell an embedding from a matrix: {title}(model, ...) or "
                f"{title}(param_groups, model=model, ...)"
            )
        if any(hasattr(param, "ds_tensor") for param in model.parameters()):
            raise OptionError(
                f"ZeRO stage 3 holds this model's weights in partitions, which {title} can train in an engine of that stage "
                f'alone: use deepspeed.initialize with "optimizer": {{"type": "{title}"}} in the config'
            )
        binding.refuse(model)
        parsed, _ = self.options_class.from_config(options)
        split = split_parameters(model, params, parsed)
        taken = [matrix.param for matrix in split.matrices]
        claims.release(taken, to=f"another {title}")
        if parsed.weights == "int8":
            binding.say(f"ds_mofa: {keep_in_eight_bits(model, split.matrices)}")
        self.plain = True
        self._head = FusedHead(model) if parsed.fused_head else None
        adamw = adamw_of(split.adamw_groups, parsed, taken[0].device) if split.adamw_groups else None
        self._assemble(split, parsed, adamw)
        self._model, self.process_group = weakref.ref(model), process_group
        self._take_back = binding.announce(model, split.matrices)
        if binding.settled(taken):
            self.bind()
        else:
            claims.wait_for_step(None, {matrix.param: matrix.modules[0] for matrix in split.matrices}, parsed)
            self._waits = binding.FirstForward(model, split.matrices, self.bind)
            weakref.finalize(self, self._waits.remove).atexit = False
            weakref.finalize(self, self._take_back).atexit = False
            for matrix in split.matrices:
                matrix.param = _PLACEHOLDER  # sharding frees a whole weight when nobody refers to it
            split.frozen.clear()
        binding.say(f"ds_mofa: {split.summary()}")

    def bind(self) -> None:
        """Bind the optimizer to the parameters that stand in its ``param_groups`` by now; it is bound once. Collective.

        Raises:
            OptionError: the model cannot be trained right as it is.
        """
        if self._matrices is not None:
            return
        split, model = self.split, self._model()
        params = itertools.chain.from_iterable(group["params"] for group in self._matrix_groups)
        members = []
        for matrix, param in zip(split.matrices, params, strict=True):
            if tuple(param.shape) != matrix.full_shape:
                raise OptionError(
                    f"{matrix.name!r} was {matrix.full_shape} when the optimizer was built and is {tuple(param.shape)} now: "
                    "build it after the model has its shape"
                )
            members.append(dataclasses.replace(matrix, param=param))
        if self.options.weights == "int8":
            check_still_kept(members)
        backend = binding.connect(model, members, self.process_group)
        if isinstance(self.adamw, AdamW8bit):
            self.adamw.check_whole()
        split.matrices[:] = members
        if self._waits is not None:
            self._waits.remove()
            trained = {param for group in self.param_groups for param in group["params"]}
            named = model.named_parameters() if model is not None else ()
            split.frozen.extend(Frozen(name, p) for name, p in named if not p.requires_grad and p not in trained)
        fuse(self.adamw_groups, backend.device)
        self._matrices = MatrixStep(members, self.options, self.rule_class(self.options), backend, head=self._head)
        self._matrices.on_detach(self._take_back)
        claims.wait_for_step(self._matrices.claim, {m.param: m.modules[0] for m in members}, self.options)
        self._gradients = Gradients(self._matrices)
        self._absentees = Absentees(split, self.adamw_groups)
        if model is not None:
            self._absentees.begin(model)
        binding.say_of_upcast(self._dtypes, members)

    @classmethod
    def to_int8(cls, model: nn.Module, **options: Any) -> nn.Module:
        """Keep the matrices of a model in eight bits before it is moved to the GPU, which then need not have room for more.

        The optimizer's ``weights="int8"`` does the same where the weights lie when it is built, and finds it done here.

        Args:
            model: in bf16 or fp32; changed in place.
            options: the optimizer's: what is a matrix goes by ``include``, ``exclude`` and ``rank``.

        Returns:
            The model.

        Raises:
            OptionError: it cannot be, see :func:`ds_mofa.optimizers.eight_bits.keep_in_eight_bits`.
        """
        parsed, _ = cls.options_class.from_config({**options, "weights": "int8"})
        keep_in_eight_bits(model, split_parameters(model, model.parameters(), parsed).matrices)
        return model

    @property
    def matrices(self) -> MatrixStep:
        """The step of the matrices. Collective where the optimizer has still to be bound."""
        if self._matrices is None:
            self.bind()
        assert self._matrices is not None  # bind has made it
        return self._matrices

    @classmethod
    def from_parts(
        cls, split: Split, options: OptimizerOptions, adamw: torch.optim.Optimizer | None, matrices: MatrixStep
    ) -> "MatrixOptimizer":
        """An optimizer around an AdamW and a :class:`MatrixStep` that a backend has built."""
        self = cls.__new__(cls)
        self._matrices = matrices
        self._assemble(split, options, adamw)
        return self

    def _assemble(self, split: Split, options: OptimizerOptions, adamw: torch.optim.Optimizer | None) -> None:
        self.options, self.split, self.adamw = options, split, None
        self._dtypes = {matrix.name: matrix.param.dtype for matrix in split.matrices}
        self._matrix_groups: list[dict[str, Any]] = []
        self._clip: Tensor | float = 1.0
        self._built = False
        super().__init__(split.matrix_groups, {"lr": options.lr, "weight_decay": options.weight_decay})
        self.adamw, self._built = adamw, True
        if not self.plain:  # else when it is bound: it refers to the parameters
            self._absentees = Absentees(split, self.adamw_groups)

    # ------------------------------------------------------------------ what schedulers and users see

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        # Looked up anew each time: loading a state replaces AdamW's dicts, and a kept one would freeze its lr.
        return self._matrix_groups + self.adamw_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        own = [group for group in groups if "lr_scale" not in group]
        self._matrix_groups = own
        if self.adamw is not None:
            self.adamw.param_groups = [group for group in groups if "lr_scale" in group]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._built:
            title = self.options.title
            raise OptionError(f"{title} takes all its parameters when it is built: pass them to the constructor")
        self._matrix_groups.append(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """Move every parameter once, by the gradients of all backwards since the last step.

        A step whose sketches hold a NaN or Inf changes nothing at all; ``optimizer.matrices.skipped`` counts it.

        Raises:
            OptionError: a schedule has made a group's ``lr`` or ``weight_decay`` negative or no number, or raised ``lr`` beyond
                what AdamW may have. Nothing moves.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_rates(self.param_groups, self.options)
        if self._matrices is None:
            self.bind()
        if self._gradients is not None and self._gradients.are_a_dry_run([group["lr"] for group in self.param_groups]):
            return loss
        self._reduce()
        if self._gradients is None:
            self.report_thawed()
        else:
            self._check()
            self._clip = self._gradients.clip()
        if self.matrices.finite:
            with contextlib.ExitStack() as joined:
                if self.adamw is not None:
                    with beside(self.adamw, joined), phase("AdamW"), self.adamw_lr():
                        self.adamw.step()
                clip = self._clip
                self._forget_clip()  # whatever a report's receiver may raise
                if self._gradients is None:
                    self.matrices.update(self._matrix_groups, clip)
                else:
                    self._write(clip)
        else:
            self.matrices.discard()
        self._forget_clip()
        return loss

    def report_thawed(self) -> None:
        """Say once which parameters were frozen when the optimizer was built, and are not any more."""
        self._absentees.report_thawed()

    def _check(self) -> None:
        """Before a step: it moves what the model computes with."""
        self.matrices.backend.check([param for group in self.adamw_groups for param in group["params"]])
        self._absentees.check(self._model())

    def _write(self, clip: Tensor | float) -> None:
        """Factors and weights in a plain loop, where others may write the weights too, and keep graphs of them."""
        masters = self.matrices.masters
        masters.look()
        try:
            self.matrices.update(self._matrix_groups, clip)
        finally:
            torch.autograd.graph.increment_version([matrix.param for matrix in self.split.matrices])
            masters.written()

    def _reduce(self) -> None:
        self.matrices.claim.check()
        if self._gradients is not None:
            self._gradients.settle()
        elif not self.matrices.pending:
            self.matrices.reduce()

    def _forget_clip(self) -> None:
        self._clip = 1.0
        if self._gradients is not None:
            self._gradients.forget()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of this step down to a global norm of at most ``max_norm``.

        The norm is over AdamW's gradients and the matrices' projected ones, of which only the sketches exist. In a plain
        loop ``torch.nn.utils.clip_grad_norm_`` does the same, through what stands in ``.grad``. Call it after the last
        backward and before ``step``; a second call finds the gradients as the first has left them. Collective.

        Returns:
            The norm before clipping, a scalar tensor.
        """
        self._reduce()
        grads = [p.grad for group in self.adamw_groups for p in group["params"] if p.grad is not None]
        if self._gradients is not None:
            self._clip = self._gradients.clip()
        ours = self.matrices.norm.float() * self._clip
        norm = torch.linalg.vector_norm(torch.stack([ours, *self.matrices.backend.norms(grads)]))
        clip = clip_factor(norm, max_norm)
        for grad in grads:
            grad.mul_(clip)
        if self._gradients is not None:
            self._gradients.scale_all(clip)
        else:
            self._clip = self._clip * clip
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and sketches since the last step."""
        if self.adamw is not None:
            self.adamw.zero_grad(set_to_none)
        if self._gradients is not None:
            self._gradients.let_go()
        elif self._matrices is not None:
            self._matrices.clear()
            self._matrices.drop_pending()
        self._clip = 1.0

    def replayed(self) -> None:
        """Say that a CUDA graph has added to the sketches of the matrices that have a gradient: no hook of a backward has run.
        :class:`ds_mofa.GraphedMicroBatch` does; after each replay of a graph of your own do it too.
        """
        if self._gradients is not None:
            self._gradients.replayed()

    def detach(self) -> None:
        """Give the model back as it was before this optimizer, for another one, or to export it."""
        self.zero_grad()
        if self._matrices is not None:
            self._matrices.detach()
        elif self._waits is not None:
            self._waits.remove()
            self._take_back()

    @contextlib.contextmanager
    def adamw_lr(self) -> Iterator[None]:
        """Within: AdamW's groups carry AdamW's own learning rates, for a step."""
        groups = self.adamw_groups
        scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * group["lr_scale"]
        try:
            yield
        finally:
            for group, lr in zip(groups, scheduled):
                group["lr"] = lr

    @property
    def matrix_groups(self) -> list[dict[str, Any]]:
        """The param groups of the matrices alone."""
        return self._matrix_groups


def _signature(kind: type[MatrixOptimizer]) -> inspect.Signature:
    """The constructor's, with every option instead of ``**options``."""
    _, *own, _ = inspect.signature(MatrixOptimizer.__init__).parameters.values()
    return inspect.Signature([*own, *kind.options_class.keywords()])


_PLACEHOLDER = nn.Parameter(torch.empty(0, device="meta"))


def clip_factor(norm: Tensor | float, max_norm: float) -> Tensor | float:
    """The factor, <= 1, that takes a gradient of this norm to at most ``max_norm``, as DeepSpeed computes it; 0 where
    the norm is NaN, which may come from AdamW's gradients alone and must not enter the momentum.
    """
    excess = (norm + 1e-6) / max_norm
    if isinstance(excess, Tensor):
        return 1.0 / excess.nan_to_num(nan=math.inf, posinf=math.inf).clamp_min(1.0)
    return 0.0 if math.isnan(excess) else 1.0 / max(excess, 1.0)
