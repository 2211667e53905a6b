"""The base of what users construct and learning-rate schedulers see: a rule for the matrices, AdamW for the rest."""

import contextlib
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_mofa.adamw.eight_bit import AdamW8bit, check_states
from ds_mofa.capture.head import FusedHead
from ds_mofa.groups import check_rates
from ds_mofa.optimizers.absentees import Absentees
from ds_mofa.optimizers.gradient import Gradients
from ds_mofa.options import OptimizerOptions, OptionError
from ds_mofa.parameters import Split, split_parameters
from ds_mofa.phases import phase
from ds_mofa.rules.rule import Rule
from ds_mofa.step.backend import OneProcess
from ds_mofa.step.state import adamw_misfit, whole_misfit
from ds_mofa.step.step import MatrixStep, claims

__all__ = ["MatrixOptimizer", "clip_factor"]

_NO_TORCH_STATE = (
    "torch.distributed.checkpoint asks {title} for a state by parameter, which it does not have in one process: save "
    "optimizer.state_dict() and load it with optimizer.load_state_dict()"
)

_NO_COPY = (
    "{title} cannot be copied or pickled: it is part of its model's forward and backward. Save state_dict(); for a copy of "
    "the model build a new {title} and load it there"
)


class MatrixOptimizer(torch.optim.Optimizer):
    """A rule for the matrices of a model, AdamW for everything else; the base of :class:`ds_mofa.MoFaSGD`.

    Args:
        params: the model, or parameters, named parameters or param groups of it together with ``model``.
            A group's own ``lr`` and ``weight_decay`` go before the options'; what else it may say is in
            :func:`ds_mofa.groups.check_group`.
        model: the model that owns the parameters; which module holds a parameter tells an embedding from a
            matrix.
        **options: see ``options_class``, where each has its range, unit and source.

    Raises:
        OptionError: an option or a group's value out of range, or nothing to train.

    Of the matrices, ``param_groups`` come first, then AdamW's. One schedule moves them all: AdamW's groups
    carry the matrices' ``lr`` and step at ``lr * lr_scale``, lr_scale = adamw_lr / lr of the options. A group's own
    ``lr`` (``{"params": ..., "lr": lr * 0.9**k}``) so scales both its parts by one ratio, and schedulers see it in
    both.
    """

    options_class: ClassVar[type[OptimizerOptions]]
    rule_class: ClassVar[Callable[..., Rule]]
    __signature__: ClassVar[inspect.Signature]

    adamw_gradients: Any  # of a backend where a script can drop AdamW's gradients, and the sketches must follow

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show each option in ``inspect.signature(cls)``, and so in help() and notebooks: from the options' class."""
        super().__init_subclass__(**kwargs)
        if "options_class" in vars(cls):
            cls.__signature__ = _signature(cls)

    def __init__(self, params: nn.Module | Iterable[Any], *, model: nn.Module | None = None, **options: Any):
        if isinstance(params, nn.Module):
            model = params
            params = model.parameters()
        title = self.options_class.title
        if model is None:
            raise OptionError(
                f"{title} needs the model, to tell an embedding from a matrix: {title}(model, ...) or "
                f"{title}(param_groups, model=model, ...)"
            )
        _refuse_several_processes(title)
        if any(hasattr(param, "ds_tensor") for param in model.parameters()):
            raise OptionError(
                f"ZeRO stage 3 holds this model's weights in partitions, which {title} can train in an engine of that stage "
                f'alone: use deepspeed.initialize with "optimizer": {{"type": "{title}"}} in the config'
            )
        parsed, _ = self.options_class.from_config(options)
        split = split_parameters(model, params, parsed)
        claims.release((matrix.param for matrix in split.matrices), to=f"another {title}")
        head = FusedHead(model) if parsed.fused_head else None
        adamw = None
        device = split.matrices[0].param.device
        if split.adamw_groups:
            adamw = _plain_adamw(split.adamw_groups, parsed, device)
        rule = self.rule_class(parsed)
        matrices = MatrixStep(split.matrices, parsed, rule, OneProcess(device), head=head)
        self._assemble(split, parsed, adamw, matrices, Gradients(matrices))
        self._model = weakref.ref(model)
        self._absentees.begin(model)
        print(f"ds_mofa: {split.summary()}", flush=True)
        holders = {matrix.param: matrix.modules[0] for matrix in split.matrices}
        claims.wait_for_step(matrices.claim, holders, parsed)

    @classmethod
    def from_parts(
        cls, split: Split, options: OptimizerOptions, adamw: torch.optim.Optimizer | None, matrices: MatrixStep
    ) -> "MatrixOptimizer":
        """An optimizer around an AdamW and a :class:`MatrixStep` that a backend has built."""
        self = cls.__new__(cls)
        self._assemble(split, options, adamw, matrices)
        return self

    def _assemble(
        self,
        split: Split,
        options: OptimizerOptions,
        adamw: torch.optim.Optimizer | None,
        matrices: MatrixStep,
        gradients: Gradients | None = None,
    ) -> None:
        self.options, self.split, self.adamw, self.matrices = options, split, None, matrices
        self._gradients = gradients  # None where a backend has its own
        self._matrix_groups: list[dict[str, Any]] = []
        self._clip: Tensor | float = 1.0
        self._built = self._looked_for_state = False
        super().__init__(split.matrix_groups, {"lr": options.lr, "weight_decay": options.weight_decay})
        self.adamw, self._built = adamw, True
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
            OptionError: a schedule has made a group's ``lr`` or ``weight_decay`` negative or no number. Nothing moves.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_rates(self.param_groups)
        if self._gradients is not None and self._gradients.are_a_dry_run([group["lr"] for group in self.param_groups]):
            self._looked_for_state = True
            return loss
        self._reduce()
        if self._gradients is None:
            self.report_thawed()
        else:
            self._absentees.check(self._model())
            self._clip = self._gradients.clip()
        if self.matrices.finite:
            if self.adamw is not None:
                with phase("AdamW"), self.adamw_lr():
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

    def _write(self, clip: Tensor | float) -> None:
        """Factors and weights, in one process, where others may write the weights too, and keep graphs of them."""
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
            _refuse_several_processes(self.options.title)
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

        The norm is over AdamW's gradients and the matrices' projected ones, of which only the sketches exist. In one
        process ``torch.nn.utils.clip_grad_norm_`` does the same, through what stands in ``.grad``. Call it after the last
        backward and before ``step``; a second call finds the gradients as the first has left them.

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
        else:
            self.matrices.clear()
            self.matrices.drop_pending()
        self._clip = 1.0

    def detach(self) -> None:
        """Give the model back as it was before this optimizer, for another one, or to export it."""
        self.zero_grad()
        self.matrices.detach()

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

    @property
    def adamw_groups(self) -> list[dict[str, Any]]:
        """The param groups of everything else."""
        return self.adamw.param_groups if self.adamw is not None else []

    # ------------------------------------------------------------------ state

    def __deepcopy__(self, memo):
        raise TypeError(_NO_COPY.format(title=self.options.title))

    def __reduce_ex__(self, protocol):
        raise TypeError(_NO_COPY.format(title=self.options.title))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, copies on the CPU: the factors by name, AdamW's state, every group's settings."""
        looked, self._looked_for_state = self._looked_for_state, False
        if looked:
            raise NotImplementedError(_NO_TORCH_STATE.format(title=self.options.title))
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self.with_matrix_state(self.matrices.state_dict())
        for replace in self._optimizer_state_dict_post_hooks.values():
            state = _given(replace(self, state), state)
        return state

    def with_matrix_state(self, matrices: dict[str, Any]) -> dict[str, Any]:
        """The whole state around the matrices', which it takes a collective to gather."""
        return {
            "mofasgd": matrices,
            "masters": self.matrices.masters.state_dict(),
            "matrix_groups": self.group_settings(),
            "adamw": _copied(self.adamw.state_dict()) if self.adamw is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a run with the same model, on any number of ranks and with any rank of the factors.

        Raises:
            ValueError: it does not fit; then nothing has changed, unless AdamW's own part is what does not.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _given(hook(self, state_dict), state_dict)
        problem = whole_misfit(state_dict, self.options.title)
        if problem is None:
            self.check_group_settings(state_dict["matrix_groups"])
            problem = adamw_misfit(state_dict["adamw"], self.adamw_groups)
        if problem:
            raise ValueError(problem)
        check_states(state_dict["adamw"], isinstance(self.adamw, AdamW8bit))
        self.matrices.load_state_dict(state_dict["mofasgd"])
        self.load_group_settings(state_dict["matrix_groups"])
        if self.adamw is not None:
            with _groups_kept(self.adamw):
                self.adamw.load_state_dict(state_dict["adamw"])
        self.matrices.masters.load_state_dict(state_dict["masters"])
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def group_settings(self) -> list[dict[str, Any]]:
        """What the matrix groups say besides their parameters."""
        return [{key: value for key, value in group.items() if key != "params"} for group in self._matrix_groups]

    def check_group_settings(self, settings: list[dict[str, Any]]) -> None:
        """Raise a ValueError where :meth:`load_group_settings` would."""
        if len(settings) != len(self._matrix_groups):
            raise ValueError(
                f"the checkpoint has {len(settings)} matrix param groups, this run has {len(self._matrix_groups)}: "
                "use the param groups that it was saved with"
            )

    def load_group_settings(self, settings: list[dict[str, Any]]) -> None:
        """Take over what :meth:`group_settings` has given."""
        self.check_group_settings(settings)
        for group, saved in zip(self._matrix_groups, settings):
            group.update(saved)


def _signature(kind: type[MatrixOptimizer]) -> inspect.Signature:
    """The constructor's, with every option instead of ``**options``."""
    _, *own, _ = inspect.signature(MatrixOptimizer.__init__).parameters.values()
    return inspect.Signature([*own, *kind.options_class.keywords()])


def _given(value: Any, otherwise: Any) -> Any:
    """What a hook has returned, which may be nothing."""
    return otherwise if value is None else value


def _copied(state: Any) -> Any:
    """A state's tensors as copies on the CPU: torch hands out the optimizer's own, which go on changing."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return type(state)(map(_copied, state)) if isinstance(state, list | tuple) else state


@contextlib.contextmanager
def _groups_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within: loading a state leaves the param groups the dicts that they are, which wrappers and schedulers hold."""
    groups = list(optimizer.param_groups)
    yield
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        if group is not loaded:
            group.clear()
            group.update(loaded)
    optimizer.param_groups = groups


def _refuse_several_processes(title: str) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise OptionError(
            f"{title} was built outside DeepSpeed in a run of several processes, where nothing would add up its "
            f'sketches. Use deepspeed.initialize with "optimizer": {{"type": "{title}"}} in the config'
        )


def _plain_adamw(
    groups: list[dict[str, Any]], options: OptimizerOptions, device: torch.device
) -> torch.optim.Optimizer:
    if options.adamw_states == "8bit":
        adamw = AdamW8bit(groups, options)
        print(f"ds_mofa: {adamw.summary()}", flush=True)
        return adamw
    beta1, beta2 = options.adamw_betas
    return torch.optim.AdamW(
        groups,
        betas=(beta1, beta2),
        eps=options.adamw_eps,
        fused=True if device.type == "cuda" else None,  # a third of the time of the default there
    )


def clip_factor(norm: Tensor | float, max_norm: float) -> Tensor | float:
    """The factor, <= 1, that takes a gradient of this norm to at most ``max_norm``, as DeepSpeed computes it; 0 where
    the norm is NaN, which may come from AdamW's gradients alone and must not enter the momentum.
    """
    excess = (norm + 1e-6) / max_norm
    if isinstance(excess, Tensor):
        return 1.0 / excess.nan_to_num(nan=math.inf, posinf=math.inf).clamp_min(1.0)
    return 0.0 if math.isnan(excess) else 1.0 / max(excess, 1.0)
