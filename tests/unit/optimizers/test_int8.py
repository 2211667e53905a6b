"""``weights: "int8"`` in one process: it trains, resumes from ordinary weights, and leaves the model usable."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ds_mofa import GaLore, MoFaSGD, OptionError
from ds_mofa.kernels.int8 import Int8Weight
from ds_mofa.weights.int8 import take_out

BOTH = ["embed_tokens", "lm_head"]


def llama(dtype=torch.bfloat16, tied=False):
    torch.manual_seed(0)
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied)).to(dtype).train()


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 12, (4, 24), generator=generator) * torch.arange(1, 5)[:, None]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def kept(model):
    return [name for name, param in model.named_parameters() if isinstance(param, Int8Weight)]


@pytest.mark.parametrize(
    "kind, options", [
        (MoFaSGD, {}), (MoFaSGD, {"explore": 8}), (MoFaSGD, {"capture": "hook"}), (GaLore, {"lr": 5e-3}),
        (MoFaSGD, {"include": BOTH}), (MoFaSGD, {"include": BOTH, "fused_head": True}),
    ],
    ids=["plain", "explore", "hook", "galore", "embedding and head", "fused head"],
)  # fmt: skip
def test_it_learns_as_sixteen_bits_do(kind, options, capsys):
    options = {"lr": 1e-3, "rank": 8, **options}
    wide, narrow = llama(), llama()
    losses = train(wide, kind(wide, **options), 30)
    also = train(narrow, kind(narrow, **options, weights="int8"), 30)
    count = 14 + len(options.get("include", ()))
    assert f"{count} matrices" in capsys.readouterr().out and len(kept(narrow)) == count
    fallen, fell = losses[0] - losses[-1], also[0] - also[-1]
    assert fallen > 0.3 and fell == pytest.approx(fallen, rel=0.1)


KINDS = {
    "qwen3_moe": dict(
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        num_key_value_heads=2,
        head_dim=32,
    ),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None),
    "gemma": dict(num_key_value_heads=2, head_dim=32),
}


@pytest.mark.parametrize(
    "kind, include, count", [("qwen3_moe", [], 12), ("gpt2", [], 8), ("gemma", ["embed_tokens"], 15)], ids=list(KINDS)
)
def test_stacks_transposed_weights_and_scaled_embeddings(kind, include, count):
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    config = AutoConfig.for_model(kind, vocab_size=96, **(KINDS[kind] if kind == "gpt2" else {**shape, **KINDS[kind]}))
    losses = []
    for weights in (None, "int8"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        losses.append(train(model, MoFaSGD(model, lr=1e-3, rank=4, weights=weights, include=include), 8))
    assert len(kept(model)) == count
    assert losses[0][-1] < losses[0][0] - 0.05 and losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_a_tied_embedding_is_one_weight():
    model = llama(tied=True)
    optimizer = MoFaSGD(model, lr=1e-3, rank=8, weights="int8", include=["embed_tokens"])
    losses = train(model, optimizer, 10)
    assert model.lm_head.weight is model.model.embed_tokens.weight and losses[-1] < losses[0]


@pytest.mark.parametrize("options", [{}, {"explore": 8, "include": BOTH}], ids=["plain", "all"])
def test_it_goes_on_bit_for_bit_from_an_ordinary_checkpoint(options, tmp_path):
    options = {"lr": 1e-3, "rank": 8, "weights": "int8", **options}
    model = llama()
    optimizer = MoFaSGD(model, **options)
    train(model, optimizer, 3)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    wanted = train(model, optimizer, 3, seed=2)
    saved = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not kept(saved), "it is an ordinary model"
    other = llama()  # whose rotary tables are bf16 as the first one's are
    other.load_state_dict(saved.state_dict())
    resumed = MoFaSGD(other, **options)
    resumed.load_state_dict(state)
    assert train(other, resumed, 3, seed=2) == wanted
    for (name, value), same in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, same), name


def test_it_generates_and_evaluates_by_what_was_written():
    model = llama()
    optimizer = MoFaSGD(model, lr=1e-3, rank=8, weights="int8", include=BOTH)
    train(model, optimizer, 2)
    plain = llama()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(5)[None]
    for one in (model, plain):
        one.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(*(one.generate(ids, max_new_tokens=4, do_sample=False) for one in (model, plain)))


def test_before_the_move_it_is_done_by_the_class():
    model = MoFaSGD.to_int8(llama(), rank=8, include=BOTH)
    values = model.lm_head.weight.widened()
    assert len(kept(model)) == 16
    optimizer = MoFaSGD(model, lr=1e-3, rank=8, include=BOTH)  # the option is not needed then
    assert torch.equal(model.lm_head.weight.widened(), values)
    train(model, optimizer, 1)
    assert not torch.equal(model.lm_head.weight.widened(), values) and len(kept(model)) == 16
    optimizer.detach()
    take_out(model)
    assert not kept(model) and type(model.state_dict()["lm_head.weight"]) is torch.Tensor


def test_rows_that_are_no_whole_groups_stay_as_they_are(capsys):
    model = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 64), nn.Linear(64, 3)).bfloat16()
    optimizer = MoFaSGD(model, lr=1e-3, rank=8, weights="int8")
    assert "1 matrices" in (printed := capsys.readouterr().out) and "1 whose rows are no multiple of 32" in printed
    before = [model[0].weight.widened(), model[2].weight.detach().clone()]
    model(torch.randn(20, 64).bfloat16()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight.widened(), before[0]) and not torch.equal(model[2].weight, before[1])


def test_what_cannot_be_is_refused():
    with pytest.raises(OptionError, match="load the model in bf16"):
        MoFaSGD(llama(torch.float16), rank=8, weights="int8")
    with pytest.raises(OptionError, match="master_weights"):
        MoFaSGD(llama(), rank=8, weights="int8", master_weights=True)
    with pytest.raises(OptionError, match="multiple of 32"):
        MoFaSGD(nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 3)), rank=8, weights="int8")
