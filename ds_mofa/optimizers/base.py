"""The base of what users construct and learning-rate schedulers see: a rule for the matrices, AdamW for the rest."""

import contextlib
import dataclasses
import inspect
import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_mofa.adamw.eight_bit import AdamW8bit, check_states
from ds_mofa.capture.head import FusedHead
from ds_mofa.groups import check_rates
from ds_mofa.optimizers import binding, torch_state
from ds_mofa.optimizers.absentees import Absentees
from ds_mofa.optimizers.gradient import Gradients
from ds_mofa.options import OptimizerOptions, OptionError
from ds_mofa.parameters import Frozen, Matrix, Split, split_parameters
from ds_mofa.phases import phase
from ds_mofa.rules.rule import Rule
from ds_mofa.step.state import adamw_misfit, whole_misfit
from ds_mofa.step.step import MatrixStep, claims

__all__ = ["MatrixOptimizer", "clip_factor"]

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

    adamw_gradients: Any  # of a backend where a script can drop AdamW's gradients, and the sketches must follow

    _matrices: MatrixStep | None = None
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
        parsed, _ = self.options_class.from_config(options)
        split = split_parameters(model, params, parsed)
        taken = [matrix.param for matrix in split.matrices]
        claims.release(taken, to=f"another {title}")
        self._head = FusedHead(model) if parsed.fused_head else None
        adamw = _plain_adamw(split.adamw_groups, parsed, taken[0].device) if split.adamw_groups else None
        self._assemble(split, parsed, adamw)
        self._model, self._process_group = weakref.ref(model), process_group
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
        _say(f"ds_mofa: {split.summary()}")

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
            if tuple(param.shape) != matrix.shape:
                raise OptionError(
                    f"{matrix.name!r} was {matrix.shape} when the optimizer was built and is {tuple(param.shape)} now: "
                    "build it after the model has its shape"
                )
            members.append(dataclasses.replace(matrix, param=param))
        backend = binding.connect(model, members, self._process_group)
        if isinstance(self.adamw, AdamW8bit):
            self.adamw.check_whole()
        split.matrices[:] = members
        if self._waits is not None:
            self._waits.remove()
            trained = {param for group in self.param_groups for param in group["params"]}
            named = model.named_parameters() if model is not None else ()
            split.frozen.extend(Frozen(name, p) for name, p in named if not p.requires_grad and p not in trained)
            _fuse(self.adamw_groups, backend.device)
        self._matrices = MatrixStep(members, self.options, self.rule_class(self.options), backend, head=self._head)
        self._matrices.on_detach(self._take_back)
        claims.wait_for_step(self._matrices.claim, {m.param: m.modules[0] for m in members}, self.options)
        self._gradients = Gradients(self._matrices)
        self._absentees = Absentees(split, self.adamw_groups)
        if model is not None:
            self._absentees.begin(model)
        _say_of_upcast(self._dtypes, members)

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

    @property
    def adamw_groups(self) -> list[dict[str, Any]]:
        """The param groups of everything else."""
        return self.adamw.param_groups if self.adamw is not None else []

    # ------------------------------------------------------------------ state

    def __deepcopy__(self, memo):
        raise TypeError(_NO_COPY.format(title=self.options.title))

    def __reduce_ex__(self, protocol):
        raise TypeError(_NO_COPY.format(title=self.options.title))

    @property
    def state(self) -> Any:
        """By parameter, for whoever asks what there is. Never empty: torch.distributed.checkpoint steps an optimizer that has
        no state. Reading it makes AdamW's moments. Collective where the optimizer has still to be bound.
        """
        if not self._built or self._gradients is None and self._waits is None:  # under construction, or a backend's
            return self.__dict__.setdefault("_early_state", defaultdict(dict))
        ours = {matrix.param: torch_state.placeholders(self.matrices) for matrix in self.matrices.members}
        return {**ours, **torch_state.made_moments(self.adamw)}

    @state.setter
    def state(self, value: Any) -> None:
        pass  # torch.optim.Optimizer sets an empty one

    def state_dict(self) -> dict[str, Any]:
        """The state in torch.optim's form (:mod:`ds_mofa.optimizers.torch_state`). Collective where weights are sharded; in
        one process copies on the CPU.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state: dict[str, Any] = {"state": {}, "param_groups": torch_state.positions(self.param_groups)}
        if self._matrices is not None:
            rest = self.adamw.state if self.adamw is not None else {}
            ours = torch_state.matrix_states(self._matrices)
            others = (dict(rest.get(param, {})) for group in self.adamw_groups for param in group["params"])
            state["state"] = torch_state.by_position(itertools.chain(ours, others))
            if self._matrices.exchange.processes == 1:
                state = _copied(state)
        for replace in self._optimizer_state_dict_post_hooks.values():
            state = _given(replace(self, state), state)
        return state

    def named_state_dict(self) -> dict[str, Any]:
        """The state by the names of the matrices, as DeepSpeed's checkpoints hold it: tensors and numbers, copies on the CPU
        of the first process. Collective.
        """
        return self.with_matrix_state(self.matrices.state_dict())

    def with_matrix_state(self, matrices: dict[str, Any]) -> dict[str, Any]:
        """The whole state around the matrices', which it takes a collective to gather."""
        return {
            "mofasgd": matrices,
            "masters": self.matrices.masters.state_dict(),
            "matrix_groups": self.group_settings(),
            "adamw": _copied(self.adamw.state_dict()) if self.adamw is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a run with the same model, on any number of ranks and with any rank of the factors: what
        :meth:`state_dict` or :meth:`named_state_dict` has given.

        Raises:
            ValueError: it does not fit; then nothing has changed, unless AdamW's own part is what does not.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _given(hook(self, state_dict), state_dict)
        if torch_state.is_by_position(state_dict):
            self._load_by_position(state_dict)
        else:
            self._load_named(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load_by_position(self, state_dict: dict[str, Any]) -> None:
        groups, state = state_dict["param_groups"], state_dict["state"]
        problem = torch_state.misfit(state_dict, self.param_groups, self.options.title)
        if problem:
            raise ValueError(problem)
        own, rest = groups[: len(self._matrix_groups)], groups[len(self._matrix_groups) :]
        if not state and self._matrices is None:  # Accelerate hands an optimizer its own state before it is bound
            self.load_group_settings(own)
            return
        keys = list(itertools.chain.from_iterable(group["params"] for group in own))
        others = {key: state[key] for group in rest for key in group["params"] if key in state}
        check_states({"state": others}, isinstance(self.adamw, AdamW8bit))
        self.matrices.load_state_dict(*torch_state.named(state, keys, self.matrices))
        self.load_group_settings(own)
        if self.adamw is not None:
            with _groups_kept(self.adamw):
                self.adamw.load_state_dict({"state": others, "param_groups": rest})
        torch_state.load_masters(state, keys, self.matrices)

    def _load_named(self, state_dict: dict[str, Any]) -> None:
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
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})


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


_PLACEHOLDER = nn.Parameter(torch.empty(0, device="meta"))


def _say(line: str) -> None:
    """Once a run, not once a process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        print(line, flush=True)


def _say_of_upcast(before: Mapping[str, torch.dtype], matrices: Sequence[Matrix]) -> None:
    """Accelerate makes 16-bit weights fp32 where it trains in mixed precision."""
    upcast = [m for m in matrices if before[m.name].itemsize < m.param.dtype.itemsize]
    if upcast:
        was, now = (str(dtype).removeprefix("torch.") for dtype in (before[upcast[0].name], upcast[0].param.dtype))
        _say(
            f"ds_mofa: {len(upcast)} matrices were {was} when the optimizer was built and are {now} now, so each weight takes "
            f'{upcast[0].param.dtype.itemsize} bytes: to keep them {was}, set mixed_precision "no" (HF: leave bf16 and fp16 '
            "out) for a model that is loaded so"
        )


def _fuse(groups: Iterable[dict[str, Any]], device: torch.device) -> None:
    """As :func:`_plain_adamw` does where the device is known from the start."""
    for group in groups if device.type == "cuda" else ():
        if "fused" in group and all(param.device == device or param.is_cuda for param in group["params"]):
            group["fused"] = True


def _plain_adamw(
    groups: list[dict[str, Any]], options: OptimizerOptions, device: torch.device
) -> torch.optim.Optimizer:
    if options.adamw_states == "8bit":
        adamw = AdamW8bit(groups, options)
        _say(f"ds_mofa: {adamw.summary()}")
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
