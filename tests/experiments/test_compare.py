"""A comparison varies one thing, and loses nothing to an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from experiments import compare
from experiments.comparison import training
from experiments.comparison.digests import Digest
from experiments.comparison.isolation import in_own_process, in_own_processes, start_method
from experiments.comparison.optimizers import clip_gradients
from experiments.comparison.plan import Training, load_plan
from experiments.comparison.results import Results
from experiments.comparison.tasks.base import shuffled
from experiments.comparison.training import rate, train
from launch.errors import UserError
from tests.experiments.comparisons import TRAINING, language_comparison, language_plan, row

ROOT = Path(__file__).resolve().parents[2]
# What time and the machine decide; everything else of a row, the seed does.
MEASURED = ("seconds", "compiling_seconds", "units_per_second", "peak_resident", "environment")


def test_an_epoch_has_every_example_once_and_no_batch_is_short():
    batches = list(islice(shuffled(10, 4, seed=3), 5))
    flat = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert flat == [index for batch in islice(shuffled(10, 4, seed=3), 5) for index in batch]
    assert flat != [index for batch in islice(shuffled(10, 4, seed=4), 5) for index in batch]


def test_every_optimizer_starts_from_the_same_weights_and_sees_the_same_batches_in_the_same_order(tmp_path):
    optimizers = {"AdamW": {"lr": 1e-3}, "MoFaSGD": {"lr": 1e-3, "rank": 4}, "LoRA": {"lr": 1e-3, "rank": 2}}
    plan = language_plan(tmp_path, optimizers=optimizers)
    rows = {run.key: train(run, plan.task, "cpu") for run in plan.runs}
    for seed in plan.seeds:
        controls = [rows[run.key]["control"] for run in plan.runs if run.seed == seed]
        assert controls[0] == controls[1] == controls[2]
        fed = Digest(islice(plan.task.batches(seed, plan.training.batch_size), plan.training.steps))
        assert controls[0]["batches"] == str(fed)
        first = {rows[run.key]["train_loss"][0] for run in plan.runs if run.seed == seed}
        assert len(first) == 1, "an adapter starts as the identity, and dropout is of the seed"
    one, other = (rows[plan.run(plan.settings[0], seed).key]["control"] for seed in plan.seeds)
    assert one["weights"] != other["weights"] and one["batches"] != other["batches"]
    assert one["held out"] == other["held out"]


class Gambler(torch.optim.SGD):
    """Leaves the weights alone, and draws from the generator that dropout draws from."""

    draws = 0

    def step(self, closure=None):
        torch.rand(self.draws)


def test_an_optimizer_that_draws_random_numbers_does_not_change_dropout(tmp_path, monkeypatch):
    plan = language_plan(tmp_path)
    monkeypatch.setattr(
        training, "build", lambda name, model, *rest, **more: (model, Gambler(model.parameters(), lr=0.0))
    )
    monkeypatch.setattr(training, "state_bytes", lambda optimizer: 0)
    quiet = train(plan.runs[0], plan.task, "cpu")["train_loss"]
    monkeypatch.setattr(Gambler, "draws", 5)
    assert train(plan.runs[0], plan.task, "cpu")["train_loss"] == quiet
    model = plan.task.model(0).train()
    batch = next(plan.task.batches(0, 2))
    assert model(**batch).loss != model(**batch).loss, "there is no dropout, so nothing was tested"


@pytest.mark.parametrize("setting", [0, 1], ids=["AdamW", "MoFaSGD"])
def test_two_runs_of_a_seed_are_bitwise_equal(tmp_path, setting):
    plan = language_plan(tmp_path)
    first, second = (train(plan.run(plan.settings[setting], 0), plan.task, "cpu") for _ in range(2))
    for entry in (*first["evaluations"], *second["evaluations"]):
        del entry["seconds"]
    assert {k: v for k, v in first.items() if k not in MEASURED} == {
        k: v for k, v in second.items() if k not in MEASURED
    }
    assert first["train_loss"] != train(plan.run(plan.settings[setting], 1), plan.task, "cpu")["train_loss"]


def test_gradients_are_clipped_by_the_optimizers_own_method_if_it_has_one():
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.full((2, 2), 3.0)
    asked = []
    clip_gradients(model, types.SimpleNamespace(clip_grad_norm_=asked.append), 0.5)
    assert asked == [0.5] and model.weight.grad.norm() == 6
    clip_gradients(model, torch.optim.SGD(model.parameters()), 0.5)
    assert model.weight.grad.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_weights_in_bf16_start_from_the_same_ones(tmp_path):
    for_dtype = {
        dtype: language_plan(tmp_path, training=TRAINING | {"dtype": dtype}, seeds=[0])
        for dtype in ("float32", "bfloat16")
    }
    full, half = (train(plan.runs[1], plan.task, "cpu") for plan in for_dtype.values())
    assert full["control"] == half["control"]
    assert half["train_loss"][0] == pytest.approx(full["train_loss"][0], rel=0.01)
    assert half["train_loss"] != full["train_loss"]


def test_the_rate_warms_up_and_ends_by_the_schedule():
    options = {"steps": 12, "batch_size": 1, "eval_every": 1, "warmup_steps": 2}
    linear, cosine, constant = (Training(**options, schedule=name) for name in ("linear", "cosine", "constant"))
    for training_ in (linear, cosine, constant):
        assert [rate(training_, step) for step in (0, 1, 2)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [rate(linear, step) for step in (7, 11, 12)] == pytest.approx([0.5, 0.1, 0])
    assert [rate(cosine, step) for step in (7, 12)] == pytest.approx([0.5, 0])
    assert rate(constant, 11) == 1


@pytest.mark.parametrize("name", ["AdamW", "GaLore"])  # a NaN in the loss, and an SVD that raises on one
def test_a_run_that_diverges_stops_and_says_where(tmp_path, name):
    steps = TRAINING | {"steps": 40, "max_grad_norm": None, "warmup_steps": 0}
    options = {"lr": 1e30, **({"rank": 4, "refresh_every": 1} if name == "GaLore" else {})}
    plan = language_plan(tmp_path, training=steps, optimizers={name: options})
    result = train(plan.runs[0], plan.task, "cpu")
    assert 0 < result["diverged_at"] < 40 and result["test"] is None
    assert len(result["train_loss"]) < 40
    json.dumps(result, allow_nan=False)


def test_a_half_written_line_is_not_a_run(tmp_path):
    plan, file = language_plan(tmp_path), tmp_path / "results.jsonl"
    with Results(file) as results:
        results.append(row(plan.runs[0], 1.0))
        results.append(row(plan.runs[1], 2.0))
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with Results(file) as results:
        assert set(results.rows) == {plan.runs[0].key}
        results.append(row(plan.runs[1], 2.0))
    assert file.read_bytes() == whole


def test_a_line_that_is_no_row_is_named(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps({"key": "a", "seed": 0, "evaluations": []}) + "\n{}\n")
    with pytest.raises(UserError, match=r"results.jsonl, line 2: not the result of a run"):
        Results(file)


def test_two_comparisons_do_not_write_to_one_file(tmp_path):
    with Results(tmp_path / "results.jsonl"), pytest.raises(UserError, match="another comparison is writing"):
        Results(tmp_path / "results.jsonl")
    with Results(tmp_path / "results.jsonl"):
        pass


def test_the_process_of_a_run_that_ends_early_is_an_error_that_says_so():
    with pytest.raises(UserError, match="ended without a result .exit code 1"):
        in_own_process(sys.exit, device="cpu")


def _hang_or_fail(place: int, folder: str, device: str) -> None:
    """The second call fails once the first is there, which would go on for ever."""
    own = Path(folder) / str(place)
    own.write_text(str(os.getpid()))
    if place == 0:
        time.sleep(600)
    while not (Path(folder) / "0").is_file():
        time.sleep(0.01)
    raise UserError("refused")


def gone(file: Path) -> bool:
    """Whether the process that a file names ends soon."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(int(file.read_text()), 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_an_error_in_one_process_ends_the_others(tmp_path):
    with pytest.raises(UserError, match="^refused$"):
        list(in_own_processes(_hang_or_fail, [(0, str(tmp_path)), (1, str(tmp_path))], device="cpu", jobs=2))
    assert gone(tmp_path / "0")


def test_without_a_gpu_that_a_fork_can_use_processes_are_started_anew_and_that_is_said(capsys):
    assert start_method("cpu") == "forkserver"
    start_method.cache_clear()
    assert start_method("cuda:99") == "spawn"
    assert "so each run imports everything anew" in capsys.readouterr().out


@pytest.mark.slow
def test_several_runs_at_once_are_those_of_one_at_a_time_and_end_together(tmp_path, monkeypatch, capsys):
    path, out = language_comparison(tmp_path), tmp_path / "out"
    words = [str(path), "--output_dir", str(out), "--device", "cpu", "--jobs", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(compare, "outcome", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit, match="143"):
            compare.main(words)
    servers = psutil.Process().children()
    assert not [process for server in servers for process in server.children()], "a run that no one waits for"
    assert "6 runs, 0 of them done, on cpu, 2 at a time" in capsys.readouterr().out
    compare.main(words)
    printed = capsys.readouterr().out
    assert "6 runs, 1 of them done, on cpu, 2 at a time" in printed and "[5/5]" in printed
    rows = {row["key"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    plan = load_plan(path)
    for run in plan.runs:
        alone = train(run, plan.task, "cpu")
        for entry in (*alone["evaluations"], *rows[run.key]["evaluations"]):
            del entry["seconds"]
        assert all(rows[run.key][name] == alone[name] for name in set(alone) - set(MEASURED)), str(run)
    assert "tokens/s, shared" in printed and "Up to 2 runs shared the device" in printed
    assert "seconds of training after the second step, up to 2 runs at once" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_kept_model_is_what_another_comparison_starts_from(tmp_path, capsys):
    optimizers = {"AdamW": {"lr": 1e-3}, "LoRA": {"lr": 1e-2, "rank": 2}}
    path, out = language_comparison(tmp_path, seeds=[0], optimizers=optimizers), tmp_path / "out"
    words = [str(path), "--output_dir", str(out), "--device", "cpu"]
    compare.main(words)
    lines = (out / "results.jsonl").read_text().splitlines()
    compare.main([*words, "--keep_models", "AdamW", "LoRA"])
    kept = [out / "models" / name for name in ("AdamW-seed-0", "LoRA-seed-0")]
    printed = capsys.readouterr().out
    assert "2 runs, 0 of them done" in printed and f"models: {kept[0]}, {kept[1]}" in printed
    made_again = (out / "results.jsonl").read_text().splitlines()[2:]
    assert [json.loads(line)["test"] for line in made_again] == [json.loads(line)["test"] for line in lines]
    compare.main([*words, "--keep_models", "AdamW"])
    assert "2 runs, 2 of them done" in capsys.readouterr().out
    with pytest.raises(UserError, match="--keep_models: the YAML has no 'AdamV'; did you mean 'AdamW'"):
        compare.main([*words, "--keep_models", "AdamV"])
    content = yaml.safe_load(path.read_text())
    del content["task"]["model_config"]
    path.write_text(yaml.safe_dump(content))
    for folder, line in zip(kept, lines):
        plan = load_plan(path, pretrained=str(folder))
        (run, *_), task = plan.runs, plan.task
        started = task.evaluate(task.model(0), task.held_out("test"), torch.device("cpu"))
        assert started["loss"] == pytest.approx(json.loads(line)["test"]["loss"], rel=1e-5)
    assert load_plan(path, pretrained=str(kept[0])).runs[0].key != run.key
    moved = kept[1].rename(tmp_path / "moved")
    assert load_plan(path, pretrained=str(moved)).runs[0].key == run.key, "its content decides, not its place"


@pytest.mark.slow
def test_a_killed_comparison_goes_on(tmp_path, capsys):
    plan, out = language_comparison(tmp_path), tmp_path / "out"
    words = [str(plan), "--output_dir", str(out), "--device", "cpu"]
    # A comparison needs neither DeepSpeed nor TRL nor datasets: here they cannot be imported.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules |= dict.fromkeys(['deepspeed', 'trl', 'datasets'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    script = [sys.executable, str(ROOT / "experiments/compare.py"), *words]
    command = subprocess.Popen(script, stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 240
    while not ((out / "results.jsonl").is_file() and (out / "results.jsonl").read_bytes().count(b"\n")):
        assert command.poll() is None and time.monotonic() < deadline, "no first run"
        time.sleep(0.02)
    orphans = psutil.Process(command.pid).children(recursive=True)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    assert not psutil.wait_procs(orphans, timeout=20)[1], "a run that no one waits for"
    before = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(before + before[:50])
    done = before.count(b"\n")
    assert done < 6, "it was not killed in the middle"
    compare.main(words)
    printed = capsys.readouterr().out
    assert f"6 runs, {done} of them done" in printed and f"[{6 - done}/{6 - done}]" in printed
    after = (out / "results.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 6
    assert {json.loads(line)["key"] for line in after.splitlines()} == {run.key for run in load_plan(plan).runs}
    assert "| MoFaSGD | " in printed
    compare.main(words)
    assert "6 runs, 6 of them done" in capsys.readouterr().out
    assert (out / "results.jsonl").read_bytes() == after


def test_what_the_documents_say_is_not_needed_is_not(tmp_path):
    """docs/comparing.md: on a machine with PyTorch and transformers alone."""
    (tmp_path / "train.parquet").write_bytes(b"")
    program = """
import sys
from pathlib import Path
sys.modules |= dict.fromkeys(["deepspeed", "trl", "datasets", "pyarrow", "accelerate"])
import experiments.compare
from launch.errors import UserError
from launch.tables import TABLES
try:
    list(TABLES[".parquet"](Path("train.parquet")))
except UserError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_MOFA_AUTOLOAD": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "train.parquet: reading Parquet needs pyarrow: pip install datasets\n"
