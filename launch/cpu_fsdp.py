"""FSDP2 on CPU ranks, which Accelerate does not offer.

PyTorch's ``fully_shard`` runs on a CPU as it does on a GPU. Accelerate takes an FSDP config there without a word and
trains under DDP: its state turns to FSDP from a kind of run of several accelerators, and CPU ranks are no such kind.
So it is told that they are one, after it has chosen device and communication and before it looks for FSDP. All that
follows is its own code. This is for trying a set-up on a machine without a GPU, and for tests.
"""

from accelerate.state import DistributedType, PartialState

__all__ = ["offer_fsdp_on_cpu"]


def offer_fsdp_on_cpu() -> None:
    """Have the next ``Accelerator`` find FSDP possible on the CPU ranks that there are. Nothing where there are GPUs."""
    state = PartialState()
    if state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU
