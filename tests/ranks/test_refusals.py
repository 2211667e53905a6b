"""What cannot work ends at ``initialize``, with a message that says what to change."""

import deepspeed
from deepspeed.pipe import PipelineModule
from launching import on_ranks
from torch import nn
from toys import Toy
from training import config, toy

import ds_mofa

NVME = {"device": "nvme", "nvme_path": "."}


class AllMatrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(16, 16, bias=False)


class Experts(Toy):
    def __init__(self):
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.experts = MoE(35, nn.Linear(35, 35), num_experts=1)


def pipeline() -> PipelineModule:
    return PipelineModule(layers=[nn.Linear(35, 35), nn.Linear(35, 35)], num_stages=1, loss_fn=nn.MSELoss())


# name: (settings, model, what the message must contain)
CASES = {
    "pipeline": (config(1), pipeline, ["pipeline", "use ZeRO"]),
    "offloaded parameters on NVMe": (
        config(3, zero_optimization={"offload_param": NVME}),
        toy,
        ["offload_param to NVMe", '"device": "cpu"'],
    ),
    "offloaded optimizer on NVMe": (
        config(3, zero_optimization={"offload_optimizer": NVME}),
        toy,
        ["offload_optimizer to NVMe", '"device": "cpu"'],
    ),
    "fp16 without ZeRO": (config(0, dtype="fp16"), toy, ["fp16 at ZeRO stage 0", '"stage": 1', "bf16"]),
    "experts": (config(2), lambda: toy(Experts), ["MoE", "use AdamW"]),
    "SuperOffload": (
        config(3, zero_optimization={"offload_optimizer": {"device": "cpu", "super_offload": True}}),
        toy,
        ["SuperOffload", "offload_optimizer"],
    ),
    "ZenFlow": (
        config(
            2,
            zero_optimization={
                "offload_optimizer": {"device": "cpu"},
                "zenflow": {"topk_ratio": 0.1, "update_interval": 2, "full_warm_up_rounds": 0, "overlap_step": False},
            },
        ),
        toy,
        ["ZenFlow", "remove zenflow"],
    ),
    "DeepCompile": (config(3, compile={"deepcompile": True}), toy, ["DeepCompile", '"deepcompile": false']),
    "universal checkpoints without ZeRO": (
        config(0, checkpoint={"load_universal": True}),
        toy,
        ["universal checkpoints at ZeRO stage 0", "use stage 1"],
    ),
    "max_grad_norm": (config(2, options={"max_grad_norm": 1.0}), toy, ['"gradient_clipping"']),
    "an unknown option": (config(2, options={"rnak": 4}), toy, ["'rnak'", "did you mean 'rank'"]),
    "auto outside of the Trainer": (config(2, options={"lr": "auto"}), toy, ["auto", "Write a value"]),
    "nothing for AdamW": (config(2), lambda: toy(AllMatrices), ["at least one for AdamW", '"exclude"']),
    "no matrix at all": (config(2, options={"rank": 64}), toy, ["no matrix to train", "rank to at most 35"]),
    "a pattern without a match": (config(2, options={"exclude": ["lm_head"]}), toy, ["'lm_head'", "matches no"]),
}


def refused(what: str) -> dict:
    """The error of ``deepspeed.initialize``."""
    settings, model, _ = CASES[what]
    try:
        deepspeed.initialize(model=(built := model()), model_parameters=built.parameters(), config=settings)
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": "nothing", "message": ""}


def built_alone() -> dict:
    """A MoFaSGD of one's own in a run of two ranks, where nobody would add up its sketches."""
    try:
        ds_mofa.MoFaSGD(toy(), rank=4)
    except ds_mofa.OptionError as error:
        return {"message": str(error)}
    return {"message": ""}


@on_ranks(refused, world=[1], what=list(CASES))
def test_is_refused_with_the_fix_in_the_message(ran):
    (result,) = ran.ranks
    assert result["type"] == "OptionError", result
    for part in CASES[ran.what][2]:
        assert part in result["message"], result["message"]


@on_ranks(built_alone)
def test_an_optimizer_outside_deepspeed_in_a_run_of_several_is_refused(ran):
    for result in ran.ranks:
        assert "deepspeed.initialize" in result["message"]
