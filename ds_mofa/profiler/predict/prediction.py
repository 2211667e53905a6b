"""The memory of a training run before there is a GPU: the categories of a measured report, each derived.

Weights, gradients, states, factors, sketches and ZeRO's buffers are arithmetic on the parameters' shapes; activations
and backward's temporaries come from a micro-batch under fake tensors. The peak is the largest of all moments that may
be one.

What lies outside the allocator is not derived: :mod:`ds_mofa.profiler.outside` has it as measured.
"""

import functools
from pathlib import Path
from typing import Any

from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.outside import CUBLAS, CUDA_CONTEXT, NCCL
from ds_mofa.profiler.predict.always import always, matrix_masters, on_a_rank, weight_bytes
from ds_mofa.profiler.predict.moments import highest
from ds_mofa.profiler.predict.offload import host_bytes
from ds_mofa.profiler.predict.plan import Plan, numbers
from ds_mofa.profiler.predict.reserved.run import reserved
from ds_mofa.profiler.predict.simulated.errors import PredictionError
from ds_mofa.profiler.predict.simulated.micro_batch import MicroBatch, simulate
from ds_mofa.profiler.predict.simulated.optimizer import OF_ADAMW
from ds_mofa.profiler.predict.step_workspace import step_workspace
from ds_mofa.profiler.predict.zero import zero_settings
from ds_mofa.profiler.setting import RunSetting

__all__ = ["PredictionError", "plan_of", "predict"]


def predict(setting: RunSetting, process: int | None = None) -> dict[str, Any]:
    """The peak of one rank, in bytes.

    Args:
        process: which; by default the fullest. In stages 1 and 2 they differ, see
            :mod:`ds_mofa.profiler.predict.stage12`.

    Returns:
        ``allocated``, by PyTorch's allocator; ``total``, as NVML would see it; ``categories``, which add up to
        ``total``; ``host``, what is offloaded to the host; ``when`` the peak is; ``setting``. Where micro-batches are CUDA
        graphs, with what these have for activations and temporaries, which PyTorch does not call allocated; graphs of
        several shapes share most of it, and up to the smaller ones' comes to it.

    Raises:
        PredictionError: a setting that cannot be predicted.
    """
    plan = plan_of(setting)
    there = always(plan)
    peak, process = highest(plan, process)
    categories = {**there, "workspace": CUBLAS}
    for name, size in peak.extra.items():
        categories[name] = categories.get(name, 0) + size
    allocated = sum(categories.values())
    categories["allocator slack"] = max(0, reserved(plan, there, process) - (allocated - CUBLAS))
    if setting.graphed and plan.sketched:  # the graphs' memory serves no step, and theirs of the update reads a copy
        copy = 4 * plan.layout.segment
        categories["sketches"], allocated = categories["sketches"] + copy, allocated + copy
        categories["allocator slack"] += step_workspace(plan)
    categories["CUDA context"] = CUDA_CONTEXT
    if setting.gpus > 1:
        categories["communication buffers"] = categories.get("communication buffers", 0) + NCCL
    categories = {name: round(categories[name]) for name in CATEGORIES if categories.get(name)}
    return {
        "allocated": round(allocated),
        "total": sum(categories.values()),
        "categories": categories,
        "host": _host(plan, process),
        "when": peak.when,
        "setting": setting.as_dict(),
    }


def plan_of(setting: RunSetting) -> Plan:
    """The run with a micro-batch of it, which is simulated once for all runs that share it.

    Raises:
        PredictionError: a model that cannot be simulated.
    """
    if setting.compiled:
        raise PredictionError(
            f"{setting.run} cannot be predicted: which activations a compiled layer keeps is inductor's choice. Predict it "
            "without compiled, which takes more"
        )
    path = Path(setting.model_config)
    changed = path.stat().st_mtime_ns if path.exists() else None
    return Plan(setting, _simulated(str(_one_micro_batch(setting)), changed), zero_settings(setting))


def _one_micro_batch(setting: RunSetting) -> RunSetting:
    """A setting that differs from another one only if forward or backward does."""
    name = setting.optimizer if setting.has_rank else "AdamW"
    alike = RunSetting.of(setting.model_config, name, rank=setting.rank if setting.has_rank else 8)
    kept = ["seq", "micro_batch", "checkpointing", "liger", "loss", "head", "embed"]
    if setting.liger:  # whose loss waits for the device, which no graph can
        kept.append("graphed")
    if setting.sharded:
        kept += ["backend", "gpus", "weights", "reshard", "gathered", "replicas"]
    elif setting.weights == "int8":
        kept.append("weights")
    options = {name: value for name, value in setting.options if name not in OF_ADAMW}
    return alike.but(**{field: getattr(setting, field) for field in kept}, **options)


@functools.lru_cache(maxsize=64)  # searches go back and forth between some
def _simulated(run: str, changed: int | None) -> MicroBatch:
    """Args: changed: when the model's file was, so that it is read anew."""
    return simulate(RunSetting.parse(run))


def _host(plan: Plan, process: int) -> int:
    """Bytes that offload puts into host memory; 0 without."""
    setting = plan.setting
    if not setting.offload:
        return 0
    if setting.sharded:  # weights, and of what AdamW trains gradients and both moments
        held = on_a_rank(plan, plan.batch.parameters) + 3 * on_a_rank(plan, plan.trained)
        return weight_bytes(setting) * held + matrix_masters(plan)
    segment = plan.state_layout.segment if plan.sketched else 0
    weights = numbers(plan.batch.parameters)
    own = host_bytes(plan.zero, plan.groups, weights, segment, process, setting.offload == "param")
    return own + matrix_masters(plan)
