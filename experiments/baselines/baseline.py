"""A baseline as a comparison sees it: one method for the matrices, torch's AdamW for the rest, one optimizer."""

from typing import Any

import torch

from experiments.baselines.restarts import forget_state

__all__ = ["Baseline"]


class Baseline(torch.optim.Optimizer):
    """Two optimizers that step together.

    ``param_groups`` holds the matrices' groups, then AdamW's, each with its own ``lr``: schedulers of torch and Hugging
    Face scale each from where it starts.

    Args:
        matrices: of the matrices.
        rest: of everything else, or None where there is nothing else.
        reset_every: steps between two momentum resets of both (:mod:`experiments.baselines.restarts`), 0 for none.
    """

    def __init__(self, matrices: torch.optim.Optimizer, rest: torch.optim.Optimizer | None, *, reset_every: int = 0):
        self.parts = [matrices] if rest is None else [matrices, rest]
        self.reset_every, self.steps, self._built = reset_every, 0, False
        super().__init__(self._groups_of_parts(), {})
        self._built = True

    @property
    def matrices(self) -> torch.optim.Optimizer:
        """The method's own part."""
        return self.parts[0]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._built:
            raise ValueError("a baseline takes all its parameters when it is built: build it from the whole model")
        super().add_param_group(param_group)

    def _groups_of_parts(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[torch.nn.Parameter, dict[str, Any]]:
        """Both parts' state; a copy of the outer dict."""
        return {param: state for part in self.parts for param, state in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        pass  # torch's constructor sets an empty one

    @torch.no_grad()
    def step(self, closure=None):
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        self.steps += 1
        if self.reset_every and self.steps % self.reset_every == 0:
            for part in self.parts:
                forget_state(part)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients since the last step, captured ones included."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        return {"parts": [part.state_dict() for part in self.parts], "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of the same baseline of the same model.

        Raises:
            ValueError: it does not fit.
        """
        if len(state_dict["parts"]) != len(self.parts):
            raise ValueError(
                f"the checkpoint holds {len(state_dict['parts'])} optimizers, this one is made of {len(self.parts)}: "
                "build it by the name, the model and the settings that it was saved with"
            )
        for part, saved in zip(self.parts, state_dict["parts"]):
            part.load_state_dict(saved)
        self.steps = state_dict["steps"]
        self.param_groups = self._groups_of_parts()  # loading has put new dicts instead of the old
