"""The helper that thins out combinations: every pair is there, the numbers are small, and the choice stays the same."""

import itertools

import pytest

from tests.pairs import covering, pairs

AXES = [
    {"world": [1, 2, 3], "stage": [0, 1, 2, 3], "micro": [1, 3], "capture": ["linear", "hook"]},
    {"stage": [0, 1, 2, 3], "dtype": ["fp32", "bf16"]},
    {"a": [{"x": 1}, {"x": 2}], "b": [None, False], "c": [1, 1.5, "1"]},
    {"only": [1, 2, 3]},
]


@pytest.mark.parametrize("axes", AXES, ids=lambda axes: "-".join(axes))
def test_every_two_values_of_every_two_axes_occur_together(axes):
    chosen = pairs(**axes)
    for one, other in itertools.combinations(axes, 2):
        for pair in itertools.product(axes[one], axes[other]):
            assert any((values[one], values[other]) == pair for values in chosen), (one, other, pair)
    for axis, values in axes.items():
        assert all(any(chosen_values[axis] == value for chosen_values in chosen) for value in values)


def test_they_are_few_and_the_same_each_time():
    assert len(pairs(**AXES[0])) <= 14  # of 48; no fewer than 4 stages x 3 worlds can do
    assert pairs(**AXES[0]) == pairs(**AXES[0])
    assert len(pairs(**AXES[1])) == 8  # two axes alone: all


def test_what_is_left_out_of_the_product_is_not_asked_for():
    allowed = [values for values in pairs(**AXES[0]) if not (values["world"] == 3 and values["stage"] == 0)]
    chosen = [allowed[i] for i in covering(allowed)]
    assert {(v["world"], v["stage"]) for v in chosen} == {(v["world"], v["stage"]) for v in allowed}


def test_combinations_need_not_have_the_same_axes():
    some = [{"where": "loss"}, {"where": "sketches", "rank": 1}, {"where": "sketches", "rank": 0}]
    assert covering(some) == [0, 1, 2]
    assert covering([]) == []
