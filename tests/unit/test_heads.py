"""Output heads and linear maps in models of one's own and in those of transformers that hide them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    IBertConfig,
    IBertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
)

from ds_mofa import MoFaSGD
from ds_mofa.options import OptionError, Options
from ds_mofa.parameters import split_parameters

ROWS, WIDTH = 40, 16


class Body(nn.Module):
    """Blocks of a fused projection, two linears and a norm."""

    def __init__(self, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(WIDTH),
                    "qkv": nn.Linear(WIDTH, 3 * WIDTH),
                    "out": nn.Linear(WIDTH, WIDTH),
                    "up": nn.Linear(WIDTH, 4 * WIDTH),
                    "down": nn.Linear(4 * WIDTH, WIDTH),
                }
            )
            for _ in range(blocks)
        )


BODY = 2 * 4


def model_of(**parts):
    """Modules and parameters in the order given."""
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def head(rows=ROWS, width=WIDTH):
    return nn.Linear(width, rows, bias=False)


def table(rows=ROWS, width=WIDTH):
    return nn.Embedding(rows, width)


def weight_normed(linear):
    return parametrizations.weight_norm(linear)


class TwoLayerHead(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.SiLU(), head())


OWN = {  # a model, and the names of its heads
    "before the body": (lambda: model_of(head=head(), wte=table(), body=Body()), {"head.weight"}),
    "before a value head": (
        lambda: model_of(wte=table(), body=Body(), head=head(), value=nn.Linear(WIDTH, 8)),
        {"head.weight"},
    ),
    "several beside each other": (
        lambda: model_of(wte=table(), body=Body(), heads=nn.ModuleList(head() for _ in range(3))),
        {f"heads.{i}.weight" for i in range(3)},
    ),
    "Medusa's": (
        lambda: model_of(wte=table(), body=Body(), head=head(), more=nn.ModuleList(TwoLayerHead() for _ in range(2))),
        {"head.weight", "more.0.2.weight", "more.1.2.weight"},
    ),
    "padded": (lambda: model_of(wte=table(100), body=Body(), head=head(128)), {"head.weight"}),
    "of a factorised embedding": (
        lambda: model_of(wte=table(ROWS, 6), widen=nn.Linear(6, WIDTH), body=Body(), head=head()),
        {"head.weight"},
    ),
    "over a bare table": (
        lambda: model_of(wte=nn.Parameter(torch.randn(ROWS, WIDTH)), head=head(), body=Body()),
        {"head.weight"},
    ),
    "with weight norm": (
        lambda: model_of(wte=table(), head=weight_normed(head()), body=Body()),
        {"head.parametrizations.weight.original1", "head.parametrizations.weight.original0"},
    ),
    "with a context as long as the fused projection": (
        lambda: model_of(wte=table(), wpe=table(3 * WIDTH), body=Body(), head=head()),
        {"head.weight"},
    ),
    "with a context as long as the model is wide": (
        lambda: model_of(wte=table(), wpe=table(WIDTH), body=Body(), head=head()),
        {"head.weight"},
    ),
    "with a context as long as a hidden layer": (
        lambda: model_of(wte=table(), wpe=table(4 * WIDTH), body=Body(), head=head()),
        {"head.weight"},
    ),
    "none, beside a linear of no table's length": (lambda: model_of(wte=table(), body=Body(), out=head(11)), set()),
}


def split(model, **options):
    return split_parameters(model, model.parameters(), Options(**{"rank": 4, **options}))


def reasons(divided):
    return {rest.name: rest.reason for rest in divided.leftovers}


@pytest.mark.parametrize("case", OWN)
def test_the_heads_of_a_model_of_one_s_own(case):
    make, heads = OWN[case]
    divided = split(make())
    assert {name for name, reason in reasons(divided).items() if reason == "output head"} == heads
    body = {matrix.name for matrix in divided.matrices if matrix.name.startswith("body.")}
    assert len(body) == BODY  # no linear of the body is taken for one


def test_a_head_may_be_included_whatever_told_it():
    make, heads = OWN["Medusa's"]
    assert heads <= {matrix.name for matrix in split(make(), include=["head|more"], exclude=["bias"]).matrices}


def test_fsmt_s_head_is_not_the_embedding_that_it_names():
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, src_vocab_size=50, tgt_vocab_size=60, langs=["en", "de"])
    config = FSMTConfig(**sizes, max_position_embeddings=32, tie_word_embeddings=False)
    found = reasons(split(FSMTForConditionalGeneration(config)))
    assert found["model.decoder.output_projection.weight"] == "output head"
    assert found["model.decoder.embed_tokens.weight"] == "embedding"


def test_mobilebert_s_head_is_of_two_weights():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, embedding_size=16)
    config = MobileBertConfig(**sizes, vocab_size=99, true_hidden_size=16, intra_bottleneck_size=16)
    divided = split(MobileBertForMaskedLM(config))
    assert reasons(divided)["cls.predictions.dense.weight"] == "output head"
    assert "cls.predictions.transform.dense.weight" in {matrix.name for matrix in divided.matrices}


def test_ibert_s_embedding_is_one_and_its_linears_are_named():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    found = reasons(split(IBertForMaskedLM(IBertConfig(**sizes, vocab_size=99))))
    assert found["ibert.embeddings.word_embeddings.weight"] == "embedding"
    assert found["ibert.encoder.layer.0.attention.self.query.weight"] == "2-D in QuantLinear, of no known linear map"


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.randn(8, 16))
        self.gate_up_bias = nn.Parameter(torch.randn(8, 16))
        self.positions = nn.Parameter(torch.randn(8, 16))


def test_a_bare_parameter_is_a_matrix_where_include_names_it():
    model = model_of(linear=nn.Linear(16, 16, bias=False), bare=Bare())
    divided = split(model)
    assert [matrix.name for matrix in divided.matrices] == ["linear.weight"]
    unknown = "2-D in Bare, of no known linear map"
    assert reasons(divided) == {
        "bare.A_log": unknown,
        "bare.gate_up_bias": "stacked biases",
        "bare.positions": unknown,
    }
    assert {matrix.name for matrix in split(model, include=["positions"]).matrices} == {
        "linear.weight",
        "bare.positions",
    }
    with pytest.raises(OptionError, match=r"no matrix.*If 'A_log' is the weight of a linear map, name it by include"):
        split(Bare())


def test_what_torch_itself_calls_a_linear_map_is_one():
    def pruned():
        linear = nn.Linear(8, 8, bias=False)
        prune.l1_unstructured(linear, "weight", 0.5)
        return linear

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = model_of(
        attention=nn.MultiheadAttention(8, 2, bias=False),
        apart=nn.MultiheadAttention(8, 2, bias=False, kdim=6, vdim=6),
        lstm=nn.LSTM(8, 8, bias=False),
        cell=nn.GRUCell(8, 8, bias=False),
        pruned=pruned(),
        normed=weight_normed(nn.Linear(8, 8, bias=False)),
        spectral=parametrizations.spectral_norm(nn.Linear(8, 8, bias=False)),
        scaled=Scaled(8, 8, bias=False),
    )
    divided = split(model)
    assert set(reasons(divided)) == {"normed.parametrizations.weight.original0"}  # (8, 1), beside the weight itself
    assert len(divided.matrices) == 2 + 4 + 2 + 2 + 4


def test_a_stack_of_experts_and_its_router_say_what_they_are():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4))
    divided = split(model)
    found = reasons(divided)
    layer = "model.layers.0.mlp"
    stacks = {m.name: (m.stack, m.shape) for m in divided.matrices if m.stack is not None}
    assert stacks == {f"{layer}.experts.gate_up_proj": (4, (48, 16)), f"{layer}.experts.down_proj": (4, (16, 24))}
    assert f"{2 * 4 + 4} matrices in 6 tensors, 2 of them stacks, on MoFaSGD" in divided.summary()
    excluded = reasons(split(model, exclude=["experts"]))
    assert excluded[f"{layer}.experts.down_proj"] == "excluded by pattern"
    assert found[f"{layer}.gate.weight"] == "2-D in MixtralTopKRouter, of no known linear map"
    assert "convolution" in reasons(split(model_of(conv=nn.Conv1d(8, 8, 4), out=nn.Linear(8, 8)))).values()


def test_a_lazy_linear_is_refused_by_name_until_it_has_a_shape():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(
        OptionError, match=r"'1.weight' has no shape yet.*its LazyLinear makes its weight.*Call the model"
    ):
        MoFaSGD(model, rank=4)
    model(torch.zeros(1, 8))
    assert len(MoFaSGD(model, rank=4).split.matrices) == 2


def test_a_warning_names_what_costs_the_memory_where_few_are_matrices():
    model = model_of(wte=table(1000), linears=nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    summary = split(model).summary()
    assert "warning: 6.0 % of the trained parameters are matrices" in summary  # 1024 of 17088
    assert "whole gradients, 64.26 kB, and moments, 128.51 kB, more with fp32 masters" in summary
    assert '  wte.weight, 16.00k parameters, embedding: "include": ["wte.weight"] makes it a matrix' in summary
    assert "  linears.*.bias, 4 tensors, 64 parameters, not 2-D: it stays AdamW's" in summary
    assert "and moments, 32.61 kB\n" in split(model, adamw_states="8bit").summary()
    enough = model_of(wte=table(40), linears=nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    assert split(enough).share == pytest.approx(1024 / 1728) and "warning" in split(enough).summary()
    enough.wte.requires_grad_(False)
    assert "warning" not in split(enough).summary()


def test_the_summary_says_what_trains():
    model = model_of(a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    groups = [{"params": model.a.parameters()}, {"params": model.b.parameters(), "lr": 1e-3}]
    line = split_parameters(model, groups, Options(rank=4, lr=2e-3, adamw_lr=1e-3, explore=2, balance=0.5)).summary()
    assert "  rank 4, lr 0.001 to 0.002, lr of AdamW 0.0005 to 0.001, explore 2, balance 0.5\n" in line
