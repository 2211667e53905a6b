"""The options of --profile_memory, which are read before all others."""

import pytest

from launch.errors import UserError
from launch.profile import start_profiler


def test_no_profiler_unless_asked_for():
    assert start_profiler(["--output_dir", "x", "--max_steps", "3"]) is None


def test_its_options():
    profiler = start_profiler(["--bf16", "--profile_memory", "--profile_hz", "7"])
    assert profiler.running and profiler._sampler.hz == 7
    profiler._sampler.stop()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--memory_snapshot"], "Add --profile_memory"), (["--profile_memory", "--profile_hz", "0"], "--profile_hz: ")],
)
def test_mistakes(words, message):
    with pytest.raises(UserError, match=message):
        start_profiler(words)
