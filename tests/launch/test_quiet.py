"""What says nothing to who trains is gone, warnings are not, and a variable brings all of it back."""

import sys
import warnings

import pytest
from transformers.utils import logging

from launch import quiet
from launch.quiet import SWITCH, quiet_libraries, without_built_lines, without_saving_bar


@pytest.fixture
def bars():
    logging.enable_progress_bar()
    yield logging.is_progress_bar_enabled
    logging.enable_progress_bar()


def test_deepspeed_s_operators_are_not_announced_and_all_else_is(capsys, monkeypatch):
    def talk() -> None:
        print("DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully")
        print("something else")
        print("a warning", file=sys.stderr)

    with without_built_lines():
        talk()
    assert capsys.readouterr() == ("something else\n", "a warning\n")
    monkeypatch.setenv(SWITCH, "1")
    with without_built_lines():
        talk()
    assert "built successfully\nsomething else\n" in capsys.readouterr().out


def test_what_was_said_before_an_error_is_not_lost(capsys):
    def fail() -> None:
        print("the reason")
        raise RuntimeError

    with pytest.raises(RuntimeError), without_built_lines():
        fail()
    assert capsys.readouterr().out == "the reason\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_takes_long_is_said_by_one_rank(capsys, monkeypatch, rank):
    monkeypatch.setattr(quiet, "_SECONDS", 0.0)
    monkeypatch.setenv("RANK", rank)
    timers = []
    monkeypatch.setattr(quiet.threading, "Timer", lambda seconds, say: timers.append(say) or Timer())

    class Timer:
        def start(self) -> None:
            timers[0]()

        def cancel(self) -> None: ...

    with without_built_lines():
        pass
    assert ("compile an operator" in capsys.readouterr().out) is (rank == "0")


def test_bars_are_off_in_files_and_while_a_checkpoint_is_saved(bars, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("RANK", "0")
    with warnings.catch_warnings():
        quiet_libraries()
        assert bars()  # a terminal
        with without_saving_bar():
            assert not bars()
        assert bars()
        monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
        quiet_libraries()
        assert not bars()
        with without_saving_bar():
            pass
        assert not bars()


def test_the_variable_leaves_bars_and_warnings_as_they_are(bars, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        before = list(warnings.filters)
        quiet_libraries()
        assert warnings.filters == before and bars()
        with without_saving_bar():
            assert bars()


def test_what_trl_s_default_brings_is_no_news_and_other_warnings_are(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
        warnings.warn("`packing` is deprecated.", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["`packing` is deprecated."]
