"""Parameters that get no gradient, and what that may mean: they are in the model no more, or others should be trained."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ds_mofa.parameters import Split

__all__ = ["Absentees"]

logger = logging.getLogger("ds_mofa")


class Absentees:
    """Looks at what has no gradient in a step; every parameter once for as long as it has none.

    Args:
        split: whose matrices and frozen parameters to look at.
        adamw_groups: and the others.
    """

    def __init__(self, split: Split, adamw_groups: Iterable[Mapping[str, Any]]):
        self._trained = {matrix.param: matrix.name for matrix in split.matrices}
        self._trained |= {param: "" for group in adamw_groups for param in group["params"]}
        self._frozen = list(split.frozen)
        self._known: set[nn.Parameter] = set()  # without a gradient, and in the model
        self._foreign: set[nn.Parameter] = set()  # in the model, and not this optimizer's to train

    def begin(self, model: nn.Module) -> None:
        """When the optimizer is built: what is in the model by now, and was not given to it, is none of its business."""
        names = {param: name for name, param in model.named_parameters()}
        self._trained = {param: name or names.get(param, "") for param, name in self._trained.items()}
        self._foreign = {param for param in names if param not in self._trained}

    def check(self, model: nn.Module | None) -> None:
        """Before a step.

        Raises:
            RuntimeError: a parameter that is to be trained has been replaced in the model.
        """
        self.report_thawed()
        absent = {param for param in self._trained if param.grad is None}
        if model is not None and not absent <= self._known:
            self._look(model, absent - self._known)
        self._known = absent

    def _look(self, model: nn.Module, absent: set[nn.Parameter]) -> None:
        """What is absent should be in the model all the same; what is in the model should be known."""
        present = {param: name for name, param in model.named_parameters()}
        new = [name for param, name in present.items() if param not in self._trained and param not in self._foreign]
        new = [name for name in new if model.get_parameter(name).requires_grad]
        instead = f" (in the model now, and not trained: {', '.join(new[:3])})" if new else ""
        for param, name in self._trained.items():
            if param in absent and param not in present:
                raise RuntimeError(
                    f"{name or 'a parameter'} is in the model no more{instead}: load_state_dict(assign=True), "
                    "resize_token_embeddings or an assignment has put another parameter in its place since the "
                    "optimizer was built. Build the optimizer after that"
                )
        if new:
            logger.warning(
                "ds_mofa: %d parameters came into the model after the optimizer was built, such as %r: they are not "
                "trained. Build the optimizer after that",
                len(new),
                new[0],
            )
            self._foreign |= {model.get_parameter(name) for name in new}

    def report_thawed(self) -> None:
        """Say once which parameters were frozen when the optimizer was built, and are not any more."""
        thawed = [frozen for frozen in self._frozen if frozen.param.requires_grad]
        if thawed:
            logger.warning(
                "ds_mofa: %d parameters were frozen when the optimizer was built and require a gradient now, such as %r: "
                "they are not trained, and their gradients pile up. Unfreeze before the optimizer is built, or build a "
                "new one",
                len(thawed),
                thawed[0].name,
            )
            self._frozen = [frozen for frozen in self._frozen if not frozen.param.requires_grad]
