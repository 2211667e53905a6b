"""CoMERA as an optimizer: AdamW on cores, diagonals and the rest, the two objectives, and pruning."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ds_mofa.options import OptionError, Options, check_integer, check_number
from experiments.baselines.adam import check_adam
from experiments.baselines.comera.layers import TensorTrain
from experiments.baselines.comera.objective import TrainSizes
from experiments.baselines.comera.tensorize import Shape, tensorize

__all__ = ["CoMERA", "build"]

# Published code: what the other objective keeps of its weight in the late stage, so that neither is forgotten.
_LATE_LOSS, _LATE_SIZE = 0.1, 0.01


class CoMERA(torch.optim.AdamW):
    """See :mod:`experiments.baselines.comera`; made by :func:`build`.

    Attributes:
        trains: the tensor trains by name.
        steps: taken so far.
        target_size: S*, numbers in all cores; None before the late stage.
    """

    def __init__(
        self,
        trains: dict[str, TensorTrain],
        groups: list[dict[str, Any]],
        *,
        penalty: Literal["mean", "size"],
        gamma: float,
        late_after: int | None,
        target_loss: float,
        target_ratio: float,
        prune_every: int,
        **adamw: Any,
    ):
        self.trains, self.penalty, self.gamma = trains, penalty, gamma
        self.late_after, self.target_loss, self.target_ratio = late_after, target_loss, target_ratio
        self.prune_every, self.steps, self.target_size = prune_every, 0, None
        self._sizes = TrainSizes(list(trains.values()))
        self._first_size = self._sizes.stored()
        super().__init__(groups, **adamw)
        self._begin_late_stage()

    def size(self) -> int:
        """S: numbers in all cores, without those that count as zero; waits for the device."""
        return int(self._sizes.live())

    def objective(self, loss: Tensor) -> Tensor:
        """What to call ``backward`` on instead of ``loss``, a scalar: its gradient is the objective's, its value the loss'."""
        live = self._sizes.mean() if self.penalty == "mean" else self._sizes.relaxed() / self._first_size
        if self.target_size is None:
            value = loss + self.gamma * live
        else:
            exact = torch.promote_types(loss.dtype, torch.float32)
            now, size = loss.detach().to(exact), self._sizes.live()
            smaller = ((now - self.target_loss) / now < (size - self.target_size) / size).to(exact)
            value = (_LATE_LOSS + 1 - smaller) * loss + (_LATE_SIZE + smaller) * live
        return value + (loss - value).detach()

    def attach(self, model: nn.Module) -> None:
        """From now on the ``loss`` of the model's output in training is :meth:`objective` of it."""

        def with_objective(module: nn.Module, args: Any, output: Any) -> Any:
            if module.training and torch.is_grad_enabled() and getattr(output, "loss", None) is not None:
                output.loss = self.objective(output.loss)
            return output

        model.register_forward_hook(with_objective)

    def step(self, closure=None):
        loss = super().step(closure)
        self.steps += 1
        if self.steps == self.late_after or (self.prune_every and self.steps % self.prune_every == 0):
            self.prune()
        self._begin_late_stage()
        return loss

    def _begin_late_stage(self) -> None:
        if self.late_after is not None and self.steps >= self.late_after and self.target_size is None:
            self.target_size = self.target_ratio * self.size()

    @torch.no_grad()
    def prune(self) -> None:
        """Take the diagonals' zeros out of the trains, and out of AdamW's moments; waits for the device."""
        changes = {old: (new, select) for train in self.trains.values() for old, new, select in train.prune()}
        for old, (new, select) in changes.items():
            state = self.state.pop(old, None)
            if state is not None:
                self.state[new] = {
                    key: select(value).clone() if isinstance(value, Tensor) and value.shape == old.shape else value
                    for key, value in state.items()
                }
        for group in self.param_groups:
            group["params"] = [changes[param][0] if param in changes else param for param in group["params"]]
        self._sizes = TrainSizes(list(self.trains.values()))

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and where the stages are. It goes with the model's: both have the ranks that pruning has left."""
        return {**super().state_dict(), "steps": self.steps, "target_size": self.target_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; load the model's before."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.steps, self.target_size = state_dict["steps"], state_dict["target_size"]
        self._sizes = TrainSizes(list(self.trains.values()))


def build(
    model: nn.Module,
    *,
    lr: float,
    rank: int = 30,
    embedding_rank: int = 32,
    order: int = 3,
    embedding_order: int = 4,
    init: Literal["random", "svd"] = "random",
    threshold: float = 1e-2,
    rank_lr: float | None = None,
    penalty: Literal["mean", "size"] = "mean",
    gamma: float = 0.01,
    late_after: int | None = None,
    target_loss: float | None = None,
    target_ratio: float = 0.2,
    prune_every: int = 100,
    weight_decay: float = 0.0,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    adamw_lr: float | None = None,
    adamw_weight_decay: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> CoMERA:
    """Make trains of a model's weights, in place, and an optimizer of all its trained parameters.

    Args:
        model: what to train; random cores are drawn from the global generator.
        lr: of the cores.
        rank, embedding_rank, order, embedding_order, init, threshold: see
            :class:`experiments.baselines.comera.tensorize.Shape`.
        rank_lr: of the diagonals; None: 10 * lr, as published.
        penalty: of the diagonals, "mean" or "size" (:class:`experiments.baselines.comera.objective.TrainSizes`).
        gamma: its weight in the early stage.
        late_after: steps of the early stage; None: there is no late stage.
        target_loss: L*, to be given where there is a late stage.
        target_ratio: S* over the size at which the late stage begins, > 0 and <= 1.
        prune_every: steps between two prunings, which wait for the device once a bond; 0: none but before the late stage.
        weight_decay: of the cores, decoupled; diagonals have none.
        betas, eps: of all.
        adamw_lr: of what is no train; None: lr.
        adamw_weight_decay: likewise; None: ``weight_decay``.
        include, exclude: regular expressions, as MoFaSGD's: weights to make trains of, or not.

    Raises:
        OptionError: a value that cannot be right, or a model in which nothing becomes smaller.
    """
    options = Options(
        lr=lr,
        adjust_lr_fn="adamw",  # no rate of a baseline's is MoFaSGD's: any is taken
        rank=1,
        weight_decay=weight_decay,
        adamw_lr=adamw_lr,
        adamw_weight_decay=adamw_weight_decay,
        include=include,
        exclude=exclude,
    )
    for name, value in (("rank", rank), ("embedding_rank", embedding_rank)):
        check_integer(name, value, low=1, high=2**31)
    for name, value in (("order", order), ("embedding_order", embedding_order)):
        check_integer(name, value, low=1 if name == "order" else 2, high=6)
    check_integer("prune_every", prune_every, low=0, high=2**31)
    check_number("threshold", threshold, low=0, high=1)
    check_number("gamma", gamma, low=0)
    check_adam(betas, eps)
    if rank_lr is not None:
        check_number("rank_lr", rank_lr, low=0)
    for name, value, known in (("init", init, ("random", "svd")), ("penalty", penalty, ("mean", "size"))):
        if value not in known:
            raise OptionError(f"{name}={value!r} must be one of {', '.join(known)}")
    if late_after is not None:
        check_integer("late_after", late_after, low=0, high=2**31)
        if target_loss is None:
            raise OptionError("the late stage needs a target_loss, L*: the loss that is good enough, above 0")
        check_number("target_loss", target_loss, low=0)
        check_number("target_ratio", target_ratio, low=0, open_low=True)
        if target_ratio > 1:
            raise OptionError(f"target_ratio={target_ratio!r} must be > 0 and <= 1: the trains cannot grow")

    shape = Shape(
        rank=rank,
        embedding_rank=embedding_rank,
        order=order,
        embedding_order=embedding_order,
        init=init,
        threshold=threshold,
    )
    trains = tensorize(model, shape, options)
    cores = [core for train in trains.values() for core in train.cores]
    diagonals = [train.diagonal for train in trains.values()]
    own = {id(param) for param in (*cores, *diagonals)}
    rest = [param for param in model.parameters() if param.requires_grad and id(param) not in own]
    rest_decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
    groups = [
        {"params": cores, "lr": lr, "weight_decay": weight_decay},
        {"params": diagonals, "lr": 10 * lr if rank_lr is None else rank_lr, "weight_decay": 0.0},
        {"params": rest, "lr": lr if adamw_lr is None else adamw_lr, "weight_decay": rest_decay},
    ]
    return CoMERA(
        trains,
        [group for group in groups if group["params"]],
        penalty=penalty,
        gamma=gamma,
        late_after=late_after,
        target_loss=0.0 if target_loss is None else target_loss,
        target_ratio=target_ratio,
        prune_every=prune_every,
        betas=tuple(betas),
        eps=eps,
        fused=True if cores[0].device.type == "cuda" else None,
    )
