"""From an engine and its config to an optimizer of this package, or to an error that says what to change."""

import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.module import PipelineModule

from ds_mofa.adamw.eight_bit import AdamW8bit
from ds_mofa.backends.deepspeed import older, takeover, versions
from ds_mofa.backends.deepspeed.backend import EngineBackend
from ds_mofa.backends.deepspeed.dropped import AdamWGradients
from ds_mofa.backends.deepspeed.matrices import forget, mark_matrices
from ds_mofa.backends.deepspeed.replicated import replicated
from ds_mofa.capture.head import FusedHead
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.optimizers.eight_bits import keep_in_eight_bits
from ds_mofa.optimizers.registry import entry_of
from ds_mofa.options import OptimizerOptions, OptionError
from ds_mofa.parameters import full_shape, split_parameters
from ds_mofa.rules.diagnostics import Report
from ds_mofa.step.step import MatrixStep

__all__ = ["LARGE", "build_optimizer", "read_options"]

# DeepSpeed's own switches of its AdamW: they are for get_optimizer_configuration.
_PASSED_ON = ("torch_adam", "fp32_optimizer_states", "foreach", "fused")
_SECTION = ("type", "params", "legacy_fusion")  # what DeepSpeed reads of "optimizer"

LARGE = 1 << 26  # elements


def build_optimizer(engine, model_parameters) -> MatrixOptimizer:
    """What ``DeepSpeedEngine._configure_basic_optimizer`` returns for a ``"type"`` of the registry's.

    Raises:
        OptionError: an option, or a combination with the rest of the config, that cannot work.
    """
    entry = entry_of(engine.optimizer_name())
    _refuse_unsupported(engine, entry.name)
    options, passed_on = read_options(engine._config._param_dict["optimizer"])
    split = split_parameters(engine.module, model_parameters, options, names=engine.param_names)
    trained = takeover.trained(model_parameters)
    takeover.check_waiting(trained, options)
    takeover.take_over(trained, f"an engine with {entry.name}")
    if options.weights == "int8":
        if versions.is_older(versions.WHOLE):
            raise OptionError(
                f"weights='int8' needs DeepSpeed {versions.WHOLE}: pip install 'deepspeed>={versions.WHOLE}'"
            )
        if engine.zero_optimization_partition_weights():  # which it will do after this
            raise OptionError(
                "weights='int8' needs whole weights, and ZeRO stage 3 cuts them: leave it out, or use ZeRO stage 0, 1 or 2"
            )
        eight_bits = keep_in_eight_bits(engine.module, split.matrices)
        if dist.get_rank() == 0:
            print(f"ds_mofa: {eight_bits}", flush=True)
    head = FusedHead(engine.module) if options.fused_head else None

    replicated_fp32 = not engine.zero_optimization() and not (engine.fp16_enabled() or engine.bfloat16_enabled())
    adamw = None
    if split.adamw_groups:
        groups = _large_ones_apart(split.adamw_groups)
        eight_bit = options.adamw_states == "8bit"
        adamw = (
            _adamw_8bit(engine, groups, options, passed_on) if eight_bit else _adamw(engine, groups, options, passed_on)
        )
    elif not replicated_fp32:
        raise OptionError(
            "every trained parameter is a matrix, and DeepSpeed's ZeRO and 16-bit optimizers need at least one for "
            'AdamW: leave one to it with "exclude", or train its norms or biases too'
        )

    matrices = MatrixStep(
        split.matrices,
        options,
        entry.rule(options),
        EngineBackend(engine),
        head=head,
    )
    matrices.on_report = functools.partial(_write_to_monitor, engine, options.title)
    mark_matrices(split.matrices)
    matrices.on_detach(functools.partial(forget, split.matrices))
    if dist.get_rank() == 0:
        print(f"ds_mofa: {split.summary()}", flush=True)  # loggers are often set to warnings only
        if replicated_fp32 and isinstance(adamw, AdamW8bit):  # else it is known when DeepSpeed has cut partitions
            print(f"ds_mofa: {adamw.summary()}", flush=True)
    facade = replicated(entry.optimizer) if replicated_fp32 else entry.optimizer
    optimizer = facade.from_parts(split, options, adamw, matrices)
    optimizer.adamw_gradients = AdamWGradients(takeover.trained(split.adamw_groups))
    return optimizer


def read_options(section: Mapping[str, Any]) -> tuple[OptimizerOptions, dict[str, Any]]:
    """The options in the JSON's ``"optimizer"``, and DeepSpeed's own switches among its ``"params"``.

    Args:
        section: whose ``"type"`` is MoFaSGD where there is none, else one of the registry's.

    Raises:
        OptionError: a key or value that is not understood; DeepSpeed would leave an unknown key unread.
    """
    entry = entry_of(section.get("type", "MoFaSGD"))
    for key in section:
        if key not in _SECTION:
            close = difflib.get_close_matches(key, _SECTION, n=1)
            raise OptionError(
                f'"optimizer" has an unknown key {key!r}'
                + (f"; did you mean {close[0]!r}?" if close else "")
                + f' It takes "type" and "params"; options of {entry.name} belong into "params"'
            )
    params = section.get("params")
    if isinstance(params, Mapping) and "max_grad_norm" in params:
        raise OptionError(
            f'max_grad_norm is not an option of {entry.name}: write "gradient_clipping" beside "optimizer"'
        )
    options, passed_on = entry.options.from_config({} if params is None else params, _PASSED_ON)
    for key, value in passed_on.items():
        if not isinstance(value, bool):
            raise OptionError(f"{key}={value!r} must be true or false: it chooses between DeepSpeed's AdamWs")
    return options, passed_on


def _adamw(
    engine, groups: list[dict[str, Any]], options: OptimizerOptions, passed_on: dict[str, Any]
) -> torch.optim.Optimizer:
    """Which of DeepSpeed's and torch's AdamWs the config asks for."""
    betas, eps = tuple(options.adamw_betas), options.adamw_eps
    if not hasattr(engine, "get_optimizer_configuration"):
        return older.adamw(engine, groups, {"lr": options.lr, "betas": betas, "eps": eps, **passed_on})
    adamw_class, settings = engine.get_optimizer_configuration(passed_on, True)
    settings = {key: value for key, value in settings.items() if value is not None}
    return adamw_class(groups, lr=options.lr, betas=betas, eps=eps, **passed_on, **settings)


def _adamw_8bit(
    engine, groups: list[dict[str, Any]], options: OptimizerOptions, passed_on: dict[str, Any]
) -> AdamW8bit:
    if passed_on:
        raise OptionError(
            f"{', '.join(passed_on)} chooses between DeepSpeed's AdamWs, and adamw_states='8bit' is none of them: remove "
            "one or the other"
        )
    for problem, found in _UNSUPPORTED_8BIT.items():
        if found(engine):
            raise OptionError(f"adamw_states='8bit' does not work with {problem}, or set adamw_states='full'")
    return AdamW8bit(groups, options)


def _large_ones_apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups, with every parameter of ``LARGE`` elements or more in one of its own.

    ZeRO flattens one group's gradients at a time. With embedding and output head in one, that is a second copy of
    both at once: 4 GB more reserved at a vocabulary of 128 k and a width of 4096.
    """
    apart = []
    for group in groups:
        large = [param for param in group["params"] if math.prod(full_shape(param)) >= LARGE]
        small = [param for param in group["params"] if not any(param is other for other in large)]
        apart += [{**group, "params": params} for params in ([small] if small else []) + [[param] for param in large]]
    return apart


def _write_to_monitor(engine, title: str, report: Report) -> None:
    """The report in DeepSpeed's TensorBoard, wandb, Comet or CSV, by samples as its own events are."""
    if not engine.monitor.enabled or dist.get_rank() != 0:
        return
    samples = engine.global_samples + engine.train_batch_size()  # the step that is under way included
    events = [(f"{title}/{name}", value, samples) for name, value in report.summary().items()]
    for matrix, values in report.by_matrix().items():
        events += [(f"{title}/{name}/{matrix}", value, samples) for name, value in values.items()]
    engine.monitor.write_events(events)


def _refuse_unsupported(engine, title: str) -> None:
    refused = {**older.REFUSED, **_UNSUPPORTED} if versions.is_older(versions.WHOLE) else _UNSUPPORTED
    for problem, found in refused.items():
        if found(engine):
            raise OptionError(f"{title} does not work with {problem}")


def _offloads_to(device: str, config: Any) -> bool:
    return config is not None and str(getattr(config.device, "value", config.device)) == device


def _model_parallel_size(mpu: Any) -> int:
    """The largest of the names that Megatron's versions have for it. DeepSpeed's own mpu calls its sequence parallelism
    model parallelism too, and DeepSpeed itself knows it by the name of a function.
    """
    if hasattr(mpu, "initialize_sequence_parallel"):
        return 1
    names = ("model_parallel", "tensor_model_parallel", "pipeline_model_parallel", "pipe_parallel", "slice_parallel")
    asked = (getattr(mpu, f"get_{name}_world_size", None) for name in names)
    return max((int(ask()) for ask in asked if callable(ask)), default=1)


_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "pipeline modules: use ZeRO, which shares the memory out as well": lambda engine: isinstance(
        engine.module, PipelineModule
    ),
    'offload_param to NVMe: use "device": "cpu"': lambda engine: _offloads_to(
        "nvme", engine._config.zero_config.offload_param
    ),
    'offload_optimizer to NVMe: use "device": "cpu", the optimizer state is small': lambda engine: _offloads_to(
        "nvme", engine._config.zero_config.offload_optimizer
    ),
    'offload_optimizer at ZeRO stage 0, which shares no optimizer state out: set "stage": 1, on one rank it is the same '
    "training, or remove offload_optimizer": lambda engine: (
        engine.zero_cpu_offload() and not engine.zero_optimization()
    ),
    'offload_param at ZeRO stages 0 to 2, where DeepSpeed leaves the weights on the GPU: set "stage": 3, or remove '
    "offload_param": lambda engine: (
        _offloads_to("cpu", engine._config.zero_config.offload_param)
        and not engine.zero_optimization_partition_weights()
    ),
    'parameters that ZeRO stage 3 has partitioned, zero.Init or an earlier engine: set "stage": 3, or load the model '
    "anew": lambda engine: (
        not engine.zero_optimization_partition_weights()
        and any(hasattr(param, "ds_id") for param in engine.module.parameters())
    ),
    'a "ratio" below 1 in offload_optimizer, where DeepSpeed steps one part of AdamW on the GPU with a learning rate '
    'that nothing sets: remove "ratio"': lambda engine: engine.zero_cpu_offload() and engine.zero_partial_offload() < 1,
    "fp16 at ZeRO stage 0, where DeepSpeed divides the gradients by a loss scale that it never multiplied the loss "
    'by: use "zero_optimization": {"stage": 1}, or bf16': lambda engine: (
        engine.fp16_enabled() and not engine.zero_optimization()
    ),
    "DeepSpeed's MoE layers, whose experts have process groups of their own: use AdamW": lambda engine: (
        engine.has_moe_layers
    ),
    "model parallelism (an mpu whose model-parallel group has several ranks): each rank would take its piece of a "
    "weight for a matrix of its own, and norms, skipped steps and factors would differ from rank to rank. Use ZeRO "
    "without it, or AdamW": lambda engine: _model_parallel_size(engine.mpu) > 1,
    'sequence parallelism in ZeRO stage 3 with "reduce_scatter": false, where DeepSpeed divides small gradients by '
    'other numbers than large ones: remove "reduce_scatter"': lambda engine: (
        engine.sequence_parallel_size > 1
        and engine.zero_optimization_partition_weights()
        and not engine.zero_reduce_scatter()
    ),
    "AutoTP, which makes each matrix several smaller ones: remove tensor_parallel and use ZeRO": lambda engine: (
        engine.autotp_size() > 1
    ),
    "ZenFlow: remove zenflow, there are no full gradients to select from": lambda engine: bool(engine.zenflow),
    "SuperOffload: use plain offload_optimizer": lambda engine: bool(engine.super_offload()),
    'DeepCompile, which takes over the gradient reduction: set "deepcompile": false': lambda engine: (
        engine.is_deepcompile_enabled()
    ),
    "universal checkpoints at ZeRO stage 0, where DeepSpeed loads none: use stage 1, on one rank it is the same "
    'training, or remove "load_universal"': lambda engine: (
        engine.load_universal_checkpoint() and not engine.zero_optimization()
    ),
}

_UNSUPPORTED_8BIT: dict[str, Callable[[Any], bool]] = {
    "offload_optimizer, where DeepSpeed's own AdamW steps on the host in fp32: remove offload_optimizer": lambda engine: (
        engine.zero_cpu_offload()
    ),
    'universal checkpoints, which hold fp32 moments: remove "load_universal" and resume from a checkpoint of the same '
    "stage on as many ranks": lambda engine: engine.load_universal_checkpoint(),
    '"elastic_checkpoint", for which DeepSpeed cuts moments up by the elements of the weights: remove it': lambda engine: (
        bool(engine.zero_elastic_checkpoint())
    ),
}
