"""Where tensors may be kept, and what is the same wherever they are."""

from comparing import equal
from training import config

CPU = {"device": "cpu", "pin_memory": False}
PINNED = {"device": "cpu", "pin_memory": True}
NOWHERE = {}
PARAMETERS = {"offload_param": CPU}
ALL = {"offload_optimizer": PINNED, "offload_param": PINNED}
ONE_AT_A_TIME = {"update_bytes": 1}


def settings_of(stage: int, where: dict, dtype: str = "fp32", **rest) -> dict:
    """With torch's AdamW wherever its state is, so that nothing but the place differs."""
    options = {**ONE_AT_A_TIME, **rest.pop("options", {})}
    return config(
        stage, dtype=dtype, options=options, zero_optimization=where, zero_force_ds_cpu_optimizer=False, **rest
    )


def places_of(stage: int) -> list[dict]:
    return [NOWHERE, {"offload_optimizer": PINNED if stage == 1 else CPU}] + ([PARAMETERS, ALL] if stage == 3 else [])


def assert_the_same_everywhere(ran) -> None:
    for result in ran.ranks:
        plain, *offloaded = [{key: run[key] for key in ("losses", "weights", "momenta")} for run in result["runs"]]
        assert offloaded and all(equal(run, plain) for run in offloaded)
