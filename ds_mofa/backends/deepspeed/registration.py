"""Make DeepSpeed know the registry's optimizers, from outside: its methods are wrapped, and nothing of it is replaced.

Every wrapper asks first whether the engine at hand trains with one of them, and otherwise calls what it wraps.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path

import deepspeed
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import engine as ds_engine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils as zero_utils

from ds_mofa.adamw.eight_bit import AdamW8bit
from ds_mofa.backends.deepspeed import checkpoints, eight_bits, older, surface, takeover, versions
from ds_mofa.backends.deepspeed.build import build_optimizer
from ds_mofa.backends.deepspeed.matrices import is_matrix, is_partitioned
from ds_mofa.backends.deepspeed.replicated import wrap_replicated
from ds_mofa.backends.deepspeed.universal import restore
from ds_mofa.backends.deepspeed.zero import wrap_zero
from ds_mofa.groups import check_units
from ds_mofa.optimizers import registry
from ds_mofa.optimizers.base import MatrixOptimizer
from ds_mofa.step import claims

__all__ = ["join"]


def join() -> None:
    """Add the names and wrap the engine's methods; to be called once.

    Raises:
        AttributeError: DeepSpeed has not a method that is wrapped; nothing is, then.
    """
    for row in surface.ROWS:
        if row.owner == surface.ENGINE and row.use == "wraps" and row.is_expected(deepspeed.__version__):
            _check(row)
    registry.on_register(_make_known)

    claims.on_claim(takeover.take_over)
    _wrap("_do_sanity_check", _do_sanity_check)
    _wrap("_configure_optimizer", _configure_optimizer)
    _wrap("_configure_basic_optimizer", _configure_basic_optimizer)
    _wrap("_configure_zero_optimizer", _configure_zero_optimizer)
    _wrap("_configure_bf16_optimizer", functools.partial(_configure_wrapper, wrap_zero))
    _wrap("_configure_fp16_optimizer", functools.partial(_configure_wrapper, wrap_replicated))
    _wrap("_configure_lr_scheduler", _configure_lr_scheduler)
    _wrap("_scheduler_from_config", _scheduler_from_config)
    _wrap("clip_fp32_gradients", _clip_fp32_gradients)
    _wrap("_backward_prologue", _backward_prologue)
    _wrap("_backward_epilogue", _backward_epilogue)
    _wrap("zero_grad", _zero_grad)
    _wrap("step", _step)
    _wrap("destroy", takeover.destroy)
    _wrap("coalesce_grad_reduction", _coalesce_grad_reduction)
    _wrap("save_checkpoint", _save_checkpoint)
    _wrap("_commit_decoupled_checkpoint", _commit_decoupled_checkpoint)
    _wrap("load_checkpoint", _load_checkpoint)
    _wrap("load_module_state_dict", _load_module_state_dict)
    _wrap("_load_zero_checkpoint", _load_zero_checkpoint)
    _wrap("_common_checkpoint_state", _common_checkpoint_state)
    _wrap("_configure_distributed_model", _configure_distributed_model)
    _wrap("_get_param_fragment_func", _get_param_fragment_func)

    # "Optimized" is what DeepSpeed's optimizer writes into checkpoints; the rest it saves as frozen. It
    # reads this name from the engine's module, so that is where it must change.
    if hasattr(ds_engine, "is_optimized_parameter"):
        optimized = ds_engine.is_optimized_parameter
        ds_engine.is_optimized_parameter = lambda param: optimized(param) and not is_matrix(param)
    else:
        _wrap("_get_zero_frozen_param_attributes", older.with_matrices)


def _make_known(entry: registry.Entry) -> None:
    ds_config.DEEPSPEED_OPTIMIZERS.append(entry.name.lower())  # DeepSpeed compares in lower case
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(entry.optimizer)


def optimizer_of(engine: DeepSpeedEngine) -> MatrixOptimizer | None:
    """The engine's optimizer if it is one of this package's, or None where it trains with another optimizer."""
    basic = getattr(engine, "basic_optimizer", None)
    return basic if isinstance(basic, MatrixOptimizer) else None


def _check(row: surface.Row) -> None:
    if not hasattr(DeepSpeedEngine, row.name):
        raise AttributeError(f"there is no {row.owner}.{row.name}, which ds_mofa wraps ({row.why})")


def _wrap(name: str, replacement: Callable) -> None:
    if not any(row.is_expected(deepspeed.__version__) for row in surface.rows_of(surface.ENGINE, name)):
        return
    original = getattr(DeepSpeedEngine, name)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        return replacement(functools.partial(original, self), self, *args, **kwargs)

    setattr(DeepSpeedEngine, name, method)


def _do_sanity_check(original, engine):
    if registry.find(engine.optimizer_name()) is not None:
        versions.warn_if_untested(deepspeed.__version__)
    takeover.check_client(engine, engine.client_optimizer)  # as early as can be: the model is as it was
    original()


def _configure_optimizer(original, engine, client_optimizer, model_parameters):
    trained = takeover.trained(model_parameters)
    try:
        # Else build_optimizer sees to it.
        if client_optimizer is not None or registry.find(engine.optimizer_name()) is None:
            takeover.check_waiting(trained)
            takeover.take_over(trained, f"an engine with {engine.optimizer_name()}", ours=False)
        original(takeover.checked_factory(client_optimizer), model_parameters)
    except Exception:
        takeover.unhook(engine)  # who mends the config goes on with the same model
        raise
    takeover.enter(engine, trained)


def _configure_basic_optimizer(original, engine, model_parameters):
    if registry.find(engine.optimizer_name()) is None:
        return original(model_parameters)
    return build_optimizer(engine, model_parameters)


def _configure_wrapper(wrap, original, engine, optimizer, *args, **kwargs):
    if not isinstance(optimizer, MatrixOptimizer):
        return original(optimizer, *args, **kwargs)
    wrapped = wrap(original(optimizer.adamw, *args, **kwargs), optimizer)
    if isinstance(optimizer.adamw, AdamW8bit) and dist.get_rank() == 0:  # what it steps is known from here on
        partitions = getattr(wrapped, "fp32_partitioned_groups_flat", None)  # stage 3, whose param groups are empty now
        print(f"ds_mofa: rank 0: {optimizer.adamw.summary(partitions)}", flush=True)
    return wrapped


def _configure_zero_optimizer(original, engine, optimizer, *args, **kwargs):
    managed = getattr(engine, "managed_gradient_accumulation", lambda: True)()
    wrap = functools.partial(wrap_zero, managed_accumulation=managed)
    return _configure_wrapper(wrap, original, engine, optimizer, *args, **kwargs)


def _configure_lr_scheduler(original, engine):
    mofa = optimizer_of(engine)
    try:
        original()
        if mofa is not None:  # DeepSpeed's keep on themselves how far they go, torch's in the param groups
            for peak in getattr(engine.lr_scheduler, "max_lrs", ()):
                check_units({"max_lr": peak}, mofa.options, "the scheduler's ")
            for number, group in enumerate(mofa.param_groups):
                check_units(group, mofa.options, f"param group {number}: ")
    except Exception:
        if mofa is not None:
            takeover.unhook(engine)
        raise


def _scheduler_from_config(original, engine, optimizer):
    # DeepSpeed's schedulers look through .optimizer and would find AdamW's groups alone.
    return original(optimizer_of(engine) or optimizer)


def _clip_fp32_gradients(original, engine):
    if optimizer_of(engine) is None:
        return original()
    return engine.optimizer.clip_grad_norm_(engine.gradient_clipping())


def _backward_prologue(original, engine):
    _drop_with_adamw(engine, before_backward=True)
    original()


def _backward_epilogue(original, engine):
    original()
    mofa = optimizer_of(engine)
    if mofa is not None:
        mofa.adamw_gradients.look()


def _drop_with_adamw(engine, before_backward: bool = False) -> None:
    mofa = optimizer_of(engine)
    if mofa is not None and mofa.adamw_gradients.dropped(before_backward):
        mofa.matrices.clear()


def _zero_grad(original, engine):
    original()
    if optimizer_of(engine) is not None and not engine.zero_optimization():
        optimizer_of(engine).matrices.clear()  # also where AdamW has nothing to train
    else:
        _drop_with_adamw(engine)


def _step(original, engine, *args, **kwargs):
    takeover.check_alive(engine)
    mofa, last = optimizer_of(engine), engine.is_gradient_accumulation_boundary()
    _drop_with_adamw(engine)
    result = original(*args, **kwargs)
    if mofa is not None:
        mofa.adamw_gradients.look()
        mofa.adamw_gradients.restarted &= not last  # nothing is left to overwrite
    return result


def _save_checkpoint(original, engine, save_dir, tag=None, *args, **kwargs):
    mofa = optimizer_of(engine)
    if mofa is None or not save_dir:
        return original(save_dir, tag, *args, **kwargs)
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    checkpoints.invalidate(engine, save_dir, tag)
    # Not every rank's state_dict() is called while DeepSpeed saves, so the collective part goes before.
    engine.optimizer.matrix_state = mofa.matrices.state_dict()
    try:
        result = original(save_dir, tag, *args, **kwargs)
    finally:
        engine.optimizer.matrix_state = None
    if not engine.checkpoint_engine.is_decoupled():
        checkpoints.write_manifest(engine, mofa, save_dir, tag)
    return result


def _commit_decoupled_checkpoint(original, engine):
    # A save that goes on in the background has ended by here.
    mofa, commit = optimizer_of(engine), engine.checkpoint_engine.get_commit_info()
    original()
    if mofa is not None and commit is not None:
        checkpoints.write_manifest(engine, mofa, commit.save_dir, commit.tag)


def _load_checkpoint(
    original,
    engine,
    load_dir,
    tag=None,
    load_module_strict=True,
    load_optimizer_states=True,
    load_lr_scheduler_states=True,
    load_module_only=False,
    custom_load_fn=None,
):
    mofa = optimizer_of(engine)
    with_state = load_optimizer_states and not load_module_only
    weights_from_shards = mofa is not None and engine.zero_optimization_partition_weights() and not with_state
    latest = Path(load_dir) / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
    if tag is None and latest.is_file():
        tag = latest.read_text().strip()
    if tag is not None:  # without one DeepSpeed loads nothing, and says so
        if mofa is not None:
            checkpoints.verify(engine, mofa, load_dir, str(tag), with_state=with_state)
            if with_state and not engine.load_universal_checkpoint():
                checkpoints.check_state(engine, mofa, load_dir, str(tag))
        elif with_state and engine.basic_optimizer is not None:
            checkpoints.refuse_ours(engine, load_dir, str(tag))
    with contextlib.ExitStack() as stack:
        if weights_from_shards:
            # DeepSpeed puts the weights together where optimizer states are not wanted, which of "module only" it does
            # not conclude; and those of the latest tag, whatever the tag.
            load_optimizer_states = False
            together = functools.partial(ds_engine.get_fp32_state_dict_from_zero_checkpoint, tag=tag)
            stack.enter_context(_replaced(ds_engine, "get_fp32_state_dict_from_zero_checkpoint", together))
        result = original(
            load_dir,
            tag,
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
    if mofa is not None and not with_state:
        mofa.matrices.masters.refresh()
    return result


@contextlib.contextmanager
def _replaced(module, name: str, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _load_module_state_dict(original, engine, checkpoint, *args, **kwargs):
    mofa, fragments = optimizer_of(engine), checkpoint.get(FROZEN_PARAM_FRAGMENTS)
    if mofa is None or fragments is None:
        return original(checkpoint, *args, **kwargs)
    if all(matrix.name in fragments for matrix in mofa.split.matrices):
        result = original(checkpoint, *args, **kwargs)
        if versions.is_older(versions.WHOLE):
            older.load_matrices(engine, fragments)
        return result
    # Another optimizer has trained what are matrices here: they are with its other weights, not with the frozen ones.
    result = original({**checkpoint, FROZEN_PARAM_FRAGMENTS: None}, *args, **kwargs)
    for param, name in engine.param_names.items():
        if name in fragments:
            (param.ds_tensor if is_partitioned(param) else param).data.copy_(fragments[name].data)
    return result


def _load_zero_checkpoint(original, engine, load_dir, tag, load_optimizer_states=True):
    result = original(load_dir, tag, load_optimizer_states=load_optimizer_states)
    if optimizer_of(engine) is not None and engine.load_universal_checkpoint():
        restore(engine, optimizer_of(engine), Path(load_dir) / str(tag), load_optimizer_states)
    return result


@contextlib.contextmanager
def _coalesce_grad_reduction(original, engine):
    with original():
        yield
    mofa = optimizer_of(engine)
    if mofa is not None:  # DeepSpeed has reduced them at the end: that .grad is None now is no drop
        mofa.adamw_gradients.look()


def _common_checkpoint_state(original, engine, module_state_dict, zero_optimizer_state, save_frozen_param):
    # Stage 1 saves no frozen parameters, and zero_to_fp32 would leave the matrices out.
    save_frozen_param = save_frozen_param or bool(zero_optimizer_state and optimizer_of(engine))
    return original(module_state_dict, zero_optimizer_state, save_frozen_param)


def _configure_distributed_model(original, engine, model):
    with eight_bits.set_aside(engine, model):
        original(model)


def _get_param_fragment_func(original, engine, param):
    return eight_bits.fragment(original(param))
