"""A decoder on prompts and answers, fp32 masters, and the rates that a comparison finds best."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from experiments import compare, make_pretrained
from experiments.baselines import state_bytes
from experiments.comparison.masters import keep_masters
from experiments.comparison.optimizers import build
from experiments.comparison.plan import load_plan
from experiments.comparison.rates import best_rates, vertex
from experiments.comparison.tasks.answers import Answers
from launch.encoding import IGNORED
from launch.errors import UserError
from launch.tokenizer import byte_tokenizer
from tests.experiments.comparisons import TRAINING, language_comparison, language_plan, row

CPU = torch.device("cpu")


def answers(folder, **options) -> Answers:
    """The task over a tiny decoder and a few records of different lengths."""
    made = folder / "model"
    if not made.is_dir():
        language_plan(folder).task.model(seed=0).save_pretrained(made)
        byte_tokenizer().save_pretrained(made)
        for split, count in (("en-train", 12), ("en-dev", 5), ("de-train", 4), ("de-dev", 2)):
            records = ({"prompt": f"{i} plus {i}?", "completion": f" {i + i}" * (1 + i)} for i in range(count))
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Answers(pretrained=str(made), data_dir=str(folder), **{"length": 64, "eval_batch_size": 2, **options})


def test_the_loss_is_of_all_answer_tokens_alike(tmp_path):
    task = answers(tmp_path)
    model, held_out = task.model(0).eval(), task.held_out("dev")
    terms, examples = [], []
    for batch in held_out:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
            ids, labels = ids[mask == 1], labels[mask == 1]
            answer = labels != IGNORED
            assert torch.equal(labels[answer], ids[answer]) and ids[-1] == task._tokenizer.eos_token_id
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0].double()
            found = -logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0][answer[1:]]
            terms.append(found)
            examples.append(found.mean())
    measured = task.evaluate(model, held_out, CPU)["loss"]
    assert measured == pytest.approx(torch.cat(terms).mean().item(), rel=1e-5)
    assert measured != pytest.approx(torch.stack(examples).mean().item(), rel=1e-4), "the mean over examples is another"
    assert sum(len(batch["labels"]) for batch in held_out) == 4, "every other one of 5 and of 2"


def test_records_are_chosen_by_the_names_of_their_files_and_by_their_length(tmp_path):
    assert [len(part) for part in answers(tmp_path)._examples] == [16, 7]
    assert [len(part) for part in answers(tmp_path, prefix="de-")._examples] == [4, 2]
    short = answers(tmp_path, length=30)._examples[0]
    assert 2 <= len(short) < 16 and max(len(ids) for ids, _ in short) <= 30
    assert answers(tmp_path).identity() != answers(tmp_path, prefix="de-").identity()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefix": "fr-"}, "no file is called fr-"),
        ({"length": 3}, "0 of 16 records of train have at most 3 tokens"),
    ],
)
def test_what_the_answers_lack_is_said(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        answers(tmp_path, **options).prepare()
    with pytest.raises(UserError, match="no pretrained"):
        Answers(data_dir=str(tmp_path))


@pytest.mark.parametrize("lr", [1e-2, 1e-3])
def test_with_masters_adamw_steps_as_in_fp32_and_rounds_afterwards(lr):
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(5, 3).bfloat16()),
        nn.Parameter(torch.randn(4)),
        nn.Parameter(torch.ones(2).bfloat16()),
    ]
    copies = [nn.Parameter(param.detach().float()) for param in params]
    plain = copy.deepcopy(params)
    ours, reference = torch.optim.AdamW(params, lr=lr), torch.optim.AdamW(copies, lr=lr)
    control = torch.optim.AdamW(plain, lr=lr)
    keep_masters(ours)
    for _ in range(4):
        for param, one, other in zip(params[:2], copies, plain):
            param.grad = torch.randn_like(param)
            one.grad, other.grad = param.grad.float(), param.grad.clone()
        for optimizer in (ours, reference, control):
            optimizer.step()
        assert ours.param_groups[0]["params"] == params, "whoever clips finds the parameters"
    for param, one in zip(params, copies):
        assert torch.equal(param, one.to(param.dtype))
    assert not torch.equal(plain[0], params[0]), "without, bf16 itself is stepped, and another weight comes out"
    assert state_bytes(ours) == 2 * 4 * 19 + 2 * 4 + 4 * 17, (
        "two moments and a step of what had a gradient; masters of what is bf16"
    )


@pytest.mark.parametrize("name", ["Muon", "GaLore", "Fira", "MLorc", "GUM", "SO"])
def test_a_baseline_with_masters_steps_as_in_fp32(name):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in [(12, 16), (16, 12), (12, 12)])).bfloat16()
    wide, plain = copy.deepcopy(model).float(), copy.deepcopy(model)
    options = {"lr": 1e-3, "rank": 4, "include": ["."]}
    optimizers = [
        build(name, one, {**options, "fp32_masters": masters})[1]
        for one, masters in ((model, True), (wide, False), (plain, False))
    ]
    for _ in range(3):
        for params in zip(model.parameters(), wide.parameters(), plain.parameters()):
            gradient = torch.randn(params[0].shape).bfloat16()
            for param in params:
                param.grad = gradient.to(param.dtype)
        for optimizer in optimizers:
            optimizer.step()
    pairs = list(zip(model.parameters(), wide.parameters(), plain.parameters()))
    assert all(torch.equal(param, one.bfloat16()) for param, one, _ in pairs)
    assert not all(torch.equal(param, other) for param, _, other in pairs), "without, bf16 itself is stepped"


def test_masters_of_what_adamw_trains_beside_mofasgd(tmp_path):
    """AdamW's part is stepped as in a model of which that part is fp32; the matrices are not touched by it."""
    model = language_plan(tmp_path).task.model(0).bfloat16()
    options = {"rank": 4, "lr": 1e-4, "adjust_lr_fn": "adamw"}
    weights = {}
    for masters in (True, False):
        own, optimizer = build("MoFaSGD", copy.deepcopy(model), {**options, "fp32_masters": masters}, clips=True)
        for seed in range(3):
            torch.manual_seed(seed)
            ids = torch.randint(0, 256, (2, 8))
            own(input_ids=ids, labels=ids).loss.backward()
            optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
        weights[masters] = own.model.embed_tokens.weight.detach().float()
        matrix = own.model.layers[0].mlp.up_proj.weight
    moved = {key: (weight != model.model.embed_tokens.weight).float().mean() for key, weight in weights.items()}
    assert moved[True] > moved[False], "three steps of 1e-4 add up in a master, and are lost in bf16"
    assert not torch.equal(matrix, model.model.layers[0].mlp.up_proj.weight)


def test_masters_are_refused_where_they_cannot_be(tmp_path):
    model = language_plan(tmp_path).task.model(0)
    with pytest.raises(UserError, match="must be true or false"):
        build("AdamW", model, {"lr": 1e-3, "fp32_masters": "yes"})
    with pytest.raises(UserError, match="leaves no gradients for fp32_masters"):
        build("GaLore", model, {"lr": 1e-3, "rank": 4, "sketched": True, "fp32_masters": True})


def test_vertex():
    rates = [1e-3, 2e-3, 8e-3]
    values = [(math.log(rate) - math.log(3e-3)) ** 2 + 1 for rate in rates]
    assert vertex(rates, values) == pytest.approx(3e-3)
    assert vertex(rates, [1.0, 1.0, 1.0]) == 2e-3


def test_best_rates_are_compared_with_the_controls(tmp_path):
    optimizers = {
        "AdamW": {"lr": [1e-4, 2e-4, 4e-4]},
        "inside": {"optimizer": "MoFaSGD", "rank": 4, "lr": [1e-4, 2e-4, 4e-4]},
        "edge": {"optimizer": "MoFaSGD", "rank": 2, "lr": [2e-4, 4e-4]},
        "waits": {"optimizer": "MoFaSGD", "rank": 3, "lr": [2e-4, 4e-4]},
        "two axes": {"optimizer": "MoFaSGD", "rank": [5, 6], "lr": [2e-4, 4e-4]},
    }
    plan = language_plan(tmp_path, optimizers=optimizers, seeds=[0])
    values = {
        "AdamW": [2.0, 1.8, 1.9],
        "inside": [1.9, 2.0, 2.4],
        "edge": [1.5, 1.0],
        "waits": [1.0],
        "two axes": [1.0] * 4,
    }
    rows = {}
    for label, devs in values.items():
        settings = [setting for setting in plan.settings if setting.label == label]
        for setting, dev in zip(settings, devs):
            run = plan.run(setting, 0)
            rows[run.key] = row(run, dev)
    diverged = plan.run([s for s in plan.settings if s.label == "inside"][2], 0)
    rows[diverged.key] = row(diverged, 0.1, diverged_at=2)
    found = {rate.label: rate for rate in best_rates(plan, rows)}
    assert list(found) == ["AdamW", "inside", "edge"]
    assert found["AdamW"].lr == pytest.approx(2e-4 * 2 ** (1 / 6)) and found["AdamW"].cost == 0
    assert (found["inside"].lr, found["inside"].at_edge) == (1e-4, "<"), "0.1 was of a run that diverged"
    assert found["inside"].cost == pytest.approx(2.0 / 1.9 - 1)
    assert (found["edge"].lr, found["edge"].at_edge, found["edge"].cost) == (4e-4, ">", pytest.approx(0.5))


def test_a_comparison_of_rates_in_miniature(tmp_path, capsys):
    """What the YAMLs of rates do on a GPU: bf16, with and without masters, explore, from a folder; and it goes on."""
    task = answers(tmp_path)
    settings = {"optimizer": "MoFaSGD", "rank": 2, "adjust_lr_fn": "adamw", "fp32_masters": True}
    optimizers = {
        "AdamW": {"lr": [1e-3, 2e-3], "fp32_masters": True},
        "AdamW bf16": {"optimizer": "AdamW", "lr": 1e-3},
        "r=2 explore 2": {**settings, "explore": 2, "lr": [1e-3, 2e-3]},
    }
    where = {"name": "answers", "length": 64}
    training = {**TRAINING, "dtype": "bfloat16"}
    path = language_comparison(tmp_path, task={**where, "pretrained": task.pretrained, "data_dir": task.data_dir},
                               training=training, seeds=[0], optimizers=optimizers)  # fmt: skip
    command = [str(path), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    compare.main(command)
    first = capsys.readouterr().out
    assert "[5/5]" in first
    compare.main(command)
    assert "5 of them done" in capsys.readouterr().out
    plan = load_plan(path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {run.key for run in plan.runs} and len(lines) == 5
    assert all(line["diverged_at"] is None for line in lines)
    at = {line["label"]: line for line in lines if line["options"]["lr"] == 1e-3}
    assert at["AdamW"]["state_bytes"] > at["AdamW bf16"]["state_bytes"]
    assert "| optimizer | best lr | over AdamW's |" in (tmp_path / "out" / "summary.md").read_text()


def test_a_quantised_file_becomes_a_folder(tmp_path, monkeypatch):
    plan = language_plan(tmp_path)
    file = tmp_path / "some.gguf"
    with pytest.raises(UserError, match=r"some.gguf: no such file"):
        make_pretrained.make_pretrained(file, tmp_path / "out")
    file.write_bytes(b"")
    quantised = plan.task.model(0)
    quantised.config.quantization_config = {"quant_method": "gguf"}
    quantised.config.eos_token_id = byte_tokenizer().eos_token_id
    start_is_end = byte_tokenizer()
    start_is_end.eos_token = start_is_end.bos_token
    monkeypatch.setattr(make_pretrained.AutoModelForCausalLM, "from_pretrained", lambda **where: quantised)
    monkeypatch.setattr(make_pretrained.AutoTokenizer, "from_pretrained", lambda **where: start_is_end)
    count = make_pretrained.make_pretrained(file, tmp_path / "out")
    monkeypatch.undo()
    task = dataclasses.replace(plan.task, model_config=None, pretrained=str(tmp_path / "out"))
    model = task.model(0)
    assert count == sum(param.numel() for param in model.parameters())
    for name, weight in quantised.named_parameters():
        assert torch.equal(model.get_parameter(name), weight.bfloat16().float())
    assert task._tokenizer.eos_token == byte_tokenizer().eos_token
