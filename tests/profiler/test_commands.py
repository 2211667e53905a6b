"""profiling/verify_claim.py from end to end on a CPU, its verdicts, and profiling/nsight.py without and with nsys."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ds_mofa.profiler.claims import judge
from ds_mofa.profiler.setting import RunSetting
from profiling import nsight, verify_claim, verify_worker
from profiling.starting import launcher

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/models/llama-tiny.json")
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(script: str, *words: str, **changes: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "profiling" / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**ENVIRONMENT, **changes})


def setting(folder: Path) -> list[str]:
    return ["--model_config", TINY, "--shape", "256x2", "--steps", "1", "--output_dir", str(folder)]


def verify_here(folder: Path, *words: str) -> None:
    """The command in this process, and its runs too: new ones would import everything first."""
    before = Path.cwd()
    try:
        verify_claim.main([*setting(folder), *words], start=verify_claim.in_this_process)
    finally:
        os.chdir(before)  # it goes to the root


@pytest.fixture(scope="module")
def verified(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("claim")
    with pytest.raises(SystemExit) as ended:
        verify_here(folder, "--runs", "torch:MoFaSGD:r=4", "torch:MoFaSGD:r=4000")
    return folder, str(ended.value)


@pytest.mark.slow
def test_runs_have_processes_of_their_own(tmp_path):
    process = run("verify_claim.py", *setting(tmp_path), "--runs", "torch:MoFaSGD:r=4")
    assert process.returncode == 0, process.stderr
    assert "torch:MoFaSGD:r=4: traced " in process.stdout
    assert (tmp_path / "torch_MoFaSGD_r4/log.txt").exists() and (tmp_path / "report.html").exists()


def test_it_runs_and_judges(verified):
    folder, _ = verified
    document = json.loads((folder / "report.json").read_text())
    assert document["kind"] == "claim" and document["schema_version"] == 1
    verdicts = {claim["claim"]: claim for claim in document["claims"]}
    assert verdicts["torch:MoFaSGD:r=4: no full-rank gradient lives"]["verdict"] == "holds"
    # Fake tensors and real ones: the same operators, and so the same bytes but for some scalars.
    assert verdicts["torch:MoFaSGD:r=4: the prediction is within 5% of the peak traced"]["holds"]
    assert verdicts["AdamW takes about 70 GB in the same setting"]["verdict"] == "not measured"
    report = document["runs"]["torch:MoFaSGD:r=4"]
    assert report["predicted"]["categories"]["weights"] == pytest.approx(3_395_072, rel=1e-3)
    assert report["setting"]["seconds_per_step"] > 0


def test_fsdp2_on_one_rank(tmp_path):
    verify_here(tmp_path, "--runs", "fsdp2:MoFaSGD:r=4", "fsdp2:MoFaSGD:r=4:weights=fp32", "--gpus", "1")
    claims = {claim["claim"]: claim for claim in json.loads((tmp_path / "report.json").read_text())["claims"]}
    for run in ("fsdp2:MoFaSGD:r=4", "fsdp2:MoFaSGD:r=4:weights=fp32"):
        assert claims[f"{run}: no full-rank gradient lives"]["verdict"] == "holds"
        assert claims[f"{run}: the prediction is within 5% of the peak traced"]["verdict"] == "holds"


@pytest.mark.slow
def test_throughput_measures_and_predicts_on_ranks(tmp_path):
    words = ["--model_config", TINY, "--shapes", "8x2", "16x1", "--gpus", "2", "--warmup", "1", "--steps", "2"]
    process = run("throughput.py", *words, "--output_dir", str(tmp_path), "--predict", "--runs", "fsdp2:MoFaSGD:r=4")
    assert process.returncode == 0, process.stdout + process.stderr
    printed = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert printed == [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for row, shape in zip(printed, ("8x2", "16x1"), strict=True):
        assert (row["run"], row["shape"], row["gpus"], row["world_size"]) == ("fsdp2:MoFaSGD:r=4", shape, 2, 2)
        assert row["tokens_per_second"] > 0 and row["losses"][-1] < row["losses"][0] and "skipped_steps" not in row
        assert row["predicted_allocated_gb"] == pytest.approx(0.073, abs=0.01)  # mostly cuBLAS's workspaces


def test_who_starts_a_run():
    settings = [RunSetting.of(backend=name, gpus=1 if name == "torch" else 4) for name in ("torch", "ddp", "zero2")]
    plain, torchrun, deepspeed = map(launcher, settings)
    assert plain == [sys.executable]
    assert torchrun[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "4"] and torchrun[-1] == "--"
    assert deepspeed[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "4"]


def test_a_run_that_fails_is_in_the_report(verified):
    folder, ended = verified
    assert "1 runs failed (torch:MoFaSGD:r=4000)" in ended
    assert "Set rank to at most" in (folder / "torch_MoFaSGD_r4000/predicted.json").read_text()
    text = (folder / "report.md").read_text()
    assert "## Not measured" in text and "MoFaSGD found no matrix to train" in text
    assert (folder / "torch_MoFaSGD_r4000/log.txt").exists()


def test_finished_runs_are_taken_over(verified):
    folder, _ = verified
    before = (folder / "torch_MoFaSGD_r4/report.json").stat().st_mtime_ns
    whole = (folder / "report.json").stat().st_mtime_ns
    verify_here(folder, "--runs", "torch:MoFaSGD:r=4", "--reuse")
    assert (folder / "torch_MoFaSGD_r4/report.json").stat().st_mtime_ns == before
    assert (folder / "report.json").stat().st_mtime_ns > whole


def fake_run(allocated: int, nvml: int, *, shape: str = "1024x8", kept: int = 0, own: float = 1e-3) -> dict:
    layer = {
        "layer": "layers.0",
        "kept": kept,
        "held": 0,
        "largest": kept,
        "layer_gradients": 400,
        "smallest_gradient": 90,
        "waiting": 0,
    }
    rank = {
        "peaks": {"allocated": allocated, "nvml_device": nvml, "traced": None}, "layers": [layer],
        "breakdown": {"total": nvml, "categories": {
            "weights": allocated - 12_070_000_000, "AdamW states": 4_000_000_000, "activations": 8_000_000_000,
            "allocator slack": 2_000_000_000, "unexplained": nvml - allocated - 2_000_000_000}},
        "overhead": {"seconds_per_step": own},
    }  # fmt: skip
    setting = {"model_config": "configs/models/llama-3.1-8b.json", "shape": shape, "seconds_per_step": 1.0}
    setting |= {"seconds_per_step_without_profiler": 1.0, "all_seconds": {"with": [1.0], "without": [1.0, 1.01]}}
    return {"ranks": [rank], "setting": setting, "predicted": {"allocated": 30_000_000_000, "total": 34_000_000_000}}


def by_claim(runs: dict) -> dict[str, dict]:
    return {claim["claim"]: claim for claim in judge(runs)}


def test_verdicts():
    ours, adamw = "torch:MoFaSGD:r=8", "torch:AdamW"
    found = by_claim({ours: fake_run(28_900_000_000, 33_000_000_000), adamw: fake_run(72_500_000_000, 75_700_000_000)})
    limit = "MoFaSGD, rank 8, fine-tunes LLaMA-3.1-8B in 29.0 GB allocated or less, with HF's own layers and loss"
    assert found[limit]["verdict"] == "holds"
    # Every GB of the allocator's peak, and none of what is outside it: 16.83 + 4.00 + 8.00 + 0.07.
    assert found[limit]["measured"].endswith("weights, AdamW states 20.83 GB; activations 8.00 GB; libraries' 0.07 GB")
    assert "liger" in next(claim for claim in found if found[claim]["measured"] == f"{ours}:liger=1 was not run")
    assert found["AdamW takes about 70 GB in the same setting"]["holds"]
    assert found[f"{ours}: the prediction is within 5% of the peak allocated"]["holds"]
    assert found[f"{adamw}: the prediction is within 5% of the peak allocated"]["verdict"] == "off by -58.6%"
    assert found[f"{ours}: the profiler costs less than 2 % of the step"]["holds"]

    over = by_claim({ours: fake_run(30_840_000_000, 35_450_000_000, kept=90, own=0.03)})
    assert over[limit]["verdict"] == "fails by 1.84 GB (6.3%)" and over[limit]["holds"] is False
    assert over[f"{ours}: no full-rank gradient lives"]["holds"] is False
    assert over[f"{ours}: the profiler costs less than 2 % of the step"]["holds"] is False
    sharded = by_claim({"zero3:MoFaSGD:r=4": fake_run(28_000_000_000, 33_000_000_000, kept=90)})
    assert sharded["zero3:MoFaSGD:r=4: no full-rank gradient lives"]["verdict"] == "not shown"
    elsewhere = by_claim({ours: fake_run(28_000_000_000, 33_000_000_000, shape="512x8")})
    assert elsewhere[limit]["holds"] is None


def test_each_of_the_papers_runs_is_judged_for_itself():
    ours = "torch:MoFaSGD:r=8"
    found = judge(
        {ours: fake_run(30_840_000_000, 34_000_000_000), f"{ours}:liger=1": fake_run(28_300_000_000, 30_000_000_000)}
    )
    limits = [(claim["claim"].rsplit(", ", 1)[1], claim["holds"]) for claim in found if "29.0 GB" in claim["claim"]]
    assert limits == [("with HF's own layers and loss", False), ("with liger-kernel's layers and loss", True)]


def test_runs_without_their_packages_are_noted(monkeypatch):
    settings = [verify_claim.RunSetting.parse(run) for run in verify_claim.ONE_GPU]
    monkeypatch.setattr(verify_claim.importlib.util, "find_spec", lambda module: None)
    chosen, notes = verify_claim.can_run(settings)
    assert [setting.run for setting in chosen] == ["torch:AdamW", "torch:MoFaSGD:r=8"]
    assert notes == [
        "torch:MoFaSGD:r=8:liger=1 was not run: liger-kernel is not installed (pip install liger-kernel).",
        "torch:LoRA:r=8 was not run: peft is not installed (pip install peft).",
    ]
    monkeypatch.setattr(verify_claim.importlib.util, "find_spec", lambda module: module)
    monkeypatch.setattr(verify_claim.torch.cuda, "is_available", lambda: False)
    chosen, notes = verify_claim.can_run(settings)
    assert settings[-1] in chosen and notes == [
        "torch:MoFaSGD:r=8:liger=1 was not run: liger-kernel's kernels need a GPU."
    ]


def test_steps_with_and_without_take_turns():
    assert list(verify_worker.turns(3)) == [False, True, True, False, False, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch:Nothing", "'torch:Nothing' cannot be run: give torch, ddp, fsdp2, zero0"),
        ("zero2:LoRA", "zero2:LoRA:r=8 cannot be measured, only predicted"),
    ],
)
def test_a_run_that_cannot_be(tmp_path, name, message):
    with pytest.raises(SystemExit, match=message):
        verify_here(tmp_path, "--runs", name)


def test_nsight_says_how_to_get_what_is_missing():
    process = run("nsight.py", "--tool", "ncu", "--", "true", PATH="/nowhere")
    assert process.returncode == 1
    assert "ncu was not found. Nsight Compute: https://developer.nvidia.com/" in process.stderr


FAKE_NSYS = """#!{python}
import subprocess, sys
words = sys.argv[1:]
open({log!r}, "a").write(" ".join(words) + "\\n")
if words[0] == "profile":
    out = next(word for word in words if word.startswith("--output=")).removeprefix("--output=")
    open(out + ".nsys-rep", "w").close()
    sys.exit(subprocess.run(words[words.index("true"):]).returncode)
if words[2] == "nvtx_sum":
    print("Processing [report.sqlite] with [nvtx_sum.py]...\\n\\nTime (%),Total Time (ns),Range\\n60.0,1200,backward")
else:
    print("ERROR: no CUDA data", file=sys.stderr)
"""


def test_nsight_wraps_and_summarises(tmp_path, verified):
    program, log = tmp_path / "nsys", tmp_path / "log"
    program.write_text(FAKE_NSYS.format(python=sys.executable, log=str(log)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    memory = str(verified[0] / "torch_MoFaSGD_r4/report.json")
    options = ["--program", str(program), "--output_dir", str(tmp_path / "out"), "--memory_report", memory]
    process = run("nsight.py", *options, "--", "true", "--epochs", "3")
    assert process.returncode == 0, process.stderr
    first = log.read_text().splitlines()[0]
    assert "--capture-range=cudaProfilerApi" in first and "--cuda-memory-usage=true" in first
    assert first.endswith("true --epochs 3")
    text = (tmp_path / "out/summary.md").read_text()
    assert "| 60.0 | 1200 | backward |" in text and "Not in this report: ERROR: no CUDA data" in text
    assert "| factor update | " in text

    assert nsight.main([*options, "--capture", "all", "--", "true"]) == 0
    assert "--capture-range" not in next(line for line in log.read_text().splitlines()[1:] if "profile" in line)
