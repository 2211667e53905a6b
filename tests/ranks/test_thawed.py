"""A layer that is unfrozen after the engine was built is not trained, and that is said once."""

import logging

from launching import on_ranks
from toys import batches
from training import config, engine_for, toy, train_step


class Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def thawed_after_a_step(stage):
    heard, model = Heard(), toy()
    logging.getLogger("ds_mofa").addHandler(heard)
    try:
        with engine_for(config(stage), model) as engine:
            data = batches(3)
            train_step(engine, data[0])
            silent = len(heard.lines)
            model.frozen.weight.requires_grad_(True)
            for batch in data[1:]:
                train_step(engine, batch)
    finally:
        logging.getLogger("ds_mofa").removeHandler(heard)
    return {"before": silent, "lines": heard.lines[silent:]}


@on_ranks(thawed_after_a_step, stage=[0, 1, 2])
def test_unfreezing_after_the_build_is_said_once(ran):
    for result in ran.ranks:
        assert result["before"] == 0
        assert len([line for line in result["lines"] if "frozen.weight" in line]) == 1
