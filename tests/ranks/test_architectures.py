"""Every architecture on two ranks, under ZeRO and FSDP2: the losses of one process, and every weight moves."""

import functools

import pytest
from launching import on_ranks
from scenes.architectures import on_engine

from tests.architectures import ARCHITECTURES
from tests.architectures_table import SUPPORT, written
from tests.lessons import ENGINES, lesson, verdict

alone = functools.cache(lambda name: lesson(ARCHITECTURES[name]))
stands = functools.cache(lambda: written(SUPPORT))


@pytest.mark.slow
@on_ranks(on_engine, name=list(ARCHITECTURES), engine=[engine for engine, _ in ENGINES[1:]])
def test_the_table_says_how_it_trains(ran):
    column = [engine for engine, _ in ENGINES].index(ran.engine)
    cell = stands()[ran.name][2 + column]
    for found in ran.ranks:
        assert verdict(alone(ran.name), **found) == cell, "python tests/architectures_table.py --write renews the table"
