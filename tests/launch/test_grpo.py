"""TRL's GRPO with MoFaSGD: the policy learns its reward, the generator has its weights, the reference stays."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ds_mofa
from launch.tokenizer import byte_tokenizer

pytest.importorskip("trl")
pytest.importorskip("datasets")

from tests.grpo import trainer_of

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    start = copy.deepcopy(model)
    optimizer = ds_mofa.MoFaSGD(model, lr=1e-3, rank=8, explore=8)
    options = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 32,
        "max_completion_length": 8,
        "max_steps": 40,
    }
    trainer = trainer_of(model, optimizer, folder / "out", **options)
    addresses = {name: param.data_ptr() for name, param in model.named_parameters()}
    trainer.train()
    return trainer, start, addresses


def test_the_reward_rises(trained):
    rewards = [entry["reward"] for entry in trained[0].state.log_history if "reward" in entry]
    assert len(rewards) == 40
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.03, rewards


def test_every_weight_was_written_where_it_lay(trained):
    """So whoever generates by views of the policy's weights generates by the new ones."""
    trainer, start, addresses = trained
    for name, param in trainer.model.named_parameters():
        assert param.data_ptr() == addresses[name]
        assert not torch.equal(param, start.get_parameter(name)), name


def test_the_policy_generates_by_its_new_weights(trained):
    trainer, start, _ = trained
    ids = torch.tensor([[49, 32], [50, 32], [51, 32]])
    loaded = LlamaForCausalLM(trainer.model.config)
    loaded.load_state_dict(trainer.model.state_dict())

    def scores(model):
        return torch.stack(
            model.eval()
            .generate(
                ids, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True, pad_token_id=0
            )
            .scores
        )

    ours = scores(trainer.model)
    torch.testing.assert_close(ours, scores(loaded), rtol=1e-4, atol=1e-5)
    assert (ours - scores(start)).abs().max() > 0.1


def test_the_reference_stays(trained):
    trainer, start, _ = trained
    for name, param in trainer.ref_model.named_parameters():
        assert torch.equal(param, start.get_parameter(name)), name
