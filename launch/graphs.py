"""``--cuda_graphs``: a CUDA graph of each shape of a batch, so that the GPU does not wait for Python."""

from typing import Any

from torch import nn

from launch.engines import Engine
from launch.errors import UserError

__all__ = ["check_model", "settle_graphs"]

_MULTIPLE = 128  # tokens; each shape takes three eager batches and a graph


def settle_graphs(args: Any, *, profiled: bool) -> None:
    """Few shapes, and nothing that a graph would not repeat.

    Args:
        args: the command's TrainingArguments; what graphs need is set there.
        profiled: whether the memory is.

    Raises:
        UserError: what the command asks for besides cannot be captured.
    """
    apart = args.padding_free or (args.packing and args.packing_strategy != "wrapped")  # examples kept apart in a row
    wanted = {
        "the whole model on each GPU: leave --deepspeed and --fsdp out": args.engine in (Engine.ONE, Engine.DDP),
        "rows of one length: leave --padding_free out, and --packing, or give --packing_strategy wrapped": not apart,
        "the model's own loss: leave --loss_type and --label_smoothing_factor out": args.loss_type == "nll"
        and not args.label_smoothing_factor,
        "no --profile_memory, whose hooks do not run in a graph": not profiled,
    }
    missing = [need for need, met in wanted.items() if not met]
    if missing:
        raise UserError(f"--cuda_graphs needs {'; and '.join(missing)}.")
    if args.pad_to_multiple_of is None:
        args.pad_to_multiple_of = _MULTIPLE
    if args.gradient_checkpointing:
        # The state of a random generator cannot be saved in a graph; check_model refuses what would need it.
        given = args.gradient_checkpointing_kwargs or {}
        args.gradient_checkpointing_kwargs = {**given, "use_reentrant": False, "preserve_rng_state": False}


def check_model(args: Any, model: nn.Module) -> None:
    """
    Raises:
        UserError: recomputed layers would draw other random numbers than forward did.
    """
    if not (args.cuda_graphs and args.gradient_checkpointing):
        return
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    config: dict[str, Any] = model.config.to_dict() if hasattr(model, "config") else {}
    named = [name for name, value in config.items() if "dropout" in name and isinstance(value, float) and value > 0]
    if modules or named:
        raise UserError(
            f"--cuda_graphs with --gradient_checkpointing: recomputed layers would drop out others than forward did "
            f"({', '.join(named) or 'nn.Dropout'}). Set dropout to 0 in the model's config, or leave one of the two out."
        )
