"""Compile what DeepSpeed compiles on a CPU when it is first used: minutes on a new machine, seconds afterwards."""

from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, FusedAdamBuilder, ShareMemCommBuilder

for builder in (ShareMemCommBuilder, FusedAdamBuilder, CPUAdamBuilder):
    builder().load(verbose=False)
