"""What --max_length and batches leave of the data is said before the training, and refused where it is nothing."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from launch.errors import UserError
from launch.lengths import answers_lost, check_batches, check_lengths

N = -100
# The answer at the end, in the middle and at the beginning.
ROWS = [[N, N, N, 1], [N, 1, N, N, N], [1, N, N, N, N, N]]


def data(rows: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": [[7] * len(row) for row in rows], "labels": rows})


def arguments(**changed) -> SimpleNamespace:
    usual = {"max_length": 3, "packing": False, "packing_strategy": "bfd", "truncation_mode": "keep_start"}
    return SimpleNamespace(**usual | {"process_index": 0} | changed)


@pytest.mark.parametrize(("length", "start", "end"), [(1, 2, 2), (2, 1, 2), (3, 1, 2), (4, 0, 1), (5, 0, 1), (6, 0, 0)])
def test_examples_are_counted_that_keep_no_answer(length, start, end):
    assert answers_lost(data(ROWS), length, "keep_start") == start
    assert answers_lost(data(ROWS), length, "keep_end") == end


def test_they_are_said_by_their_data(capsys):
    check_lengths(arguments(), data(ROWS), data(ROWS[1:]))
    assert capsys.readouterr().out == (
        "train data: --max_length 3 cuts all answers off in 1 of 3 examples; nothing is learned from these.\n"
    )
    check_lengths(arguments(truncation_mode="keep_end"), data(ROWS[:1]), data(ROWS))
    assert "eval data: --max_length 3 cuts all answers off in 2 of 3" in capsys.readouterr().out


def test_no_answer_in_any_is_refused():
    with pytest.raises(UserError, match="^train data: --max_length 3 cuts all answers off, in each of the 1 examples"):
        check_lengths(arguments(), data(ROWS[:1]), None)
    with pytest.raises(UserError, match="^eval data: "):
        check_lengths(arguments(), data(ROWS), data(ROWS[:1]))


def test_what_packing_cuts_and_what_it_carries_over():
    with pytest.raises(UserError, match="^train data: "):  # it keeps the start, whatever truncation_mode says
        check_lengths(arguments(packing=True, truncation_mode="keep_end"), data(ROWS[:1]), None)
    for strategy in ("bfd_split", "wrapped"):
        check_lengths(arguments(packing=True, packing_strategy=strategy), data(ROWS[:1]), None)
        with pytest.raises(UserError, match="^eval data: "):  # which is never packed
            check_lengths(arguments(packing=True, packing_strategy=strategy), data(ROWS), data(ROWS[:1]))


def test_without_a_length_nothing_is_cut(capsys):
    check_lengths(arguments(max_length=None), data(ROWS[:1]), data(ROWS[:1]))
    assert capsys.readouterr().out == ""


def test_an_incomplete_batch_alone_is_refused_where_it_would_be_dropped():
    args = SimpleNamespace(per_device_train_batch_size=4, world_size=1)
    check_batches(DataLoader(data(ROWS), batch_size=4), args)
    check_batches(DataLoader(data(ROWS), batch_size=3, drop_last=True), args)
    with pytest.raises(UserError, match="--dataloader_drop_last: 3 training examples .* batch, 4 on each of 1 ranks"):
        check_batches(DataLoader(data(ROWS), batch_size=4, drop_last=True), args)
