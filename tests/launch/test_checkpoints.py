"""Resuming finds the checkpoint it was asked for, or says why there is none."""

import json
import os
from pathlib import Path

import pytest

from launch.checkpoints import (
    check_written_by,
    checkpoint_to_resume,
    remove_old,
    seal,
    start_run,
    unseal,
    written_by,
)
from launch.engines import Engine
from launch.errors import UserError


def save(output: str | Path, step: int, lineage: list | None = None) -> str:
    folder = Path(output) / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / f"global_step{step}/states.pt").write_bytes(b"12345")
    seal(folder, lineage)
    return str(folder)


def start(output: str | Path, checkpoint: str | None = None) -> list:
    return start_run(str(output), checkpoint)[0]


@pytest.fixture
def output(tmp_path) -> str:
    for step in (3, 20):
        save(tmp_path, step)
    return str(tmp_path)


def test_none_starts_anew(output):
    assert checkpoint_to_resume(None, output) is None


def test_a_folder_is_taken_as_given(output):
    assert checkpoint_to_resume(f"{output}/checkpoint-3", output) == f"{output}/checkpoint-3"


def test_last_is_the_newest(output):
    assert checkpoint_to_resume("last", output) == f"{output}/checkpoint-20"


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_last_of_nothing_raises(tmp_path, folder):
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        checkpoint_to_resume("last", str(tmp_path / folder))


def test_a_folder_that_is_no_checkpoint_raises(output):
    with pytest.raises(UserError, match="not a checkpoint of this command"):
        checkpoint_to_resume(output, output)


WRITTEN_BY = {
    Engine.DEEPSPEED: ["global_step3/states.pt", "model.safetensors"],
    Engine.FSDP2: ["pytorch_model_fsdp.bin", "optimizer.bin", "model.safetensors"],
    Engine.DDP: ["optimizer.pt", "model.safetensors"],
}


@pytest.mark.parametrize("writer", WRITTEN_BY)
def test_an_engine_resumes_its_own_checkpoints_alone(tmp_path, writer):
    for name in WRITTEN_BY[writer]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for engine in Engine:
        if engine is writer or (writer, engine) == (Engine.DDP, Engine.ONE):
            check_written_by(str(tmp_path), engine)
        else:
            with pytest.raises(UserError, match=f"a run under {writer.value}, and this one is under {engine.value}"):
                check_written_by(str(tmp_path), engine)
        check_written_by(None, engine)


def test_a_sharded_checkpoint_is_fsdp2_s(tmp_path):
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    assert written_by(tmp_path) is Engine.FSDP2


def cut(folder: Path) -> None:
    (folder / "global_step20/states.pt").write_bytes(b"123")


def lose(folder: Path) -> None:
    (folder / "global_step20/states.pt").unlink()


def scrawl(folder: Path) -> None:
    (folder / "complete.json").write_text("{")


DAMAGE = {
    "no seal": (unseal, "has no complete.json, so the run ended while it was written"),
    "a file cut short": (cut, "global_step20/states.pt has 3 of 5 bytes"),
    "a file gone": (lose, "global_step20/states.pt is missing"),
    "a broken seal": (scrawl, "complete.json is not valid JSON"),
}


@pytest.mark.parametrize("damage, problem", DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_refused_by_name(output, damage, problem, capsys):
    damage(Path(output) / "checkpoint-20")
    assert checkpoint_to_resume("last", output) == f"{output}/checkpoint-3"
    printed = capsys.readouterr().out
    assert f"passed over {output}/checkpoint-20" in printed and problem in printed
    with pytest.raises(UserError, match=f"checkpoint-20: the checkpoint is not whole: .*{problem}.*'last'"):
        checkpoint_to_resume(f"{output}/checkpoint-20", output)


def test_the_newest_whole_ones_are_kept_and_the_best(output):
    def left():
        return sorted(folder.name for folder in Path(output).glob("checkpoint-*"))

    for step in (21, 22):
        (Path(output) / f"checkpoint-{step}").mkdir()
    seal(f"{output}/checkpoint-21")
    remove_old(output, None)
    remove_old(output, 0)
    assert left() == ["checkpoint-20", "checkpoint-21", "checkpoint-22", "checkpoint-3"]
    remove_old(output, 1, best=f"{output}/checkpoint-3")
    assert left() == ["checkpoint-21", "checkpoint-22", "checkpoint-3"]
    seal(f"{output}/checkpoint-3")  # written anew, by a run that was resumed from before it
    remove_old(output, 1)
    assert left() == ["checkpoint-22", "checkpoint-3"]


def names(output: str | Path) -> list[str]:
    return sorted((folder.name for folder in Path(output).glob("checkpoint-*")), key=lambda name: int(name[11:]))


def test_last_is_of_the_run_that_was_started_last(tmp_path, capsys):
    """A fresh run in a folder with an older one's checkpoints of higher numbers."""
    old = start(tmp_path)
    save(tmp_path, 10, old), save(tmp_path, 20, old)
    new, said = start_run(str(tmp_path), None)
    assert "not this run's: checkpoint-10, checkpoint-20" in said
    with pytest.raises(UserError, match="of the run that was started last.*checkpoint-20 to go on from an earlier"):
        checkpoint_to_resume("last", str(tmp_path))
    mine = save(tmp_path, 5, new)
    os.utime(f"{mine}/complete.json", (1, 1))  # a copied folder has other times
    capsys.readouterr()
    assert checkpoint_to_resume("last", str(tmp_path)) == mine
    assert f"passed over {tmp_path}/checkpoint-20, which another run has written" in capsys.readouterr().out


def test_last_after_a_folder_of_a_version_without_run_ids(output):
    """Those have the time of their seals alone, and the run goes on as one."""
    os.utime(f"{output}/checkpoint-20/complete.json", (1, 1))
    assert checkpoint_to_resume("last", output) == f"{output}/checkpoint-3"
    resumed = start(output, f"{output}/checkpoint-3")
    assert checkpoint_to_resume("last", output) == f"{output}/checkpoint-3"
    save(output, 5, resumed)
    assert checkpoint_to_resume("last", output) == f"{output}/checkpoint-5"


def test_a_run_that_is_resumed_again_and_again_is_one(tmp_path):
    first = start(tmp_path)
    save(tmp_path, 1, first), save(tmp_path, 2, first)
    start(tmp_path, checkpoint_to_resume("last", str(tmp_path)))  # ends before it saves
    third = start(tmp_path, checkpoint_to_resume("last", str(tmp_path)))
    save(tmp_path, 3, third)
    unseal(save(tmp_path, 4, third))
    assert checkpoint_to_resume("last", str(tmp_path)) == f"{tmp_path}/checkpoint-3"
    unseal(f"{tmp_path}/checkpoint-3")
    assert checkpoint_to_resume("last", str(tmp_path)) == f"{tmp_path}/checkpoint-2"


def test_a_run_from_an_earlier_checkpoint_leaves_the_later_ones_behind(tmp_path):
    first = start(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path, step, first)
    branch = start(tmp_path, f"{tmp_path}/checkpoint-1")
    assert checkpoint_to_resume("last", str(tmp_path)) == f"{tmp_path}/checkpoint-1"
    save(tmp_path, 2, branch)
    assert checkpoint_to_resume("last", str(tmp_path)) == f"{tmp_path}/checkpoint-2"


def test_last_before_the_first_save_of_a_run_from_another_folder(tmp_path):
    source = save(tmp_path / "old", 7, start_in(tmp_path / "old"))
    lineage = start_in(tmp_path / "new", source)
    assert checkpoint_to_resume("last", str(tmp_path / "new")) == source
    save(tmp_path / "new", 8, lineage)
    assert checkpoint_to_resume("last", str(tmp_path / "new")) == f"{tmp_path}/new/checkpoint-8"


def start_in(folder: Path, checkpoint: str | None = None) -> list:
    folder.mkdir()
    return start(folder, checkpoint)


def test_rotation_removes_the_run_s_own_oldest(tmp_path):
    old = start(tmp_path)
    for step in (10, 20):
        save(tmp_path, step, old)
    new = start(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path, step, new)
    remove_old(str(tmp_path), 2, lineage=new)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-10", "checkpoint-20"]
    remove_old(str(tmp_path), 1, best=f"{tmp_path}/checkpoint-2", lineage=new)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-10", "checkpoint-20"]
    remove_old(str(tmp_path), 1, lineage=new)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-10", "checkpoint-20"]
