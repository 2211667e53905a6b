"""Diagnostics: the same on every rank and stage, and in DeepSpeed's monitor."""

import csv
import math
from pathlib import Path

from deepspeed import comm as dist
from launching import on_ranks
from toys import Toy, batches
from training import config, engine_for, train_step

STEPS, EVERY = 7, 3


def watched(stage: int) -> dict:
    options = {"diagnostics_every": EVERY}
    monitor = {"enabled": True, "output_path": "csv", "job_name": f"stage{stage}"}
    with engine_for(config(stage, micro=3, options=options, csv_monitor=monitor)) as engine:
        seen = []
        for batch in batches(STEPS):
            train_step(engine, batch)
            report = engine.basic_optimizer.matrices.report
            seen.append(report and (report.step, report.by_matrix()))
    dist.barrier()
    written = {}
    for path in Path(f"csv/stage{stage}").rglob("MoFaSGD_kept_energy.csv"):
        written = {int(row[0]): float(row[1]) for row in list(csv.reader(path.open()))[1:]}
    return {"seen": seen, "written": written, "samples": engine.train_batch_size()}


@on_ranks(watched, world=[2], stage=[0, 1, 2, 3])
def test_a_report_every_few_steps_on_every_rank(ran):
    for rank in ran.ranks:
        assert [step and step[0] for step in rank["seen"]] == [None, None, 3, 3, 3, 6, 6]
        assert rank["seen"] == ran.ranks[0]["seen"]
    for _, report in ran.ranks[0]["seen"][2:]:
        assert set(report) == set(Toy.MATRICES)
        for values in report.values():
            assert all(math.isfinite(value) for value in values.values())
            assert 0 < values["kept_energy"] <= 1 and values["effective_rank"] >= 1
            assert values["orthogonality_error"] < 1e-5
            assert values["projected_grad_norm"] > 0 and values["momentum_norm"] > 0


@on_ranks(watched, world=[2], stage=[1, 2, 3])
def test_the_monitor_writes_them_by_samples(ran):
    written, samples = ran.ranks[0]["written"], ran.ranks[0]["samples"]
    assert list(written) == [3 * samples, 6 * samples]
    means = []
    for _, report in (ran.ranks[0]["seen"][2], ran.ranks[0]["seen"][5]):
        energies = [values["kept_energy"] for values in report.values()]
        means.append(sum(energies) / len(energies))
    assert all(abs(a - b) < 1e-6 for a, b in zip(written.values(), means))
