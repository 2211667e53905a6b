"""Saving and loading an optimizer: torch.optim's form of its state, and DeepSpeed's, which is by name."""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_mofa.adamw.eight_bit import AdamW8bit, check_states
from ds_mofa.groups import check_units
from ds_mofa.optimizers import torch_state
from ds_mofa.options import OptimizerOptions
from ds_mofa.step.state import adamw_misfit, whole_misfit
from ds_mofa.step.step import MatrixStep

__all__ = ["Stateful"]

_NO_COPY = (
    "{title} cannot be copied or pickled: it is part of its model's forward and backward. Save state_dict(); for a copy of "
    "the model build a new {title} and load it there"
)


class Stateful(torch.optim.Optimizer):
    """What of a :class:`ds_mofa.optimizers.base.MatrixOptimizer` is about its state.

    Attributes:
        options: of the optimizer.
        adamw: what trains the rest; None where there is none.
    """

    options: OptimizerOptions
    adamw: torch.optim.Optimizer | None

    _built: bool = False
    plain = False  # whether a plain loop has it, which may ask for its state before it is bound
    _matrices: MatrixStep | None = None
    _matrix_groups: list[dict[str, Any]]

    @property
    def matrices(self) -> MatrixStep:
        """The step of the matrices."""
        raise NotImplementedError

    @property
    def adamw_groups(self) -> list[dict[str, Any]]:
        """The param groups of everything else."""
        return self.adamw.param_groups if self.adamw is not None else []

    def __deepcopy__(self, memo):
        raise TypeError(_NO_COPY.format(title=self.options.title))

    def __reduce_ex__(self, protocol):
        raise TypeError(_NO_COPY.format(title=self.options.title))

    @property
    def state(self) -> Any:
        """By parameter, for whoever asks what there is. Never empty: torch.distributed.checkpoint steps an optimizer that has
        no state. Reading it makes AdamW's moments. Collective where the optimizer has still to be bound.
        """
        if not self._built or not self.plain:  # under construction, or a backend's
            return self.__dict__.setdefault("_no_state", defaultdict(dict))
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
        self.check_group_settings(own)
        # What only this run's implementation has, where another's group does not say it.
        rest = [{**group, **saved} for group, saved in zip(self.adamw_groups, rest, strict=True)]
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
        for group in settings:
            check_units(group, self.options, "the checkpoint's ")

    def load_group_settings(self, settings: list[dict[str, Any]]) -> None:
        """Take over what :meth:`group_settings` has given."""
        self.check_group_settings(settings)
        for group, saved in zip(self._matrix_groups, settings):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})


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
