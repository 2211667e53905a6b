"""A training that is looked at: the gradients of its matrices, step by step, as the optimizer sees them."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ds_mofa.options import Options
from ds_mofa.parameters import split_parameters
from experiments.comparison.optimizers import build, clip_gradients
from experiments.comparison.plan import Run
from experiments.comparison.tasks.base import Task, to_device
from experiments.comparison.training import rate

__all__ = ["Gradients", "Trajectory", "role", "stacked"]

Gradients = dict[str, Tensor]  # by the parameter's name, (m, n) each, float32

# The first pattern that is found in a name decides: LLaMA's names and BERT's.
_ROLES = (
    ("q", r"q_proj|attention\.self\.query"),
    ("k", r"k_proj|attention\.self\.key"),
    ("v", r"v_proj|attention\.self\.value"),
    ("o", r"o_proj|attention\.output\.dense"),
    ("mlp in", r"gate_proj|up_proj|intermediate\.dense"),
    ("mlp out", r"down_proj|output\.dense"),
)


class Trajectory:
    """The training of ``run``, once through; the same steps as :func:`experiments.comparison.training.train` makes.

    Iterating yields, for each step, its matrices' gradients after clipping. They are the model's own: whoever keeps
    them copies them.
    """

    def __init__(self, run: Run, task: Task, device: torch.device):
        self._run, self._task, self._device = run, task, device
        self.losses: list[float] = []
        model = task.model(run.seed).to(device, getattr(torch, run.training.dtype))
        torch.manual_seed(run.seed)
        clips = run.training.max_grad_norm is not None
        setting = run.setting
        self.model, self._optimizer = build(setting.optimizer, model, setting.options, task.head_modules, clips=clips)
        self.matrices = {m.name: m.param for m in split_parameters(model, model.parameters(), Options()).matrices}

    def __iter__(self) -> Iterator[Gradients]:
        run, training = self._run, self._run.training
        schedule = LambdaLR(self._optimizer, lambda step: rate(training, step))
        batches = islice(self._task.batches(run.seed, training.batch_size), training.steps)
        self.model.train()
        for step, batch in enumerate(batches, start=1):
            batch = to_device(batch, self._device)
            torch.manual_seed((run.seed << 32) + step)
            loss = self.model(**batch).loss
            loss.backward()
            if training.max_grad_norm is not None:
                clip_gradients(self.model, self._optimizer, training.max_grad_norm)
            self.losses.append(loss.item())
            yield {name: param.grad.float() for name, param in self.matrices.items()}
            self._optimizer.step()
            schedule.step()
            self._optimizer.zero_grad()

    def evaluate(self) -> dict[str, float]:
        """On "dev", as the weights are now."""
        return self._task.evaluate(self.model, self._task.held_out("dev"), self._device)


def role(name: str) -> str:
    """What a matrix does in its layer."""
    return next((role for role, pattern in _ROLES if re.search(pattern, name)), "other")


def stacked(gradients: Mapping[str, Tensor]) -> dict[tuple[str, ...], Tensor]:
    """All matrices of one shape as one batch (B, m, n), by their names."""
    names = defaultdict(list)
    for name, gradient in gradients.items():
        names[tuple(gradient.shape)].append(name)
    return {tuple(group): torch.stack([gradients[name] for name in group]) for group in names.values()}
