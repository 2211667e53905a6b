"""Every shipped config is one that DeepSpeed accepts, and says what its name says."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from deepspeed.runtime.config import DeepSpeedConfig

from ds_mofa import Options
from launch.fsdp import FULL, SHARDED

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(file.stem for file in CONFIGS.glob("*.json"))
# What HF's Trainer would fill in, where a config leaves it to the command line.
FILLED = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "lr": 1e-3,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.0,
    "enabled": False,
    "reduce_bucket_size": 10_000,
    "stage3_prefetch_bucket_size": 10_000,
    "stage3_param_persistence_threshold": 100,
}


def offloads(name: str) -> bool:
    """By its name."""
    return "offload" in name


def load(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def fill(config: dict) -> dict:
    """Replace each "auto" by a value that HF might put there; KeyError for one that HF would leave."""
    return {
        key: fill(value) if isinstance(value, dict) else FILLED[key] if value == "auto" else value
        for key, value in config.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_accepts_it(name):
    config = fill(load(name))
    # One rank here, so the batch is what one rank and the accumulation make of it.
    config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    parsed = DeepSpeedConfig(copy.deepcopy(config))
    assert parsed.optimizer_name.lower() == config["optimizer"]["type"].lower()
    assert parsed.zero_optimization_stage == config["zero_optimization"]["stage"]
    offload = parsed.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == offloads(name)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("zero")])
def test_the_name_tells_the_content(name):
    config = load(name)
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert config["optimizer"]["type"].lower() == name.rsplit("_", 1)[1]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_mofasgd")])
def test_the_adamw_twin_differs_in_the_optimizer_alone(name):
    ours, twin = load(name), load(name.replace("mofasgd", "adamw"))
    del ours["optimizer"], twin["optimizer"]
    assert ours == twin


@pytest.mark.parametrize("name", [name for name in NAMES if load(name)["optimizer"]["type"] == "MoFaSGD"])
def test_mofasgd_accepts_its_options(name):
    params = fill(load(name)["optimizer"]["params"])
    _, passed_on = Options.from_config(params, passed_on=["torch_adam"])
    assert passed_on == ({} if offloads(name) else {"torch_adam": True})


def test_stage_3_gathers_the_weights_for_saving():
    for name in NAMES:
        zero = load(name)["zero_optimization"]
        if zero["stage"] == 3:
            assert zero["stage3_gather_16bit_weights_on_model_save"] is True


def test_the_cards_settings():
    """Nothing on the host, embedding and head as matrices: the smaller the card, the fewer bits and directions."""
    configs = {size: load(f"single_{size}gb") for size in (12, 16, 24)}
    for config in configs.values():
        assert config["zero_optimization"]["stage"] == 2
        assert config["zero_optimization"]["reduce_bucket_size"] == 20_000_000
        params = config["optimizer"]["params"]
        assert params["include"] == ["embed_tokens", "lm_head"] and params["fused_head"] is True
    assert [configs[size]["optimizer"]["params"].get("weights") for size in configs] == ["int8", "int8", None]
    assert [configs[size]["optimizer"]["params"].get("rank") for size in configs] == [8, None, None]
    host = load("single_16gb_offload")
    assert "offload_param" in host["zero_optimization"] and host["optimizer"]["params"]["rank"] == 16


def test_the_paper_settings():
    config = load("paper_llama8b")
    assert config["optimizer"]["params"]["rank"] == 8
    assert config["bf16"]["enabled"] is True
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 8)


def test_the_accelerate_config_points_to_a_shipped_one():
    config = yaml.safe_load((CONFIGS / "accelerate_zero2.yaml").read_text())
    assert config["distributed_type"] == "DEEPSPEED"
    assert Path(config["deepspeed_config"]["deepspeed_config_file"]).is_file()


def test_the_fsdp2_config_is_one_that_accelerate_knows_and_that_keeps_bf16_weights():
    config = load_config_from_file(str(CONFIGS / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP" and config.mixed_precision == "no"
    options = {string for action in launch_command_parser()._actions for string in action.option_strings}
    assert {f"--{key}" for key in config.fsdp_config} <= options
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_state_dict_type"] in (FULL, SHARDED)
