"""DeepSpeed's ways to keep tensors elsewhere: AdamW's state or the weights on the host, weights twice (hpZ)."""

import pytest
from comparing import STEPS, assert_same, dense, distances
from launching import on_ranks
from test_resume import equal, saved_and_resumed
from training import config, train

CPU = {"device": "cpu", "pin_memory": False}


def optimizer(stage: int) -> dict:
    settings = config(stage, zero_optimization={"offload_optimizer": CPU}, zero_force_ds_cpu_optimizer=False)
    return train(settings, STEPS)


def parameters(capture: str) -> dict:
    zero = {"offload_param": CPU, "offload_optimizer": CPU}
    options = {"capture": capture}
    return train(config(3, options=options, zero_optimization=zero, zero_force_ds_cpu_optimizer=False), STEPS)


def persistent() -> dict:
    """Stage 3 with every weight below the size from which DeepSpeed releases them: gathered all the time."""
    return train(config(3, zero_optimization={"stage3_param_persistence_threshold": 100_000}), STEPS)


HPZ = {"zero_hpz_partition_size": 2}


def hpz(dtype: str) -> dict:
    return train(config(3, dtype=dtype, zero_optimization=HPZ), STEPS)


@on_ranks(optimizer, stage=[1, 2, 3])
def test_offloaded_optimizer_state(ran):
    assert_same(ran, dense())


@on_ranks(parameters, capture=["linear", "hook"])
def test_offloaded_parameters(ran):
    assert_same(ran, dense())


@on_ranks(persistent)
def test_persistent_parameters(ran):
    assert_same(ran, dense())


@on_ranks(hpz, dtype=["fp32"])
def test_hpz_agrees_with_the_reference(ran):
    assert_same(ran, dense())


@on_ranks(hpz, dtype=["bf16"])
def test_hpz_in_bf16(ran):
    for result in ran.ranks:
        assert equal(result["weights"], ran.ranks[0]["weights"])
        assert distances(result, {**dense(), "momenta": {}})["losses"] < 0.01


# The seed is that of the run that was saved: after loading DeepSpeed goes on with its old copies of frozen weights.
@on_ranks(saved_and_resumed, {"stage": 3, "seed": 0, "zero_optimization": HPZ}, dtype=["fp32", "bf16"])
def test_hpz_resumes_bit_for_bit(ran):
    for result in ran.ranks:
        assert equal(result["saved"], result["loaded"])
        assert equal(result["uninterrupted"], result["resumed"])


def on_deepspeeds_cpu_adam(stage: int) -> dict:
    zero = {"offload_optimizer": CPU} | ({"offload_param": CPU} if stage == 3 else {})
    return train(config(stage, options={"torch_adam": False}, zero_optimization=zero), STEPS)


@pytest.mark.slow  # compiles an extension of DeepSpeed's, once a machine
@on_ranks(on_deepspeeds_cpu_adam, stage=[2, 3])
def test_deepspeeds_own_cpu_adam(ran):
    assert_same(ran, dense())
