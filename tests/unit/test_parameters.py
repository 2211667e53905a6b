"""Which parameter goes where. Embeddings and heads are told by module and identity, never by name."""

import re

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from ds_mofa.options import OptionError, Options
from ds_mofa.parameters import full_shape, split_parameters

VOCABULARY, WIDTH, CONTEXT = 40, 16, 16


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.square = nn.Linear(width, width)
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width)


class NanoGPT(nn.Module):
    """No ``get_output_embeddings``; a context as long as the width, so the position embedding is square."""

    def __init__(self, tied=False, blocks=2):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


def split(model, groups=None, **options):
    return split_parameters(model, model.parameters() if groups is None else groups, Options(**{"rank": 4, **options}))


def matrices(divided):
    return {matrix.name for matrix in divided.matrices}


def reasons(divided):
    return {leftover.name: leftover.reason for leftover in divided.leftovers}


BLOCK_MATRICES = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("square", "up", "down")}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_nano_gpt_is_divided_by_its_modules(tied):
    model = NanoGPT(tied)
    divided = split(model)
    assert matrices(divided) == BLOCK_MATRICES
    expected = {"wte.weight": "embedding", "wpe.weight": "embedding"}
    if not tied:
        expected["lm_head.weight"] = "output head"
    expected |= {name: "not 2-D" for name, p in model.named_parameters() if p.ndim == 1}
    assert reasons(divided) == expected


def test_every_trained_parameter_goes_to_exactly_one_side():
    model = NanoGPT()
    divided = split(model)
    for groups, expected in (
        (divided.matrix_groups, matrices(divided)),
        (divided.adamw_groups, set(reasons(divided))),
    ):
        names = {p: name for name, p in model.named_parameters()}
        assert {names[p] for group in groups for p in group["params"]} == expected
    assert len(divided.matrices) + len(divided.leftovers) == len(list(model.parameters()))


def test_a_matrix_says_what_it_is():
    model = NanoGPT()
    divided = split(model)
    for index, matrix in enumerate(divided.matrices):
        assert matrix.index == index and matrix.group == 0
        assert matrix.param is dict(model.named_parameters())[matrix.name]
        assert matrix.shape == tuple(matrix.param.shape)
        assert [module.weight is matrix.param for module in matrix.modules] == [True]


def test_embedding_bags_and_misleading_names():
    class Misleading(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.EmbeddingBag(30, 8)
            self.embed_tokens = nn.Linear(8, 8, bias=False)
            self.lm_head = nn.Linear(8, 12, bias=False)
            self.last = nn.Linear(12, 8, bias=False)

    divided = split(Misleading())
    assert matrices(divided) == {"embed_tokens.weight", "lm_head.weight", "last.weight"}
    assert reasons(divided) == {"projection.weight": "embedding"}


def test_a_weight_shared_by_two_linears_is_one_matrix_of_two_modules():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    divided = split(model)
    assert matrices(divided) == {"0.weight"}
    assert divided.matrices[0].modules == (model[0], model[2])


def _llama(**settings):
    shape = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **{**shape, **settings})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_hugging_face_head_is_what_the_model_calls_its_output_embeddings(tied):
    divided = split(LlamaForCausalLM(_llama(tie_word_embeddings=tied)))
    assert len(matrices(divided)) == 7
    expected = {"model.embed_tokens.weight": "embedding"} | ({} if tied else {"lm_head.weight": "output head"})
    assert {name: reason for name, reason in reasons(divided).items() if reason != "not 2-D"} == expected


def test_a_hugging_face_head_of_another_shape_than_any_embedding_is_a_head_too():
    model = LlamaForCausalLM(_llama())
    model.lm_head = nn.Linear(16, 50, bias=False)
    assert reasons(split(model))["lm_head.weight"] == "output head"


def test_conv1d_weights_are_matrices_of_their_stored_shape():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    divided = split(model)
    shapes = {matrix.name.removeprefix("transformer.h.0."): matrix.shape for matrix in divided.matrices}
    assert shapes == {
        "attn.c_attn.weight": (16, 48),
        "attn.c_proj.weight": (16, 16),
        "mlp.c_fc.weight": (16, 64),
        "mlp.c_proj.weight": (64, 16),
    }


def test_a_model_that_says_it_has_no_head_has_none():
    shape = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = BertModel(BertConfig(num_attention_heads=2, max_position_embeddings=16, **shape))
    assert model.get_output_embeddings() is None
    divided = split(model)
    # The pooler is the last linear, and square like the position embedding.
    assert "pooler.dense.weight" in matrices(divided)
    assert {name for name, reason in reasons(divided).items() if reason == "embedding"} == {
        "embeddings.token_type_embeddings.weight",
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
    }


def test_a_head_put_on_a_hugging_face_backbone_by_hand_is_found():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = LlamaForCausalLM(_llama()).model
            self.lm_head = nn.Linear(16, 48, bias=False)

    assert reasons(split(Own()))["lm_head.weight"] == "output head"


def test_frozen_parameters_are_nobody_s():
    model = NanoGPT()
    frozen = [model.wte.weight, model.blocks[0].up.weight, model.blocks[1].down.bias]
    for param in frozen:
        param.requires_grad_(False)
    divided = split(model)
    named = matrices(divided) | set(reasons(divided))
    assert named == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in frozen)


def test_smaller_than_the_rank_goes_to_adamw_and_says_so():
    divided = split(NanoGPT(), rank=16)
    assert matrices(divided) == BLOCK_MATRICES
    model = nn.Sequential(nn.Linear(32, 15, bias=False), nn.Linear(15, 64, bias=False), nn.Linear(64, 16, bias=False))
    divided = split(model, rank=16)
    assert reasons(divided) == {"0.weight": "smaller than rank 16", "1.weight": "smaller than rank 16"}
    assert matrices(divided) == {"2.weight"}


@pytest.mark.parametrize(
    "patterns, gained, lost",
    [
        ({"include": ["wte"]}, {"wte.weight"}, set()),
        ({"include": ["lm_head$|lm_head.weight"]}, {"lm_head.weight"}, set()),
        ({"include": ["^wpe"], "exclude": [r"\.up\."]}, {"wpe.weight"}, {"blocks.0.up.weight", "blocks.1.up.weight"}),
        ({"exclude": [r"blocks\.0\..*weight"]}, set(), {n for n in BLOCK_MATRICES if n.startswith("blocks.0")}),
        ({"include": ["wte"], "exclude": ["wte"]}, set(), set()),
        ({"include": [r"square\.weight"]}, set(), set()),
    ],
)
def test_patterns_move_parameters_and_exclude_wins(patterns, gained, lost):
    divided = split(NanoGPT(), **patterns)
    assert matrices(divided) == BLOCK_MATRICES - lost | gained
    assert all(reasons(divided)[name] == "excluded by pattern" for name in lost)


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(kind):
    with pytest.raises(OptionError, match=rf"{kind}: the pattern 'mlp' matches no trained parameter.*'wte.weight'"):
        split(NanoGPT(), **{kind: ["mlp"]})


def test_a_pattern_that_matches_frozen_parameters_alone_is_an_error():
    model = NanoGPT()
    model.wte.requires_grad_(False)
    with pytest.raises(OptionError, match="'wte' matches no trained parameter"):
        split(model, include=["wte"])


@pytest.mark.parametrize(
    "pattern, why",
    [
        ("square", "neither"),
        (r"norm\.weight", "neither"),
        ("conv", "a convolution"),
        ("lm_head", "smaller than rank 20"),
    ],
)
def test_include_of_what_cannot_be_a_matrix_is_an_error(pattern, why):
    model = nn.ModuleDict({"body": NanoGPT(), "big": nn.Linear(30, 30), "conv": nn.Conv1d(20, 20, 20)})
    with pytest.raises(OptionError, match=re.escape(f"include: {pattern!r} names") + f".*{why}"):
        split(model, include=[pattern], rank=20 if pattern == "lm_head" else 4)


def test_nothing_to_train_is_an_error_that_names_the_largest_rank_that_works():
    with pytest.raises(OptionError, match="no matrix to train.*Set rank to at most 16"):
        split(NanoGPT(), rank=17)
    assert split(NanoGPT(), rank=16).matrices
    with pytest.raises(OptionError, match="Use AdamW for this model"):
        split(nn.Sequential(nn.Embedding(30, 8), nn.LayerNorm(8)))
    with pytest.raises(OptionError, match="no matrix to train"):
        split(NanoGPT(), groups=[])


def test_the_largest_rank_that_works_is_that_of_a_possible_matrix():
    """An embedding is no matrix at any rank, so it must not set the rank that is suggested."""
    model = nn.Sequential(nn.Embedding(40, 30), nn.Linear(30, 12), nn.Linear(12, 30))
    with pytest.raises(OptionError, match="at most 12"):
        split(model, rank=32)


@pytest.mark.parametrize("nested", [False, True], ids=["loose", "two groups"])
def test_a_parameter_given_twice_is_an_error(nested):
    model = NanoGPT()
    twice = [model.lm_head.weight]
    groups = [{"params": model.parameters()}, {"params": twice}] if nested else [*model.parameters(), *twice]
    with pytest.raises(OptionError, match="'lm_head.weight' is .*only once"):
        split(model, groups)


def test_a_parameter_of_another_model_is_an_error():
    with pytest.raises(OptionError, match=r"shape \(5, 6\) is in no module"):
        split(NanoGPT(), [nn.Parameter(torch.zeros(5, 6))])


@pytest.mark.parametrize("kind", ["parameters", "named", "generator", "groups", "named groups", "single tensors"])
def test_parameters_come_in_every_form_that_torch_optimizers_take(kind):
    model = NanoGPT()
    given = {
        "parameters": lambda: list(model.parameters()),
        "named": lambda: list(model.named_parameters()),
        "generator": model.parameters,
        "groups": lambda: [{"params": list(model.blocks.parameters())}, {"params": model.wte.parameters()}],
        "named groups": lambda: [{"params": model.named_parameters()}],
        "single tensors": lambda: [{"params": p} for p in model.parameters()],
    }[kind]()
    assert matrices(split(model, given)) == BLOCK_MATRICES


# option weight_decay, adamw_weight_decay, the group's own -> of the matrices, of AdamW's
DECAYS = [
    (0.1, None, None, 0.1, 0.1),
    (0.1, 0.2, None, 0.1, 0.2),
    (0.1, 0.0, None, 0.1, 0.0),
    (0.0, 0.2, None, 0.0, 0.2),
    (0.1, None, 0.3, 0.3, 0.3),
    (0.1, 0.2, 0.3, 0.3, 0.2),
    (0.1, 0.0, 0.3, 0.3, 0.0),
    (0.1, None, 0.0, 0.0, 0.0),
    (0.1, 0.2, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("option, adamw, own, of_matrices, of_rest", DECAYS)
def test_which_weight_decay_counts(option, adamw, own, of_matrices, of_rest):
    model = NanoGPT()
    group = {"params": model.parameters()} | ({} if own is None else {"weight_decay": own})
    divided = split(model, [group], weight_decay=option, adamw_weight_decay=adamw)
    assert [g["weight_decay"] for g in divided.matrix_groups] == [of_matrices]
    assert [g["weight_decay"] for g in divided.adamw_groups] == [of_rest]


# option lr, adamw_lr, the group's own -> of the matrices, of AdamW's step
RATES = [
    (1e-3, None, None, 1e-3, 1e-3),
    (1e-3, 5e-4, None, 1e-3, 5e-4),
    (1e-3, 0, None, 1e-3, 0),
    (1e-3, None, 2e-4, 2e-4, 2e-4),
    (1e-3, 5e-4, 2e-4, 2e-4, 1e-4),
    (1e-3, 0, 2e-4, 2e-4, 0),
]


@pytest.mark.parametrize("option, adamw, own, of_matrices, of_rest", RATES)
def test_which_learning_rate_counts(option, adamw, own, of_matrices, of_rest):
    model = NanoGPT()
    group = {"params": model.parameters()} | ({} if own is None else {"lr": own})
    divided = split(model, [group], lr=option, adamw_lr=adamw)
    assert [g["lr"] for g in divided.matrix_groups] == [of_matrices]
    assert [g["lr"] for g in divided.adamw_groups] == [of_matrices]  # one schedule moves both
    assert [g["lr"] * g["lr_scale"] for g in divided.adamw_groups] == [pytest.approx(of_rest)]


def test_groups_keep_their_own_settings_and_members():
    model = NanoGPT()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim == 1]
    divided = split(
        model,
        [{"params": plain, "weight_decay": 0.0, "name": "plain"}, {"params": decayed, "lr": 5e-4, "name": "decayed"}],
    )
    assert [group["name"] for group in divided.matrix_groups] == ["decayed"]
    assert [group["name"] for group in divided.adamw_groups] == ["plain", "decayed"]
    assert {matrix.group for matrix in divided.matrices} == {0}
    members = [{id(p) for p in group["params"]} for group in divided.adamw_groups]
    heads = [model.wte.weight, model.wpe.weight, model.lm_head.weight]
    assert members == [{id(p) for p in plain}, {id(p) for p in heads}]


def test_matrices_know_which_group_they_came_from():
    model = NanoGPT()
    first, second = model.blocks
    divided = split(model, [{"params": first.norm.parameters()}, {"params": second.parameters()}, first.up.weight])
    for matrix in divided.matrices:
        assert any(matrix.param is p for p in divided.matrix_groups[matrix.group]["params"])


def test_what_is_frozen_is_known_by_name():
    model = NanoGPT()
    model.blocks[0].up.requires_grad_(False), model.wpe.requires_grad_(False)
    divided = split(model)
    assert [(one.name, one.param) for one in divided.frozen] == [
        ("wpe.weight", model.wpe.weight),
        ("blocks.0.up.weight", model.blocks[0].up.weight),
    ]
    assert split(NanoGPT()).frozen == []
    handed = [p for p in model.parameters() if p.requires_grad]
    assert split(model, handed).frozen == divided.frozen  # whoever hands over what is trained may thaw the rest later


def test_gpt2_s_matrices_know_that_they_are_transposed():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=8))
    model.extra = nn.Linear(16, 8, bias=False)
    shapes = {matrix.name: (matrix.shape, matrix.map_shape) for matrix in split(model).matrices}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == ((16, 48), (48, 16))
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == ((64, 16), (16, 64))
    assert shapes["extra.weight"] == ((8, 16), (8, 16))


def test_under_zero_init_the_real_shape_counts():
    model = NanoGPT()
    for param in model.parameters():
        param.ds_shape, param.data = param.shape, torch.empty(0)
    assert all(full_shape(p) == tuple(p.ds_shape) and p.shape == (0,) for p in model.parameters())
    divided = split(model)
    assert matrices(divided) == BLOCK_MATRICES
    assert reasons(divided)["lm_head.weight"] == "output head"
    assert {matrix.shape for matrix in divided.matrices} == {(16, 16), (48, 16), (16, 48)}
    assert sum(rest.numel for rest in divided.leftovers) == 2 * 40 * 16 + 16 * 16 + 2 * 4 * 16


def test_names_may_come_from_outside():
    model = NanoGPT()
    names = {p: "wrapped." + name for name, p in model.named_parameters()}
    divided = split_parameters(model, model.parameters(), Options(rank=4, exclude=["^wrapped.blocks.0"]), names)
    assert matrices(divided) == {"wrapped." + name for name in BLOCK_MATRICES if "blocks.1" in name}


def test_the_summary_counts_shapes_and_reasons():
    summary = split(NanoGPT(), exclude=[r"blocks\.0\.up"]).summary()
    assert summary.splitlines() == [
        "5 matrices on MoFaSGD (2.82k parameters), 12 tensors on AdamW (2.43k parameters)",
        "  rank 4, lr 0.0001, lr of AdamW 0.0001, explore 0, balance 0.0",
        "  MoFaSGD    2 x (16, 16)",
        "  MoFaSGD    2 x (16, 48)",
        "  MoFaSGD    1 x (48, 16)",
        "  AdamW      2 embedding, 896 parameters: wte.weight, wpe.weight",
        "  AdamW      8 not 2-D, 128 parameters: blocks.0.norm.weight, blocks.0.norm.bias, ...",
        "  AdamW      1 excluded by pattern, 768 parameters: blocks.0.up.weight",
        "  AdamW      1 output head, 640 parameters: lm_head.weight",
        "ds_mofa: warning: 53.7 % of the trained parameters are matrices. What AdamW trains has whole gradients, 9.73 kB, "
        "and moments, 19.46 kB, more with fp32 masters",
        "  blocks.0.up.weight, 768 parameters, excluded by pattern: narrow exclude",
        '  wte.weight, 640 parameters, embedding: "include": ["wte.weight"] makes it a matrix',
        '  lm_head.weight, 640 parameters, output head: "include": ["lm_head.weight"] makes it a matrix',
        '  "adamw_states": "8bit" keeps moments in 2.03 bytes a parameter; offload_optimizer keeps them on the host; '
        "frozen parameters have none",
    ]


@pytest.mark.parametrize("width, shown", [(10, "100"), (40, "1.60k"), (1200, "1.44M"), (40000, "1.60B")])
def test_the_summary_s_units(width, shown):
    model = nn.Module()
    with torch.device("meta"):
        model.linear = nn.Linear(width, width, bias=False)
    assert f"({shown} parameters)" in split(model).summary()


def test_a_transposed_stack_says_which_way_its_maps_go():
    """Factors on lr by shape are of (outputs, inputs)."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    config = GptOssConfig(**sizes, vocab_size=40, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    stacks = {m.name.rpartition(".")[2]: m for m in split(GptOssForCausalLM(config)).matrices if m.stack is not None}
    up, down = stacks["gate_up_proj"], stacks["down_proj"]
    assert (up.full_shape, up.shape, up.map_shape) == ((4, 16, 48), (16, 48), (48, 16))
    assert (down.full_shape, down.shape, down.map_shape) == ((4, 24, 16), (24, 16), (16, 24))
