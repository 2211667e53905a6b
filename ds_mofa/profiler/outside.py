"""What lies outside of the allocator, which no shape tells: as measured. Bytes."""

from collections.abc import Mapping
from typing import Any

__all__ = ["CUBLAS", "CUDA_CONTEXT", "NCCL", "on_host"]

# Measured on H200s with torch 2.11 and CUDA 13: NVML's figure less what the allocator had reserved was 1.41 to 1.55 GB
# in plain loops (2.0 to 2.1 under ZeRO), and 2.5 to 2.9 GB on each of two GPUs.
CUDA_CONTEXT = 1_500_000_000  # the driver's own reserve on the device included
NCCL = 1_100_000_000  # of a rank

# In the allocator, from the first product on: what PyTorch gives cuBLAS to work in on Hopper, 32 MiB for each thread
# that multiplies, forward's and autograd's.
CUBLAS = 2 * (32 << 20)


def on_host(predicted: Mapping[str, Any]) -> dict[str, Any]:
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
