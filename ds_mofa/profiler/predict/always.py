"""What is there in every moment of a step, all but gradients, activations and temporaries: arithmetic on shapes.

Bytes of one rank by category.
"""

from ds_mofa.adamw.eight_bit import moment_bytes
from ds_mofa.kernels.int8 import GROUP
from ds_mofa.profiler.predict.plan import Plan, numbers, numbers_of_a_shard
from ds_mofa.profiler.predict.simulated.micro_batch import Parameter
from ds_mofa.profiler.setting import RunSetting

__all__ = [
    "always",
    "masters_are_weights",
    "matrix_masters",
    "on_a_rank",
    "state_bytes",
    "weight_bytes",
    "weights_on_a_rank",
]


def always(plan: Plan) -> dict[str, int]:
    """On the device."""
    setting = plan.setting
    parts: dict[str, int] = {"weights": weights_on_a_rank(plan, plan.batch.parameters)}
    sharded = on_a_rank(plan, plan.trained) if setting.zero is None else _partition(plan)
    if setting.offload == "param":  # but for what stage 3 keeps gathered
        least = 0 if setting.sharded else plan.zero.stage3_param_persistence_threshold
        parts["weights"] = 2 * numbers([p for p in plan.batch.parameters if p.numel <= least])
    if setting.zero is not None and not setting.offload and not masters_are_weights(plan):
        parts["master weights"] = state_bytes(plan) * sharded
    if matrix_masters(plan) and not setting.offload:
        parts["master weights"] = parts.get("master weights", 0) + matrix_masters(plan)
    if not setting.offload:
        parts |= _moments(plan, sharded)
    if plan.sketched:
        # CPUOffloadPolicy takes the weights alone, and the state is where the update is computed.
        state = 0 if setting.offload and not setting.sharded else 4 * plan.state_layout.segment
        parts["sketches"] = 4 * plan.layout.numel
        parts["factors"] = 2 * plan.layout.numel + state + plan.batch.held
    return parts


def weight_bytes(setting: RunSetting) -> int:
    """Of one number of the weights that are not in eight bits, and of the gradients that are kept."""
    return 4 if setting.weights == "fp32" else 2


def weights_on_a_rank(plan: Plan, parameters: list[Parameter]) -> int:
    """Bytes of these that a rank holds as weights."""
    small = [p for p in parameters if p.eight_bits]
    rest = [p for p in parameters if not p.eight_bits]
    codes = on_a_rank(plan, small)
    return weight_bytes(plan.setting) * on_a_rank(plan, rest) + codes + codes // GROUP


def on_a_rank(plan: Plan, parameters: list[Parameter]) -> int:
    """Elements of these that a rank holds as weights."""
    setting = plan.setting
    return numbers_of_a_shard(parameters, setting) if setting.sharded else numbers(parameters) // setting.shards


def _partition(plan: Plan) -> int:
    """Elements that a rank's AdamW steps under ZeRO: a part of all from stage 1 on."""
    return numbers(plan.trained) // (plan.setting.gpus if plan.setting.zero else 1)


def state_bytes(plan: Plan) -> int:
    """Of one number of the masters and moments."""
    if plan.setting.zero is None:
        return weight_bytes(plan.setting)
    return 2 if plan.setting.states == "bf16" else 4


def matrix_masters(plan: Plan) -> int:
    """Of the matrices' fp32 masters, with the option ``master_weights``: of what a rank holds. fp32 weights are their
    own.
    """
    wanted = plan.setting.option("master_weights") and plan.setting.weights != "fp32"
    return 4 * on_a_rank(plan, plan.matrices) if wanted else 0


def masters_are_weights(plan: Plan) -> bool:
    """ds_mofa lets a bf16 partition be its own master in stages 1 and 2."""
    return plan.sketched and state_bytes(plan) == 2 and plan.setting.zero in (1, 2)


def _moments(plan: Plan, sharded: int) -> dict[str, int]:
    """Of whatever optimizer it is; ``sharded``: elements of what it trains, on this rank."""
    setting, state = plan.setting, state_bytes(plan)
    if setting.option("adamw_states") == "8bit":
        return {"AdamW states": 2 * sum(map(moment_bytes, _stepped(plan)))}
    if setting.optimizer != "Muon":
        return {"AdamW states": 2 * state * sharded}
    N = setting.gpus if setting.zero else 1
    matrices = numbers(plan.matrices)  # one momentum
    adamw = 2 * state * (numbers(plan.trained) - matrices) // N
    return {"AdamW states": adamw, "other optimizer states": state * matrices // N}


def _stepped(plan: Plan) -> list[int]:
    """Elements of each tensor that AdamW steps: a parameter, a shard of it, or a rank's partition of a group."""
    if not plan.setting.zero:
        return [on_a_rank(plan, [p]) for p in plan.trained]
    return [-(-numbers(group) // plan.setting.gpus) for group in plan.groups]
