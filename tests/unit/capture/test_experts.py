"""The capture of stacked experts: the sketches of the gradients that autograd computes, and no gradient."""

import copy
import types
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import use_experts_implementation

from ds_mofa import MoFaSGD
from ds_mofa.capture.attach import attach
from ds_mofa.capture.grouped import Permuted
from ds_mofa.capture.sketch import Sketch
from ds_mofa.options import OptionError, Options
from ds_mofa.parameters import split_parameters
from tests.unit.dense_reference import relative_error

COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
)
OF_DEEPSEEK = dict(n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8)
CONFIGS = {
    "mixtral": MixtralConfig(**COMMON, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2),
    "qwen3": Qwen3MoeConfig(
        **COMMON, intermediate_size=48, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, head_dim=8
    ),
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=24, num_experts=8, num_experts_per_tok=2),
    "deepseek": DeepseekV3Config(
        **COMMON,
        **OF_DEEPSEEK,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "gpt-oss": GptOssConfig(
        **COMMON, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, head_dim=8, sliding_window=16
    ),
}
OTHERS = {  # with a forward of their own
    "jetmoe": JetMoeConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    ),
    "llama4": Llama4TextConfig(
        **COMMON,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        interleave_moe_layer_step=1,
    ),
    "aria": AriaTextConfig(**COMMON, intermediate_size=24, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
}
RANK = 4


def model_of(kind, dtype=torch.float64, **more):
    torch.manual_seed(0)
    config = copy.deepcopy({**CONFIGS, **OTHERS}[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **more)
    if kind in CONFIGS:
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" not in name:
                param.normal_(0, 0.02 if "bias" in name else 0.1)
    return model.to(dtype)


def ids(seed=0, *shape):
    return torch.randint(3, 96, shape or (2, 24), generator=torch.Generator().manual_seed(seed))


def captured(model, **options):
    """A copy that nothing is attached to, the stacks with their sketches, and the attachment of all matrices."""
    plain = copy.deepcopy(model)
    divided = split_parameters(model, model.parameters(), Options(rank=RANK, **options))
    generator = torch.Generator().manual_seed(0)
    sketches = []
    for matrix in divided.matrices:
        stack, dtype = () if matrix.stack is None else (matrix.stack,), matrix.param.dtype
        sums = [
            torch.zeros(*stack, rows, RANK, dtype=torch.promote_types(dtype, torch.float32)) for rows in matrix.shape
        ]
        draws = [torch.randn(*stack, rows, RANK, generator=generator).to(dtype) for rows in matrix.shape]
        sketches.append(Sketch(*sums, *draws))
    attachment = attach(divided.matrices, sketches, "linear")
    stacks = {m.name: sketch for m, sketch in zip(divided.matrices, sketches) if m.stack is not None}
    return plain, stacks, attachment


def check(stacks, plain, tolerance, model=None):
    for name, sketch in stacks.items():
        G = plain.get_parameter(name).grad.double()
        assert relative_error(sketch.Y, G @ sketch.V.double()) < tolerance, name
        assert relative_error(sketch.Z, G.mT @ sketch.U.double()) < tolerance, name
        assert torch.equal(sketch.Y.flatten(1).any(1), G.flatten(1).any(1)), "an expert without tokens is not zero"
    for name, param in model.named_parameters() if model is not None else ():
        if param.grad is not None:
            assert relative_error(param.grad, plain.get_parameter(name).grad.double()) < 4 * tolerance, name


@pytest.fixture
def no_gradients():
    """Within: no gradient of a stack may be formed."""
    sketched = Sketch.add_gradient

    def add_gradient(self, grad):
        assert grad.dim() == 2, "the gradient of a stack was formed"
        sketched(self, grad)

    with mock.patch.object(Sketch, "add_gradient", add_gradient):
        yield


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_sketches_are_those_of_the_dense_gradient(kind, dtype, tolerance, no_gradients):
    model = model_of(kind, dtype)
    if dtype == torch.bfloat16:  # transformers' grouped products round as ours do
        model.set_experts_implementation("grouped_mm")
    plain, stacks, _ = captured(model)
    assert len(stacks) == (2 if kind == "deepseek" else 4)
    for seed in range(2):
        losses = [one(input_ids=ids(seed), labels=ids(seed)).loss for one in (model, plain)]
        torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
        for loss in losses:
            loss.backward()
    check(stacks, plain, tolerance, None if dtype == torch.bfloat16 else model)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("kind", OTHERS)
def test_those_with_a_forward_of_their_own(kind, checkpointed, no_gradients):
    model = model_of(kind, torch.float64)
    plain, stacks, _ = captured(model)
    # Llama 4's router weighs with zero what it does not choose, and JetMoe has a stack in attention too.
    assert len(stacks) == {"jetmoe": 8, "llama4": 4, "aria": 4}[kind]
    if checkpointed and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for one in (model.train(), plain.train()):
        loss = one(input_ids=ids(), labels=ids(), use_cache=False).loss
        loss.backward()
    check(stacks, plain, 1e-12, model)
    assert split_parameters(model, model.parameters(), Options(rank=RANK)).share > 0.8


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["", "checkpointed", "reentrant"])
def test_whatever_is_chosen_and_checkpointed(implementation, reentrant, no_gradients):
    model = model_of("qwen3", torch.float32)
    model.set_experts_implementation(implementation)
    plain, stacks, _ = captured(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one in (model.train(), plain.train()):
        one(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    check(stacks, plain, 2e-6, model)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", ""])
def test_every_kind_of_module(gate, bias, transposed, no_gradients):
    model = experts_of(gate=gate, bias=bias, transposed=transposed).double()
    plain, stacks, _ = captured(model)
    assert len(stacks) == 2
    outs = []
    for one in (model, plain):
        x, top, weights = inputs()
        one(x, top, weights).square().sum().backward()
        outs.append((x.grad, weights.grad))
    for mine, other in zip(*outs):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    check(stacks, plain, 1e-13, model)


class Config:
    """What an experts module reads of a model's."""

    _experts_implementation = "eager"


class _Experts(nn.Module):
    def __init__(self, config, gate, bias, transposed, E=5, wide=7, inner=6):
        super().__init__()
        self.num_experts, self.act_fn = E, torch.tanh
        up, down = (2 * inner if gate else inner, wide), (wide, inner)
        self.first = "gate_up_proj" if gate else "up_proj"
        for name, (out, into) in ((self.first, up), ("down_proj", down)):
            shape = (into, out) if transposed else (out, into)
            setattr(self, name, nn.Parameter(torch.randn(E, *shape)))
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, out)))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, place = torch.where(top_k_index == e)
            x = self._product(self.first, e, hidden_states[token])
            x = self._product("down_proj", e, self._apply_gate(x) if self.has_gate else self.act_fn(x))
            out = out.index_add(0, token, x * top_k_weights[token, place, None])
        return out

    def _product(self, name, e, x):
        weight = getattr(self, name)[e]
        y = x @ (weight if self.is_transposed else weight.mT)
        return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y


def experts_of(gate, bias, transposed):
    kind = type("MyExperts", (_Experts,), {"forward": _Experts.forward, "__init__": _Experts.__init__})
    decorated = use_experts_implementation(kind, has_gate=gate, has_bias=bias, is_transposed=transposed)
    torch.manual_seed(0)
    return decorated(Config(), gate, bias, transposed)


def inputs(tokens=11, k=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    top = torch.stack([torch.randperm(4, generator=generator)[:k] for _ in range(tokens)])  # the fifth gets none
    return x, top, torch.rand(tokens, k, generator=generator, dtype=torch.float64, requires_grad=True)


def test_the_backward_of_a_permutation_is_its_inverse():
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: Permuted.apply(x, order, order.argsort()), [x])
    assert torch.equal(Permuted.apply(x, order, order.argsort()), x[order])


def test_without_gradients_and_in_a_copy_the_model_is_what_it_was():
    model = model_of("mixtral", torch.float32)
    plain, stacks, attachment = captured(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, plain(ids()).logits)
    for one in (twin, plain):
        one(input_ids=ids(), labels=ids()).loss.backward()
    assert all(torch.equal(mine.grad, other.grad) for mine, other in zip(twin.parameters(), plain.parameters()))
    assert not any(sketch.Y.any() for sketch in stacks.values())
    attachment.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_one_of_two_stacks_may_be_adamws(no_gradients):
    model = model_of("mixtral", torch.float64)
    plain, stacks, _ = captured(model, exclude=("gate_up_proj",))
    for one in (model, plain):
        one(input_ids=ids(), labels=ids()).loss.backward()
    check(stacks, plain, 1e-13, model)
    assert len(stacks) == 2 and model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").grad is not None


def test_a_gradient_that_is_asked_for_is_computed():
    model = model_of("mixtral")
    plain, stacks, _ = captured(model)
    name = "model.layers.1.mlp.experts.down_proj"
    wanted = [
        torch.autograd.grad(one(input_ids=ids(), labels=ids()).loss, one.get_parameter(name))[0]
        for one in (model, plain)
    ]
    torch.testing.assert_close(*wanted, rtol=1e-12, atol=1e-15)
    assert not any(sketch.Y.any() for sketch in stacks.values())


def test_backward_keeps_no_view_of_a_stack():
    """The memory of a view is what ZeRO-3 and FSDP2 could not release."""
    model = model_of("qwen3", torch.float32)
    captured(model)
    stacks = {p.untyped_storage().data_ptr(): p for p in model.parameters() if p.dim() == 3}
    kept = []

    def pack(tensor):
        param = stacks.get(tensor.untyped_storage().data_ptr())
        kept.append(param is None or tensor is param or tensor.data_ptr() == param.data_ptr() and tensor._base is None)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids(), labels=ids())
    assert all(kept) and len(kept) > 20


def test_under_autocast_products_are_in_16_bits(no_gradients):
    model = model_of("mixtral", torch.float32)
    plain, stacks, _ = captured(model)
    for one in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(input_ids=ids(), labels=ids()).loss
        loss.backward()
    check(stacks, plain, 3e-2)
    assert all(sketch.Y.dtype == torch.float32 for sketch in stacks.values())


@pytest.mark.filterwarnings("ignore")
def test_under_torch_compile_a_graph_sketches(no_gradients):
    model = experts_of(gate=True, bias=False, transposed=False).double()
    plain, stacks, _ = captured(model)
    compiled = torch.compile(model, backend="aot_eager")
    for one in (compiled, plain):
        x, top, weights = inputs()
        one(x, top, weights).square().sum().backward()
    check(stacks, plain, 1e-13, model)


def test_an_expert_that_no_token_goes_to_stays_bit_for_bit():
    torch.manual_seed(0)
    model = experts_of(gate=True, bias=False, transposed=False)
    optimizer = MoFaSGD(model, lr=0.01, adjust_lr_fn="adamw", rank=RANK, weight_decay=0.1)
    before = copy.deepcopy(model)
    for _ in range(4):
        x, top, weights = (one.float() if one.is_floating_point() else one for one in inputs())
        model(x, top, weights).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, param in model.named_parameters():
        same = (param == before.get_parameter(name)).flatten(1).all(1)
        assert same.tolist() == [False] * 4 + [True], name


def test_experts_that_cannot_be_trained_right_are_refused_by_name():
    model = nn.ModuleDict({"mlp": experts_of(gate=True, bias=False, transposed=False), "out": nn.Linear(8, 8)})
    model.mlp.num_experts = 10
    with pytest.raises(
        OptionError, match=r"mlp.gate_up_proj holds 5 of the 10 experts: expert parallelism is not served"
    ):
        MoFaSGD(model, rank=RANK)
    model.mlp.down_proj = nn.Parameter(torch.zeros(5, 7, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(OptionError, match=r"the experts of 'mlp' are quantised .*Mxfp4Config\(dequantize=True\)"):
        MoFaSGD(model, rank=RANK)


@pytest.mark.parametrize("by", ["instance", "class"])
def test_experts_that_liger_kernel_computes_are_refused(by):
    """Its forward stands in a module that was there, and its class in a model that was built after it was applied."""

    class LigerExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(4, 16, 8)), nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    LigerExperts.forward.__module__ = "liger_kernel.transformers.swiglu"
    model = model_of("qwen3", torch.float32)
    mlp = model.model.layers[1].mlp
    if by == "class":
        mlp.experts = LigerExperts()
    else:
        mlp.experts.forward = types.MethodType(LigerExperts.forward, mlp.experts)
    with pytest.raises(OptionError, match=r"'model.layers.1.mlp.experts' .* liger-kernel, .*\{\"swiglu\": false\}"):
        MoFaSGD(model, rank=RANK)


@pytest.mark.parametrize("ours", [True, False], ids=["by a kernel", "by a wrapper"])
def test_a_block_that_computes_its_experts_itself_is_refused(ours, monkeypatch):
    model = model_of("gpt-oss", torch.float32)
    block = model.model.layers[1].mlp
    monkeypatch.setattr(
        type(block), "kernel_layer_name", "MegaBlocksMoeMLP", raising=False
    )  # as the package kernels does
    before = block.forward
    block.forward = lambda *args: before(*args)
    if not ours:
        block._old_forward = before  # as Accelerate's hooks leave it
        assert MoFaSGD(model, rank=RANK).split.share > 0.5
        return
    with pytest.raises(
        OptionError, match=r"'model.layers.1.mlp' computes its experts by the kernel 'MegaBlocksMoeMLP'"
    ):
        MoFaSGD(model, rank=RANK)


def test_a_stack_that_include_names_goes_by_the_hook():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.out = nn.Parameter(torch.randn(3, 8, 6)), nn.Linear(6, 6)

        def forward(self, x):
            return self.out(torch.einsum("ti,eij->tj", x, self.kernel))

    torch.manual_seed(0)
    model = Blocks().double()
    assert (
        "3-D in Blocks, of no known experts" in split_parameters(model, model.parameters(), Options(rank=4)).summary()
    )
    plain, stacks, _ = captured(model, include=("kernel",))
    for one in (model, plain):
        one(
            torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        ).square().sum().backward()
    check(stacks, plain, 1e-13)
    assert list(stacks) == ["kernel"] and model.kernel.grad is None
