"""FSDP2's settings: refused before a model is loaded, told in the banner, and how checkpoints are cut."""

import json

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FullStateDictConfig, ShardedStateDictConfig, StateDictType

from launch.errors import UserError
from launch.fsdp import FULL, SHARDED, check_fsdp, describe_fsdp, state_dict_type, written_as


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        monkeypatch.delenv(name, raising=False)


def with_config(**config) -> list[str]:
    return ["--fsdp", "--fsdp_config", json.dumps(config)]


@pytest.mark.parametrize(
    "words",
    [
        ["--fsdp"],
        ["--fsdp", "full_shard auto_wrap"],
        with_config(fsdp_version=2, fsdp_state_dict_type=SHARDED, reshard_after_forward=False),
        with_config(transformer_layer_cls_to_wrap=["LlamaDecoderLayer"], cpu_offload=False),
    ],
)
def test_what_can_be_passes(words):
    check_fsdp(words, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fsdp_config", "{}"], "--fsdp_config: without --fsdp nobody reads it"),
        (with_config(version=1), "FSDP version 1: ds_mofa knows FSDP2"),
        (with_config(reshard_after_foward=False), "unknown key 'reshard_after_foward'.*'reshard_after_forward'"),
        (with_config(fsdp_forward_prefetch=True), "'forward_prefetch' is of FSDP1"),
        (with_config(xla=True), "'xla' is for TPUs"),
        ([*with_config(activation_checkpointing=True), "--gradient_checkpointing"], "Keep one of them"),
        (["--fsdp", "--fsdp_config", "nowhere.json"], "nowhere.json: no such file"),
        (["--fsdp", "--fsdp_config", "{version: 2}"], "--fsdp_config: not valid JSON"),
    ],
)
def test_what_nobody_would_read_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        check_fsdp(words, "--fsdp" in words)


def test_the_launcher_s_config_is_asked_too(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_fsdp([], True)
    monkeypatch.delenv("FSDP_VERSION")  # Accelerate takes 1 then
    with pytest.raises(UserError, match="FSDP version 1: .*fsdp_version: 2"):
        check_fsdp([], True)


@pytest.mark.parametrize("words", [["--fsdp", "full_shard offload"], with_config(cpu_offload="true")])
def test_offload_needs_a_gpu(monkeypatch, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="cpu_offload: it is for the weights of a GPU"):
        check_fsdp(words, True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_fsdp(words, True)


def test_cpu_ranks_beside_a_gpu_hide_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match="--use_cpu: FSDP2 would take the GPUs.*CUDA_VISIBLE_DEVICES="):
        check_fsdp(["--fsdp", "--use_cpu"], True)
    check_fsdp(["--use_cpu"], False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_fsdp(["--fsdp", "--use_cpu"], True)


def plugin(**settings) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True, **settings)


def test_the_banner_s_words(monkeypatch):
    settings = dict(fsdp_version=2, reshard_after_forward=False, state_dict_type=FULL, activation_checkpointing=True)
    assert describe_fsdp(settings, torch.device("cuda:0")) == (
        "gathered weights kept for backward, checkpoints FULL_STATE_DICT, activation checkpointing"
    )
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.delenv("FSDP_STATE_DICT_TYPE", raising=False)
    assert (
        describe_fsdp(None, torch.device("cpu")) == "CPU ranks, resharded after forward, checkpoints SHARDED_STATE_DICT"
    )


def test_another_cut_lasts_as_long_as_it_is_asked_for():
    sharded = plugin(state_dict_type=SHARDED)
    with state_dict_type(sharded, FULL):
        assert sharded.state_dict_type is StateDictType.FULL_STATE_DICT
        assert type(sharded.state_dict_config) is FullStateDictConfig  # the plugin alone would keep the other type's
    assert sharded.state_dict_type is StateDictType.SHARDED_STATE_DICT
    assert type(sharded.state_dict_config) is ShardedStateDictConfig


def test_a_checkpoint_shows_how_it_was_cut(tmp_path):
    assert written_as(tmp_path) is None
    (tmp_path / "pytorch_model_fsdp.bin").touch()
    assert written_as(tmp_path) == FULL
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    assert written_as(tmp_path) == SHARDED
