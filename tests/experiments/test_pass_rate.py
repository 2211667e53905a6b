"""Answers against a problem's own tests."""

import pytest

from experiments.pass_rate import assertions_of, passes

PROMPT = "Write a function to double a number.\nThe code must pass:\nassert double(2) == 4\nassert double(0) == 0\n"
ASSERTIONS = "assert double(2) == 4\nassert double(0) == 0\n"


def test_the_tests_are_what_follows_the_words():
    assert assertions_of(PROMPT) == ASSERTIONS
    assert assertions_of("Write a function.") == ""


@pytest.mark.parametrize(
    "code, solved",
    [
        ("def double(x):\n    return 2 * x", True),
        ("def double(x):\n    return x + 2", False),  # one of the two holds
        ("def double(x) return", False),
        ("while True: pass", False),
        ("", False),
        ("def double(x):\n    return 2 * x\nraise SystemExit(1)", False),
        ("def double(x):\n    return 2 * x\n\0", False),
    ],
)
def test_an_answer_passes_when_all_hold(code, solved):
    assert passes(code, ASSERTIONS, seconds=1.0) is solved


def test_without_tests_nothing_is_solved():
    assert not passes("x = 1", "", seconds=1.0)


def test_an_exit_before_the_tests_is_no_solution():
    assert not passes("raise SystemExit(0)", ASSERTIONS, seconds=1.0)
