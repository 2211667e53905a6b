"""A prediction beside what HF's and TRL's trainers take: what run they are, and TRL's loss against its own code."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ds_mofa
from ds_mofa.profiler import MemoryCallback, MemoryProfiler, load_report
from ds_mofa.profiler.measure.of_trainer import predict_beside, setting_of
from ds_mofa.profiler.predict import PredictionError, predict
from ds_mofa.profiler.predict.simulated.trl import with_trl_loss
from ds_mofa.profiler.setting import RunSetting, SettingError
from launch.tokenizer import byte_tokenizer

SHAPE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()


def arguments(**others) -> SimpleNamespace:
    given = {"fsdp": [], "world_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": False}
    return SimpleNamespace(**given | {"use_liger_kernel": False} | others)


def test_what_run_it_is(tmp_path):
    one, path = model(), tmp_path / "shape.json"
    optimizer = ds_mofa.MoFaSGD(one, lr=1e-3, rank=4, explore=2)
    found = setting_of(arguments(gradient_checkpointing=True), one, optimizer, path, (2, 32), "trl")
    assert found == RunSetting.of(
        str(path), rank=4, explore=2, micro_batch=2, seq=32, micro_batches=4, checkpointing=True, loss="trl"
    )
    assert RunSetting.parse(str(found)) == found, "which is how it reaches another process"
    assert json.loads(path.read_text())["model_type"] == "llama"
    adamw = torch.optim.AdamW(one.parameters())
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1e3, "overlap_comm": False}
    zero |= {"stage3_prefetch_bucket_size": "auto"}
    deepspeed = SimpleNamespace(config={"zero_optimization": zero, "bf16": {"bf16_optimizer_states": True}})
    found = setting_of(arguments(world_size=2, hf_deepspeed_config=deepspeed), one, adamw, path, (1, 8), "model")
    assert (found.run, found.gpus) == ("zero2:AdamW:states=bf16:offload=optimizer:overlap=0:bucket=1000", 2)
    assert setting_of(arguments(world_size=2), one, adamw, path, (1, 8), "model").backend == "ddp"


def test_what_is_not_predicted_is_said(tmp_path):
    one, path = model(), tmp_path / "shape.json"
    adamw, sgd = torch.optim.AdamW(one.parameters()), torch.optim.SGD(one.parameters())
    for args, trained, optimizer, message in (
        (arguments(fsdp=["full_shard"]), one, adamw, "--backend fsdp2"),
        (arguments(), one, sgd, "SGD is no optimizer that predictions know"),
        (arguments(), model().float(), adamw, "not in bf16"),
        (arguments(), model().requires_grad_(False), adamw, "frozen"),
    ):
        with pytest.raises(SettingError, match=message):
            setting_of(args, trained, optimizer, path, (1, 8), "model")
    with pytest.raises(SettingError, match="with fused_head: only one"):
        RunSetting.of("shape.json", loss="trl", fused_head=True)


def test_trls_loss_is_its_own_code():
    """The model's loss and gradients; its tiles would be nothing without what a CPU computes of them."""
    pytest.importorskip("trl")
    losses, gradients = {}, {}
    ids = torch.arange(512).view(1, 512) % 320
    for name in ("model", "trl", "empty tiles"):
        one = model().float()
        loss = nullcontext(one) if name == "model" else with_trl_loss(one, on_gpu=name != "trl")
        with loss as forward:
            computed = forward(input_ids=ids, labels=ids).loss
            computed.backward()
        losses[name], gradients[name] = computed.item(), one.lm_head.weight.grad
    assert losses["trl"] == pytest.approx(losses["model"], rel=1e-5)
    assert torch.dist(gradients["trl"], gradients["model"]) < 1e-4 * gradients["model"].norm()
    assert losses["empty tiles"] != pytest.approx(losses["model"], rel=1e-2)


def test_trls_loss_is_predicted(tmp_path):
    """By hand, what of it does not scale with tokens: the head's gradient in fp32, and that in bf16."""
    pytest.importorskip("trl")
    path = tmp_path / "shape.json"
    path.write_text(json.dumps({"model_type": "llama", **SHAPE, "vocab_size": 40_000, "num_hidden_layers": 1}))
    found = {loss: predict(RunSetting.of(str(path), rank=4, seq=64, loss=loss)) for loss in ("model", "trl")}
    head = 40_000 * 64
    work = {loss: one["categories"]["workspace"] + one["categories"]["activations"] for loss, one in found.items()}
    assert 6 * head < work["trl"] - 2 * (32 << 20) < 6 * head + 2 * 64 * 32_768 + 10**6
    assert work["model"] > 4 * 2 * 64 * 40_000


def test_a_trl_without_such_a_head_is_named(monkeypatch):
    import trl.trainer.utils

    monkeypatch.delattr(trl.trainer.utils, "add_fused_lm_head")
    with pytest.raises(PredictionError, match=r"TRL 1.16 .*Predict it with loss model"), with_trl_loss(model()):
        pass


def test_a_process_that_fails_leaves_a_reason(tmp_path):
    def refused():
        raise SettingError("no such run")

    assert predict_beside(refused, tmp_path / "a.json") == {"error": "no such run"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_it_stands_beside_what_a_trainer_takes(tmp_path, kind):
    """On a CPU the allocations of the recorded step, without TRL's temporaries of a CPU, are those that are predicted."""
    one = model()
    data = [{"input_ids": list(range(64)), "labels": list(range(64))}] * 8
    profiler = MemoryProfiler(output_dir=tmp_path / "memory").start()
    options = {
        "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "report_to": [], "use_cpu": True, "bf16": True, "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip
    optimizer = ds_mofa.MoFaSGD(one, lr=1e-3, rank=4)
    if kind == "Trainer":
        trainer = Trainer(one, TrainingArguments(**options), train_dataset=data, optimizers=(optimizer, None))
    else:
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        config = trl.SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})
        rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in data])
        trainer = trl.SFTTrainer(
            one, config, train_dataset=rows, processing_class=byte_tokenizer(), optimizers=(optimizer, None)
        )
    trainer.add_callback(MemoryCallback(profiler))
    trainer.train()
    report = load_report(tmp_path / "memory/report.json")
    assert not any("No prediction" in note for note in report["notes"]), report["notes"]
    assert report["predicted"]["setting"]["loss"] == ("model" if kind == "Trainer" else "trl")
    assert (report["predicted"]["setting"]["seq"], report["predicted"]["setting"]["micro_batches"]) == (64, 2)
    traced = report["ranks"][0]["peaks"]["traced"]
    assert report["predicted"]["allocated"] == pytest.approx(traced, rel=0.02 if kind == "Trainer" else 0.15)
