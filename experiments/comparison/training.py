"""One run: a plain PyTorch loop, and what it measures."""

import contextlib
import copy
import functools
import json
import math
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from experiments.baselines import state_bytes
from experiments.comparison.digests import Digest
from experiments.comparison.environment import describe
from experiments.comparison.optimizers import build, clip_gradients
from experiments.comparison.plan import Run, Setting, Training
from experiments.comparison.tasks.base import Batch, Task, to_device

__all__ = ["check_settings", "kept_key", "rate", "train", "train_and_keep"]

_RUN_FILE = "comparison_run.json"
# MoFaSGD's first step is another than its second, so both compile.
_COMPILING_STEPS = 2


def train(run: Run, task: Task, device_name: str, keep: Path | None = None) -> dict[str, Any]:
    """Train once. Weights, batches and dropout come from the seed alone; the optimizer is all that differs.

    Args:
        keep: folder to write the trained model to; None: no model is kept.

    Returns:
        A JSON object: ``train_loss`` of every step; ``evaluations`` on "dev", each with its ``step``, the ``seconds``
        of training and the ``units`` trained on until then; ``test``, an evaluation; ``diverged_at``, the step of the
        first loss or evaluation that was not finite, or None (else there is no ``test`` and no speed);
        ``compiling_seconds``, those of the first two steps; ``units_per_second``, without the steps before the first
        evaluation, which also warm up; in bytes ``state_bytes``, ``peak_allocated`` (of PyTorch's CUDA allocator during
        training; None on a CPU) and ``peak_resident`` (of this whole process); ``trained_parameters``; ``control``,
        hashes of what all runs of a seed must share; ``environment``.
    """
    device, training = torch.device(device_name), run.training
    model = task.model(run.seed)
    weights = Digest([dict(model.named_parameters())])
    model.to(device, getattr(torch, training.dtype))
    torch.manual_seed(run.seed)  # LoRA's adapters are drawn now
    model, optimizer = _built(run.setting, training, model, task)
    schedule = LambdaLR(optimizer, lambda step: rate(training, step))
    dev, test = task.held_out("dev"), task.held_out("test")
    trained_on, meter, losses, units, compiling = Digest(), _Meter(device), [], 0, 0.0
    products = functools.partial(_products, training.matmul, device)
    with products():
        evaluations = [{"step": 0, "seconds": 0.0, "units": 0, **task.evaluate(model, dev, device)}]
    model.train()
    for step, batch in enumerate(islice(task.batches(run.seed, training.batch_size), training.steps), start=1):
        trained_on.add(batch)
        units += task.units(batch)
        batch = to_device(batch, device)
        # Anew each step: an optimizer that draws random numbers must not change the next step's dropout.
        torch.manual_seed((run.seed << 32) + step)
        try:
            with meter:
                losses.append(_step(model, optimizer, batch, training.max_grad_norm, products))
                schedule.step()
        except torch.linalg.LinAlgError:  # what an SVD makes of a gradient that is not finite
            losses.append(torch.tensor(math.nan, device=device))
            break
        compiling = meter.seconds if step <= _COMPILING_STEPS else compiling
        if step % training.eval_every == 0 or step == training.steps:
            with products():
                measured = task.evaluate(model, dev, device)
            evaluations.append({"step": step, "seconds": meter.seconds, "units": units, **measured})
            if not torch.stack(losses).isfinite().all() or not _finite(measured):
                break
    losses = torch.stack(losses).tolist()
    diverged_at = _first_not_finite(losses, evaluations)
    with products():
        tested = task.evaluate(model, test, device) if diverged_at is None else None
    result = {
        # Nine digits tell every fp32 number from all others.
        "train_loss": [float(f"{loss:.9g}") if math.isfinite(loss) else None for loss in losses],
        "evaluations": [entry for entry in evaluations if _finite(entry)],
        "test": tested,
        "diverged_at": diverged_at,
        "compiling_seconds": compiling,
        "units_per_second": _throughput(evaluations) if diverged_at is None else None,
        "state_bytes": state_bytes(optimizer),
        "peak_allocated": meter.peak,
        "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts KiB
        "trained_parameters": sum(param.numel() for param in model.parameters() if param.requires_grad),
        "control": {"weights": str(weights), "batches": str(trained_on), "held out": str(Digest([*dev, *test]))},
        "environment": describe(device),
    }
    if keep is not None and diverged_at is None:
        _save(model, task, run, keep)
    return result


def train_and_keep(run: Run, task: Task, keep: Path | None, device_name: str) -> dict[str, Any]:
    """:func:`train`, with the device last, where :mod:`experiments.comparison.isolation` puts it."""
    return train(run, task, device_name, keep)


def check_settings(settings: Sequence[Setting], training: Training, task: Task, device_name: str) -> None:
    """Build every optimizer once: what cannot be built is to be known before hours of training, not after.

    Raises:
        UserError: see :func:`experiments.comparison.optimizers.build`.
    """
    model = task.model(seed=0).to(device_name)
    for setting in settings:
        _built(setting, training, copy.deepcopy(model), task)


def rate(training: Training, step: int) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak."""
    if step < training.warmup_steps:
        return (step + 1) / (training.warmup_steps + 1)
    done = (step - training.warmup_steps) / (training.steps - training.warmup_steps)
    if training.schedule == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if training.schedule == "cosine" else 1.0


def _built(
    setting: Setting, training: Training, model: nn.Module, task: Task
) -> tuple[nn.Module, torch.optim.Optimizer]:
    clips = training.max_grad_norm is not None
    return build(setting.optimizer, model, setting.options, task.head_modules, clips=clips)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    max_grad_norm: float | None,
    products: Callable[[], contextlib.AbstractContextManager],
) -> Tensor:
    with products():
        loss = model(**batch).loss
        loss.backward()
    if max_grad_norm is not None:
        clip_gradients(model, optimizer, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach().float()


@contextlib.contextmanager
def _products(matmul: str, device: torch.device) -> Iterator[None]:
    """Within: fp32 products are as ``Training.matmul`` has them."""
    if matmul == "fp32" or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # sets PyTorch's old switch and its new one, and either may be read
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def kept_key(folder: Path) -> str | None:
    """The key of the run whose model is in a folder, None where there is none."""
    file = folder / _RUN_FILE
    return json.loads(file.read_text())["key"] if file.is_file() else None


def _save(model: nn.Module, task: Task, run: Run, folder: Path) -> None:
    """All of it or nothing: a folder that is there is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as unfinished:
        new = Path(unfinished) / "model"
        task.save(model, new)
        (new / _RUN_FILE).write_text(json.dumps({"run": str(run), "key": run.key}) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)


def _finite(values: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, values.values()))


def _first_not_finite(losses: Sequence[float], evaluations: Sequence[Mapping[str, float]]) -> int | None:
    steps = [step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss)]
    return min(steps + [entry["step"] for entry in evaluations if not _finite(entry)], default=None)


def _throughput(evaluations: Sequence[Mapping[str, float]]) -> float:
    """Units per second since the first evaluation after the start, or since the start where there are only two."""
    first, last = evaluations[1 if len(evaluations) > 2 else 0], evaluations[-1]
    return (last["units"] - first["units"]) / (last["seconds"] - first["seconds"])


class _Meter:
    """Within: seconds and the allocator's peak count. Outside, in evaluations and between batches, they do not."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.seconds = 0.0
        self.peak = 0 if self._cuda else None

    def __enter__(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.seconds += time.perf_counter() - self._start
