"""The memory of a training run before there is a GPU: the categories of a measured report, each derived.

Weights, gradients, states, factors, sketches and ZeRO's buffers are arithmetic on the parameters' shapes; activations
and backward's temporaries come from :mod:`ds_mofa.profiler.simulate`. The peak is the largest of all moments that may
be one: the loss, each completed gradient, each bucket's reduction, the optimizer step.

What lies outside the allocator is not derived: the CUDA context and NCCL are as measured on H200s.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from ds_mofa.adamw_8bit import moment_bytes
from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.gathering import gathered
from ds_mofa.profiler.offload import host_bytes, offloaded_candidates
from ds_mofa.profiler.reserve import reserved_by_plain_loop
from ds_mofa.profiler.reserve_zero import reserved_by_stage3, reserved_by_stage12
from ds_mofa.profiler.setting import OPTIMIZERS, Setting
from ds_mofa.profiler.simulate import MicroBatch, Parameter, PredictionError, simulate
from ds_mofa.profiler.step_workspace import layout_of, sign_bytes, state_layout_of, step_workspace
from ds_mofa.profiler.zero import (
    Candidate,
    ZeroSettings,
    norm_bytes,
    stage3_step,
    stage12_candidates,
)

__all__ = ["OPTIMIZERS", "PredictionError", "Setting", "on_host", "predict"]

# Measured on H200s with torch 2.11 and CUDA 13: NVML's figure less what the allocator had reserved was 1.41 to 1.55 GB
# in plain loops (2.0 to 2.1 under ZeRO), and 2.5 to 2.9 GB on each of two GPUs. Bytes.
CUDA_CONTEXT = 1_500_000_000  # the driver's own reserve on the device included
NCCL = 1_100_000_000  # of a rank

# In the allocator, from the first product on: what PyTorch gives cuBLAS to work in on Hopper, 32 MiB for each thread
# that multiplies, forward's and autograd's.
CUBLAS = 2 * (32 << 20)

_LARGE = 1 << 26  # elements; ds_mofa.deepspeed.build gives such parameters groups of their own


def predict(setting: Setting, process: int | None = None) -> dict[str, Any]:
    """The peak of one rank, in bytes.

    Args:
        process: which; by default the fullest. In stages 1 and 2 they differ, see :mod:`ds_mofa.profiler.zero`.

    Returns:
        ``allocated``, by PyTorch's allocator; ``total``, as NVML would see it; ``categories``, which add up to
        ``total``; ``host``, what is offloaded to the host; ``when`` the peak is; ``setting``.

    Raises:
        PredictionError: a setting that cannot be predicted.
    """
    batch = _simulated(
        _content(setting.model_config),
        setting.optimizer if setting.optimizer in ("MoFaSGD", "LoRA") else "AdamW",
        setting.seq,
        setting.micro_batch,
        setting.rank,
        setting.explore,
        setting.checkpointing,
        setting.liger,
        setting.fused_head,
        setting.head,
        setting.embed,
    )
    always = _always(setting, batch)
    peak, process = _highest(setting, batch, process)
    categories = {**always, "workspace": CUBLAS}
    for name, size in peak.extra.items():
        categories[name] = categories.get(name, 0) + size
    allocated = sum(categories.values())
    categories["allocator slack"] = _slack(setting, batch, always, allocated - CUBLAS, process)
    categories["CUDA context"] = CUDA_CONTEXT
    if setting.gpus > 1:
        categories["communication buffers"] = categories.get("communication buffers", 0) + NCCL
    categories = {name: round(categories[name]) for name in CATEGORIES if categories.get(name)}
    return {
        "allocated": round(allocated),
        "total": sum(categories.values()),
        "categories": categories,
        "host": _host(setting, batch, process),
        "when": peak.when,
        "setting": dataclasses.asdict(setting),
    }


def on_host(predicted: dict[str, Any]) -> dict[str, Any]:
    """A prediction without what only a device has: its context, NCCL, cuBLAS's workspace, the allocator's slack."""
    categories = dict(predicted["categories"])
    categories["workspace"] -= CUBLAS
    for name in ("CUDA context", "allocator slack"):
        categories.pop(name, None)
    if predicted["setting"]["gpus"] > 1:
        categories["communication buffers"] -= NCCL
    categories = {name: size for name, size in categories.items() if size}
    allocated = predicted["allocated"] - CUBLAS
    return {**predicted, "allocated": allocated, "categories": categories, "total": sum(categories.values())}


def _content(path: str) -> str:
    try:
        return json.dumps(json.loads(Path(path).read_text(encoding="utf-8")), sort_keys=True)
    except (OSError, json.JSONDecodeError) as error:
        raise PredictionError(f"{path}: no model shape could be read ({error}). Give one of configs/models") from error


@functools.lru_cache(maxsize=16)
def _simulated(
    content: str,
    optimizer: str,
    seq: int,
    micro_batch: int,
    rank: int,
    explore: int,
    checkpointing: bool,
    liger: bool,
    fused_head: bool,
    head: str,
    embed: str,
) -> MicroBatch:
    return simulate(
        json.loads(content),
        optimizer,
        tokens=seq,
        micro_batch=micro_batch,
        rank=rank,
        explore=explore,
        checkpointing=checkpointing,
        liger=liger,
        fused_head=fused_head,
        head=head,
        embed=embed,
    )


def _trained(setting: Setting, batch: MicroBatch) -> list[Parameter]:
    """What AdamW (or the full-rank optimizer in its place) trains: everything with a gradient of its own."""
    kinds = {"MoFaSGD": ("other",), "LoRA": ("adapter",)}.get(setting.optimizer, ("matrix", "other"))
    return [p for p in batch.parameters if p.kind in kinds]


def _groups(setting: Setting, batch: MicroBatch) -> list[list[Parameter]]:
    """DeepSpeed's param groups of AdamW's part."""
    return _groups_of(setting, _trained(setting, batch))


def _groups_of(setting: Setting, trained: list[Parameter]) -> list[list[Parameter]]:
    if setting.optimizer != "MoFaSGD":
        return [trained]
    small = [p for p in trained if p.numel < _LARGE]
    return [group for group in [small, *([p] for p in trained if p.numel >= _LARGE)] if group]


def _numbers(parameters: list[Parameter]) -> int:
    return sum(p.numel for p in parameters)


def _always(setting: Setting, batch: MicroBatch) -> dict[str, int]:
    """Bytes that are there in every moment of a step: all but gradients, activations and temporaries."""
    trained = _trained(setting, batch)
    N = setting.gpus
    weights = 2 * _numbers(batch.parameters)
    sharded = _numbers(trained) // (N if setting.zero else 1)
    parts: dict[str, int] = {"weights": weights // N if setting.zero == 3 else weights}
    if setting.offload == "param":  # but for what stage 3 keeps gathered
        least = _zero(setting).stage3_param_persistence_threshold
        parts["weights"] = 2 * _numbers([p for p in batch.parameters if p.numel <= least])
    state = 2 if setting.zero is None or setting.states == "bf16" else 4
    if (
        setting.zero is not None
        and not setting.offload
        and not (state == 2 and setting.optimizer == "MoFaSGD" and setting.zero < 3)
    ):
        # ds_mofa lets a bf16 partition be its own master in stages 1 and 2.
        parts["master weights"] = state * sharded
    if not setting.offload:
        parts |= _moments(setting, trained, sharded, state)
    if setting.optimizer == "MoFaSGD":
        layout = layout_of(setting, batch)
        parts["sketches"] = 4 * layout.numel
        state = 0 if setting.offload else 4 * state_layout_of(setting, batch).segment
        parts["factors"] = 2 * layout.numel + state + sign_bytes(setting, batch)
    return parts


def _host(setting: Setting, batch: MicroBatch, process: int) -> int:
    """Bytes that offload puts into host memory; 0 without."""
    if not setting.offload:
        return 0
    segment = state_layout_of(setting, batch).segment if setting.optimizer == "MoFaSGD" else 0
    weights = _numbers(batch.parameters)
    return host_bytes(_zero(setting), _groups(setting, batch), weights, segment, process, setting.offload == "param")


def _moments(setting: Setting, trained: list[Parameter], sharded: int, state: int) -> dict[str, int]:
    """The moments of whatever optimizer it is."""
    if setting.adamw_states == "8bit":
        return {"AdamW states": 2 * sum(map(moment_bytes, _stepped(setting, trained)))}
    if setting.optimizer not in ("Muon", "GaLore"):
        return {"AdamW states": 2 * state * sharded}
    matrices = [p for p in trained if p.kind == "matrix"]
    N = setting.gpus if setting.zero else 1
    adamw = 2 * state * (_numbers(trained) - _numbers(matrices)) // N
    if setting.optimizer == "Muon":  # one momentum
        return {"AdamW states": adamw, "other optimizer states": state * _numbers(matrices) // N}
    # GaLore: two moments of the projected gradient (r x the longer side) and the projector (r x the shorter).
    r = setting.rank
    projected = sum(2 * min(r, *p.shape) * max(p.shape) + min(r, *p.shape) * min(p.shape) for p in matrices)
    return {"AdamW states": adamw, "other optimizer states": state * projected}


def _stepped(setting: Setting, trained: list[Parameter]) -> list[int]:
    """Elements of each tensor that AdamW steps: a parameter, or a rank's partition of a group."""
    if not setting.zero:
        return [p.numel for p in trained]
    groups = _groups_of(setting, trained)
    return [-(-_numbers(group) // setting.gpus) for group in groups]


def _highest(setting: Setting, batch: MicroBatch, process: int | None) -> tuple[Candidate, int]:
    """The highest moment, and on which rank it is; all are looked at where ``process`` is None and they differ."""
    every = range(setting.gpus) if setting.zero in (1, 2) else (0,)
    highest = (
        (max(_candidates(setting, batch, rank), key=lambda one: sum(one.extra.values())), rank)
        for rank in (every if process is None else (process,))
    )
    return max(highest, key=lambda found: sum(found[0].extra.values()))


def _candidates(setting: Setting, batch: MicroBatch, process: int) -> list[Candidate]:
    groups = _groups(setting, batch)
    if setting.offload:
        found = offloaded_candidates(_zero(setting), groups, batch, setting.micro_batches, process)
    elif setting.zero in (1, 2):
        found = stage12_candidates(_zero(setting), groups, batch, setting.micro_batches, process)
    else:
        found = _other_candidates(setting, batch)
    step = step_workspace(setting, batch)
    return [
        dataclasses.replace(c, extra={**c.extra, "workspace": c.extra.get("workspace", 0) + step})
        if c.when == "step"
        else c
        for c in found
    ]


def _zero(setting: Setting) -> ZeroSettings:
    ours = setting.optimizer == "MoFaSGD" and setting.zero in (1, 2)
    once = setting.zero == 1 or (ours and setting.adamw_reduce == "step")
    return ZeroSettings(
        stage=setting.zero,
        world_size=setting.gpus,
        reduces_once=once and setting.micro_batches > 1,
        scatters=ours and once,
        norm_in_pieces=ours,
        host_in_pieces=ours,
        host_at_once=ours,
        state_bytes=4 if setting.states == "fp32" else 2,
        eight_bit=setting.adamw_states == "8bit",
        reduce_bucket_size=setting.bucket,
        contiguous_gradients=setting.contiguous,
        stage3_prefetch_bucket_size=setting.prefetch,
        leaf_module=setting.leaf,
        head_read_outside=setting.liger and not setting.fused_head,
    )


def _other_candidates(setting: Setting, batch: MicroBatch) -> list[Candidate]:
    """A plain loop, stage 0 (fp32 gradients at the step) and stage 3 (a flat buffer of gradient shards, one bucket)."""
    sizes = {p.name: 2 * p.numel for p in _trained(setting, batch)}
    whole = sum(sizes.values())
    fixed = {}
    if setting.zero == 3:
        zero = _zero(setting)
        fixed["communication buffers"] = 2 * zero.reduce_bucket_size + gathered(zero, batch.parameters).at_loss
    found, complete = [], 0
    for i, moment in enumerate(batch.peaks):
        if i:
            complete += sizes.get(batch.order[i - 1], 0)
        if setting.zero == 3:
            gradients = whole // setting.gpus
        else:
            gradients = whole if setting.micro_batches > 1 else complete
        found.append(
            Candidate(
                "backward" if moment.completed else "loss",
                {"activations": moment.activations, "workspace": moment.workspace, "gradients": gradients, **fixed},
            )
        )
    step = {"gradients": whole}
    if setting.zero == 0:
        step["gradients"] += 2 * whole  # DeepSpeed converts all of them to fp32 before it steps
    if setting.zero == 3:
        step["gradients"] = stage3_step(_zero(setting), whole // 2 // setting.gpus)
        largest = max((size // 2 for size in sizes.values()), default=0) // setting.gpus
        norm = {"gradients": whole // setting.gpus, "workspace": norm_bytes(largest)}
        found.append(Candidate("step, gradient norm", norm))
    return [*found, Candidate("step", step)]


def _slack(setting: Setting, batch: MicroBatch, always: dict[str, int], allocated: int, process: int) -> int:
    """Reserved and unused at the peak, where the allocator's rules can be replayed; 0 in stage 0 and with offload."""
    if setting.offload:
        return 0
    trained = _trained(setting, batch)
    buffers = [always[name] for name in ("sketches", "factors", "other optimizer states") if name in always]
    if setting.zero is None:
        held = [p for p in trained if setting.optimizer in ("AdamW", "MoFaSGD", "LoRA") or p.kind != "matrix"]
        moments = moment_bytes if setting.adamw_states == "8bit" else lambda numel: 2 * numel
        reserved = reserved_by_plain_loop(batch, held, buffers, moments, setting.micro_batches)
    elif setting.zero in (1, 2):
        reserved = reserved_by_stage12(
            _zero(setting),
            batch,
            _groups(setting, batch),
            buffers,
            setting.micro_batches,
            rank=process,
            own_masters="master weights" in always,
        )
    elif setting.zero == 3:
        zero = _zero(setting)
        reserved = reserved_by_stage3(zero, batch, _groups(setting, batch), buffers, setting.micro_batches)
        reserved += gathered(zero, batch.parameters).reserved
    else:
        return 0
    return max(0, reserved - allocated)
