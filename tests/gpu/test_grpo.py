"""TRL's GRPO on a GPU, a policy of 1.2 B parameters in bf16: what its generator sees, and the memory beside AdamW's."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

import ds_mofa
from launch.tokenizer import byte_tokenizer

pytest.importorskip("trl")
pytest.importorskip("datasets")

from tests.grpo import trainer_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    shape = json.loads((ROOT / "configs/models/llama-3.2-1b.json").read_text())
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def trained(folder: Path, out: Path, optimizer):
    """The trainer after ``STEPS`` steps, where the weights lay before, and the peak of the last step in bytes."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    options = {"bf16": True, "per_device_train_batch_size": 8, "max_completion_length": 32, "max_steps": STEPS}
    trainer = trainer_of(model, optimizer(model), out, **options)
    places = {name: param.data_ptr() for name, param in model.named_parameters()}
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return trainer, places, torch.cuda.max_memory_allocated()


def scores(model, ids):
    """The logits by which ``model`` generates two more tokens."""
    how = {"max_new_tokens": 2, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    return torch.stack(model.eval().generate(ids, **how, pad_token_id=0).scores)


def test_the_generator_has_what_was_written_and_the_memory_is_less(saved, tmp_path):
    trainer, places, ours = trained(saved, tmp_path / "ours", lambda model: ds_mofa.MoFaSGD(model, lr=1e-4, rank=8))
    policy, reference = trainer.model, trainer.ref_model
    ids = torch.tensor([[49, 32], [50, 32]], device="cuda")
    loaded = LlamaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).cuda()
    start = scores(loaded, ids)
    assert torch.equal(scores(reference, ids), start), "the reference stays"
    loaded.load_state_dict(policy.state_dict())
    assert torch.equal(scores(policy, ids), scores(loaded, ids))
    assert not torch.equal(scores(policy, ids), start)
    assert {name: param.data_ptr() for name, param in policy.named_parameters()} == places
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == STEPS
    del trainer, policy, reference, loaded
    torch.cuda.empty_cache()

    kwargs = {"lr": 1e-5, "fused": True}
    _, _, theirs = trained(saved, tmp_path / "adamw", lambda model: torch.optim.AdamW(model.parameters(), **kwargs))
    print(f"GRPO, peak allocated: MoFaSGD {ours / 1e9:.2f} GB, AdamW {theirs / 1e9:.2f} GB")
    assert ours < 0.75 * theirs
