"""Runs a program as it is where Accelerate takes CPU ranks for GPUs, whose FSDP it knows: else it would train under DDP.

accelerate launch --config_file fsdp2.yaml fsdp_on_cpu.py PROGRAM
"""

import runpy
import sys

import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState

_made = AcceleratorState.__init__


def _told(self, *args, **kwargs):
    if not AcceleratorState._shared_state:  # later ones read what the first has found
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _made(self, *args, **kwargs)


AcceleratorState.__init__ = _told
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("trained under", PartialState().distributed_type)
# Left open, gloo's threads may outlive the interpreter, which then aborts; NCCL has none.
dist.barrier()
dist.destroy_process_group()
