"""Resuming finds the checkpoint it was asked for, or says why there is none."""

import pytest

from launch.checkpoints import checkpoint_to_resume
from launch.errors import UserError


@pytest.fixture
def output(tmp_path) -> str:
    for step in (3, 20):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / f"global_step{step}").mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
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
