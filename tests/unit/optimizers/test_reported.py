"""Situations that users of other projects have reported, in a plain loop; docs/reported.md is the list.

A test names its report as project#number.
"""

import copy
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from ds_mofa import GaLore, MoFaSGD, OptionError
from tests.unit.dense_reference import relative_error

CAPTURE = pytest.mark.parametrize("capture", ["linear", "hook"])
MATRICES = ["0.weight", "2.weight", "4.weight"]
STEPS = 3


def build(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 6)]
    return nn.Sequential(*layers).to(dtype)


def batch(step=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(24, width, generator=generator, dtype=torch.float64).to(dtype) for width in (12, 6)]


def loss_of(model, step=0, dtype=torch.float64):
    x, y = batch(step, dtype)
    return F.mse_loss(model(x), y)


def optimizer_of(model, cls=MoFaSGD, **options):
    return cls(model, **{"rank": 4, "lr": 2e-3, **options})


def train(model, optimizer, steps=range(STEPS), dtype=torch.float64):
    for step in steps:
        loss_of(model, step, dtype).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def weights_of(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_sketches(optimizer, plain, tolerance=1e-6):
    """The sketches are those of the gradients that autograd has given a plain copy of the model."""
    matrices, params = optimizer.matrices, dict(plain.named_parameters())
    for index, matrix in enumerate(matrices.members):
        Y, Z, _ = matrices.layout.views(matrices.sketches, index)
        U, V, _ = matrices.layout.views(matrices.working, index)
        G = params[matrix.name].grad.double()
        assert relative_error(Y, G @ V.double()) < tolerance, matrix.name
        assert relative_error(Z, G.mT @ U.double()) < tolerance, matrix.name


def with_its_copy(model, **options):
    plain = copy.deepcopy(model)
    return model, plain, optimizer_of(model, **options)


# ---------------------------------------------------------------------- what reaches the sketches


@CAPTURE
def test_a_forward_without_gradients_inside_autocast_leaves_no_cast_behind(capture):
    """pytorch#112583: autocast's cache kept a weight that was cast under no_grad, and the next forward had no graph."""
    model, plain, optimizer = with_its_copy(build(torch.float32), capture=capture)
    for one in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            if one is model:
                with torch.no_grad():
                    loss_of(one, dtype=torch.float32)
            loss = loss_of(one, dtype=torch.float32)
        loss.backward()
    check_sketches(optimizer, plain, tolerance=2e-2)  # bf16's gradients
    assert all(param.grad is not None for name, param in model.named_parameters() if name.endswith("bias"))


@CAPTURE
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_shared_weight_half_of_whose_uses_are_checkpointed(capture, reentrant):
    """pytorch#81296, DeepSpeed#988: the hook on a weight runs once a use, not once a backward."""
    torch.manual_seed(0)
    first, second = nn.Linear(12, 12).double(), nn.Linear(12, 12).double()
    second.weight = first.weight
    model, plain, optimizer = with_its_copy(nn.ModuleList([first, second]), capture=capture)
    for one, other in (model, plain):
        x = batch()[0].requires_grad_()
        x = checkpoint(lambda x, one=one, other=other: one(torch.tanh(other(x))), x, use_reentrant=reentrant)
        other(torch.tanh(x)).square().sum().backward()
    check_sketches(optimizer, plain)


@CAPTURE
def test_losses_that_share_a_graph(capture):
    """pytorch#47260, DeepSpeed#3539: retain_graph; and one backward from several tensors."""
    model, plain, optimizer = with_its_copy(build(), capture=capture)
    for one in (model, plain):
        x, y = batch()
        out = one(x)
        out.square().mean().backward(retain_graph=True)
        F.mse_loss(out, y).backward()
        out = one(x)
        torch.autograd.backward([out.mean(), out[:4]], [torch.tensor(2.0).double(), torch.ones(4, 6).double()])
    check_sketches(optimizer, plain)


@CAPTURE
def test_a_pair_through_two_forwards_and_one_backward(capture):
    """orpo#9: the chosen and the rejected answer, against a frozen copy of the model."""
    model, plain, optimizer = with_its_copy(build(), capture=capture)
    frozen = copy.deepcopy(model).requires_grad_(False)
    for one in (model, plain):
        chosen, rejected = batch(0)[0], batch(1)[0]
        F.softplus(one(rejected).mean() - one(chosen).mean() + frozen(chosen).mean()).backward()
    check_sketches(optimizer, plain)


@CAPTURE
def test_compiled_autograd_runs_the_hooks(capture):
    """pytorch#118435, pytorch#119906: the backward is traced, with what hangs on the accumulation of gradients."""
    model, plain, optimizer = with_its_copy(build(), capture=capture)
    torch._dynamo.reset()
    for step in range(2):
        loss_of(plain, step).backward()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss_of(model, step).backward()
        check_sketches(optimizer, plain)
        before = weights_of(model)
        optimizer.step()
        assert not same(weights_of(model), before)
        optimizer.zero_grad()
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()


def test_several_backwards_of_a_step_under_compiled_autograd_are_refused():
    """It writes .grad as it was when it was traced, so that nobody can tell whether the first was dropped since."""
    model = build()
    _optimizer = optimizer_of(model)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match="one backward a step"):
            loss_of(model).backward()


@CAPTURE
def test_a_model_that_was_compiled_and_used_before_the_optimizer_was_built(capture):
    """pytorch#117758: what is hooked in after the first compilation is ignored."""
    torch._dynamo.reset()
    model = build()
    compiled, plain = torch.compile(model, backend="aot_eager"), copy.deepcopy(model)
    loss_of(compiled).backward()
    model.zero_grad()
    optimizer = optimizer_of(model, capture=capture)
    loss_of(compiled).backward()
    loss_of(plain).backward()
    check_sketches(optimizer, plain)


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("in the middle of a backward")


@CAPTURE
def test_a_batch_whose_backward_ran_out_of_memory_is_skipped(capture):
    """pytorch-lightning#8531: what the half of the backward has left is dropped by zero_grad."""
    model, plain = build(), build()
    optimizer = optimizer_of(model, capture=capture)
    loss_of(model).backward()
    optimizer.zero_grad()
    with pytest.raises(torch.OutOfMemoryError):
        model[3:](Breaks.apply(model[:3](batch()[0]))).square().sum().backward()
    assert optimizer.matrices.sketches.any()  # the last layer's
    optimizer.zero_grad()
    assert same(weights_of(train(model, optimizer)), weights_of(train(plain, optimizer_of(plain, capture=capture))))


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize("cls", [MoFaSGD, GaLore])
def test_micro_batches_make_one_step(cls):
    """GaLore#78, LlamaFactory#5887: an optimizer that works in hooks stepped at every micro-batch."""
    found = []
    for count in (1, 4):
        model = build()
        optimizer = optimizer_of(model, cls)
        for step in range(STEPS):
            for x, y in zip(*(part.chunk(count) for part in batch(step))):
                (F.mse_loss(model(x), y) / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.matrices.steps == STEPS
        found.append(weights_of(model))
    assert all(relative_error(found[1][name], found[0][name]) < 1e-5 for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("swap", [False, True])
def test_a_model_that_is_cast_after_the_optimizer_was_built(dtype, swap):
    """pytorch#7844, pytorch#121158: parameters keep their identity, whichever way torch converts them."""
    cast_after, cast_before = build(torch.float32), build(torch.float32).to(dtype)
    optimizer = optimizer_of(cast_after)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        cast_after.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    train(cast_after, optimizer, dtype=dtype)
    wanted = weights_of(train(cast_before, optimizer_of(cast_before), dtype=dtype))
    start = weights_of(build(torch.float32).to(dtype))
    for name, weight in weights_of(cast_after).items():
        moved = float((wanted[name] - start[name]).double().norm())
        # fp32 sums beside float64 ones; bf16 is rounded at random.
        assert float((weight - wanted[name]).double().norm()) < (1e-4 if dtype == torch.float64 else 0.5) * moved, name


@CAPTURE
def test_an_average_of_the_model(capture):
    """pytorch#110327: AveragedModel copies the model, with whatever stands on its modules."""
    model = build()
    optimizer = optimizer_of(model, capture=capture)
    average, wanted = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)), None
    for step in range(STEPS):
        train(model, optimizer, [step])
        average.update_parameters(model)
        weights = weights_of(model)
        wanted = weights if wanted is None else {name: (w + weights[name]) / 2 for name, w in wanted.items()}
    assert all(relative_error(average.module.get_parameter(name), w) < 1e-6 for name, w in wanted.items())
    loss_of(average).backward()
    assert not optimizer.matrices.sketches.any()
    assert all(param.grad is not None for param in average.module.parameters())


@pytest.mark.parametrize("zero_first", [False, True])
def test_zero_grad_within_accelerate_s_accumulation(zero_first):
    """accelerate#1299, accelerate#616: called first in the block, it drops all micro-batches but the last."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, plain = build(), build()
    ours, reference = accelerator.prepare(optimizer_of(model)), optimizer_of(plain)
    for step in range(2 * STEPS):
        with accelerator.accumulate(model):
            if zero_first:
                ours.zero_grad()
            accelerator.backward(loss_of(model, step))
            ours.step()
            if not zero_first:
                ours.zero_grad()
        if step % 2 or not zero_first:
            (loss_of(plain, step) / 2).backward()
        if step % 2:
            reference.step()
            reference.zero_grad()
    assert same(weights_of(model), weights_of(plain))


def test_a_learning_rate_that_is_a_tensor():
    """pytorch#139575: refused by name when the optimizer is built, taken in its groups."""
    with pytest.raises(OptionError, match="lr=tensor.*must be a number"):
        optimizer_of(build(), lr=torch.tensor(2e-3))
    found = []
    for lr in (2e-3, torch.tensor(2e-3, dtype=torch.float64)):
        model = build()
        optimizer = optimizer_of(model)
        for group in optimizer.param_groups:
            group["lr"] = lr.clone() if isinstance(lr, torch.Tensor) else lr
        schedule = ExponentialLR(optimizer, 0.5)
        for step in range(STEPS):
            train(model, optimizer, [step])
            schedule.step()
        found.append(weights_of(model))
    assert all(relative_error(found[1][name], found[0][name]) < 1e-9 for name in found[0])


# ---------------------------------------------------------------------- states


def test_accelerate_saves_and_resumes_bit_for_bit(tmp_path):
    """pytorch_optimizer#237, ms-swift#10161: states that a wrapper or a safe load could not take over."""

    def prepared(lr):
        AcceleratorState._reset_state(True)
        accelerator, model = Accelerator(cpu=True), build()
        optimizer = optimizer_of(model, lr=lr)
        return accelerator, accelerator.prepare(model, optimizer, ExponentialLR(optimizer, 0.9))

    def run(parts, steps):
        model, optimizer, schedule = parts
        for step in steps:
            loss_of(model, step).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return weights_of(model)

    accelerator, parts = prepared(lr=2e-3)
    run(parts, range(STEPS))
    accelerator.save_state(tmp_path)
    whole = run(parts, range(STEPS, 2 * STEPS))
    accelerator, parts = prepared(lr=1e-3)
    accelerator.load_state(tmp_path)
    assert same(run(parts, range(STEPS, 2 * STEPS)), whole)


def test_a_tied_matrix_is_saved_once_and_loads(tmp_path):
    """transformers#38870, transformers#30202: safetensors with tied weights."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    optimizer = optimizer_of(model, include=["embed_tokens"])
    tokens = torch.randint(0, 40, (2, 8))
    before = model.lm_head.weight.detach().clone()
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.lm_head.weight is model.model.embed_tokens.weight and not torch.equal(model.lm_head.weight, before)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


# ---------------------------------------------------------------------- around the optimizer


def assign(model):
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)


def new_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def new_module(model):
    model[0] = nn.Linear(12, 16).double()


def adapters(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), model)


@pytest.mark.parametrize("change", [assign, new_parameter, new_module, adapters])
def test_parameters_that_came_after_the_optimizer_are_named(change: Callable, caplog):
    """transformers#3532, pytorch#121158, adapters#260: new parameters are in no group, and do not learn."""
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    known = {id(param) for param in model.parameters()}
    change(model)
    new = {name: param for name, param in model.named_parameters() if id(param) not in known and param.requires_grad}
    before = {name: param.detach().clone() for name, param in new.items()}
    said = ""
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        try:
            train(model, optimizer)
        except (OptionError, RuntimeError) as error:
            said = str(error)
    said += caplog.text + "".join(str(warning.message) for warning in warned)
    assert any(name in said for name in new) or all(not torch.equal(new[name], before[name]) for name in new)


class TwoPoints(torch.optim.Optimizer):
    """The scheme of sharpness-aware minimization: step uphill, take the gradient there, step from where it began."""

    def __init__(self, base, radius=0.05):
        super().__init__(base.param_groups, {})
        self.base, self.radius = base, radius

    @torch.no_grad()
    def uphill(self):
        self.kept = {p: p.clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        norm = torch.stack([param.grad.norm() for param in self.kept]).norm()
        for param in self.kept:
            param.add_(param.grad * (self.radius / norm))
        self.zero_grad()

    @torch.no_grad()
    def downhill(self):
        for param, weight in self.kept.items():
            param.copy_(weight)
        self.base.step()


def test_sharpness_aware_minimization_is_right_or_refused():
    """pytorch_optimizer#66, sam#31: a wrapper that reads and clears ``.grad`` itself."""
    model, plain = build(), build()
    ours, theirs = TwoPoints(optimizer_of(model)), TwoPoints(torch.optim.SGD(plain.parameters(), lr=0.0))
    for one, optimizer in ((model, ours), (plain, theirs)):
        loss_of(one).backward()
        try:
            optimizer.uphill()
        except (RuntimeError, TypeError) as error:
            assert "MoFaSGD" in str(error)
            return
        loss_of(one).backward()
    check_sketches(ours.base, plain)


def test_weights_that_were_loaded_between_steps_stay():
    """miles#2572, megablocks#80: the fp32 masters are stale after the weights were restored."""
    model = build(torch.bfloat16)
    optimizer = optimizer_of(model, master_weights=True)
    first = weights_of(train(model, optimizer, [0], torch.bfloat16))
    train(model, optimizer, range(1, 30), torch.bfloat16)
    far = {name: float((model.get_parameter(name).detach() - first[name]).float().norm()) for name in MATRICES}
    model.load_state_dict(first)
    train(model, optimizer, [30], torch.bfloat16)
    for name in MATRICES:
        assert float((model.get_parameter(name).detach() - first[name]).float().norm()) < 0.2 * far[name]


def test_masters_of_a_model_that_is_cast_after_the_optimizer_was_built():
    """pytorch#7844: as above, with ``master_weights``."""
    model = build(torch.float32)
    optimizer = optimizer_of(model, master_weights=True)
    train(model.to(torch.bfloat16), optimizer, dtype=torch.bfloat16)
    assert sorted(optimizer.matrices.masters.state_dict()) == MATRICES


def test_groups_that_a_wrapper_has_kept_stay_those_of_the_optimizer():
    """apex#766, pytorch_optimizer#237: the learning rate of a kept group reaches one half of the model."""
    model = build()
    optimizer = optimizer_of(model)
    kept = optimizer.param_groups
    train(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in kept:
        group["lr"] = 0.0
    assert {group["lr"] for group in optimizer.param_groups} in ({0.0}, {1e-2})


def test_a_state_kept_in_memory_is_of_one_moment():
    """pytorch#35047: a state that goes on changing while the training does."""
    model = build()
    optimizer = optimizer_of(model)
    start = weights_of(train(model, optimizer))
    state = optimizer.state_dict()
    whole = weights_of(train(model, optimizer, range(STEPS, 2 * STEPS)))
    model.load_state_dict(start)
    optimizer.load_state_dict(state)
    assert same(weights_of(train(model, optimizer, range(STEPS, 2 * STEPS))), whole)


def test_asking_for_the_state_by_torch_s_checkpoints_changes_nothing():
    """pytorch#164929, torchtitan#4382: get_optimizer_state_dict modifies the optimizer."""
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    get_optimizer_state_dict(model, optimizer)
    after = optimizer.state_dict()
    assert all(param.grad is None for param in model.parameters())
    assert before["state"].keys() == after["state"].keys()
    for index, one in before["state"].items():
        assert same(one, after["state"][index])


def test_hooks_on_states_are_called():
    """pytorch#105953: hooks around state_dict and load_state_dict."""
    optimizer, called = optimizer_of(build()), []
    for kind in ("state_dict", "load_state_dict"):
        for when in ("pre", "post"):
            register = getattr(optimizer, f"register_{kind}_{when}_hook")
            register(lambda *args, name=f"{kind} {when}": called.append(name))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["state_dict pre", "state_dict post", "load_state_dict pre", "load_state_dict post"]
