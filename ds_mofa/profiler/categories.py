"""What memory is counted as, and how a number of bytes is written.

Everything in this package counts bytes. GB is 1e9 bytes, GiB is 2^30; a text always says which.
"""

__all__ = ["CATEGORIES", "IN_ALLOCATOR", "MEANING", "axis_unit", "gb"]

MEANING = {
    "weights": "parameters and buffers of the model; a rank's shard of them in ZeRO stage 3",
    "master weights": "the second copy of the weights that a 16-bit optimizer steps",
    "gradients": "full gradients, wherever they are kept between backward and step",
    "AdamW states": "both moments of every parameter that AdamW trains",
    "other optimizer states": "the state of an optimizer that is neither AdamW nor of ds_mofa",
    "factors": "the state of the matrices in fp32 (MoFaSGD's U, sigma, V), their working copies, and random signs",
    "sketches": "Y and Z of the matrices, before and after the reduction",
    "activations": "what forward has allocated and backward still needs, the logits among it",
    "workspace": "temporaries: of backward, of the optimizer step, of libraries",
    "communication buffers": "reduce buckets and gathered weights of ZeRO, and what NCCL takes from the driver",
    "allocator slack": "reserved by PyTorch's allocator and not in use at the peak",
    "CUDA context": "taken from the driver when this process opened the device",
    "before this process": "in use on the device before this process opened it: the driver's own, other processes",
    "process base": "host memory of the process before the model: the interpreter and its libraries",
    "unexplained": "what the meter saw beyond all of the above; negative where the above is counted too high",
}
CATEGORIES = tuple(MEANING)

# What a known tensor or a temporary can be: the allocator's part of the sum.
IN_ALLOCATOR = CATEGORIES[: CATEGORIES.index("allocator slack")]


def gb(size: float | None, digits: int = 2) -> str:
    """``size`` bytes in GB (1e9 bytes), without the unit; a dash for what was not measured."""
    return "-" if size is None else f"{size / 1e9:.{digits}f}"


def axis_unit(top: float) -> tuple[float, str]:
    """(bytes, name) of the unit for an axis that goes up to ``top`` bytes."""
    return (1e9, "GB") if top >= 1e9 else (1e6, "MB")
