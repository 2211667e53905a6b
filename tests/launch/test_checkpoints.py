"""Resuming finds the checkpoint it was asked for, or says why there is none."""

from pathlib import Path

import pytest

from launch.checkpoints import checkpoint_to_resume, remove_old, seal, unseal
from launch.errors import UserError


@pytest.fixture
def output(tmp_path) -> str:
    for step in (3, 20):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / f"global_step{step}").mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        (folder / f"global_step{step}/states.pt").write_bytes(b"12345")
        seal(folder)
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
