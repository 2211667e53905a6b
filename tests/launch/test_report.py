"""What is printed is what happened."""

from types import SimpleNamespace

from datasets import Dataset
from transformers import TrainerState

from launch.report import beginning, best_step, describe_data, evaluated_last_step, summary


def data(*lengths: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})


def options(**changes) -> SimpleNamespace:
    return SimpleNamespace(**({"max_length": 4, "packing": False, "packing_strategy": "bfd"} | changes))


def test_what_the_length_cuts_off_is_said():
    assert describe_data(data(4, 1), options()) == "2 examples, 5 tokens"
    assert describe_data(data(9, 6, 1), options()) == (
        "3 examples, 16 tokens; --max_length 4 cuts off 7 tokens (43.8%)"
    )
    assert "cuts off 7 tokens" in describe_data(data(9, 6, 1), options(packing=True))


def test_nothing_is_cut_off_where_there_is_no_limit_or_it_splits():
    for changes in ({"max_length": None}, {"packing": True, "packing_strategy": "bfd_split"}):
        assert describe_data(data(9, 6, 1), options(**changes)) == "3 examples, 16 tokens"


def test_where_a_run_begins_is_said():
    assert beginning(None, 0, 6, "lr 0.5") == "    begins: anew, 6 steps\n  in force: lr 0.5"
    assert beginning("out/checkpoint-3", 3, 6, "lr 0.5 (now 0.25)") == (
        "    begins: at step 3 of 6, from out/checkpoint-3\n  in force: lr 0.5 (now 0.25)"
    )


def evaluation(step: int, loss: float) -> dict:
    return {"step": step, "eval_loss": loss, "eval_perplexity": 2.0}


def step(number: int, speed: float, memory: float) -> dict:
    return {"step": number, "loss": 1.0, "tokens_per_second": speed, "peak_memory_gb": memory}


def test_the_summary_compares_the_first_evaluation_with_the_last():
    history = [evaluation(0, 5.0), step(1, 100, 1.5), evaluation(1, 9.0), step(2, 300, 1.25), evaluation(2, 2.5)]
    text = summary(TrainerState(global_step=2, log_history=history), "out/model")
    assert "eval loss 5.0000 before training -> 2.5000 (-50.0%), perplexity 2.00" in text
    assert "2 steps, 200 tokens/s, peak memory 1.50 GB on one rank" in text
    assert 'from_pretrained("out/model")' in text


def test_the_summary_of_one_evaluation_has_no_arrow():
    text = summary(TrainerState(global_step=2, log_history=[evaluation(2, 2.5)]), "out/model")
    assert text.startswith("eval loss 2.5000, perplexity")


def test_a_first_evaluation_on_the_way_is_not_called_one_before():
    text = summary(TrainerState(global_step=4, log_history=[evaluation(2, 4.0), evaluation(4, 5.0)]), "out/model")
    assert text.startswith("eval loss 4.0000 at step 2 -> 5.0000 (+25.0%), perplexity")


def test_without_evaluations_the_training_loss_is_compared():
    history = [step(10, 100, 1.5) | {"loss": 4.0}, step(20, 100, 1.5) | {"loss": 3.0}]
    text = summary(TrainerState(global_step=20, log_history=history), "out/model")
    assert text.startswith("training loss 4.0000 at step 10 -> 3.0000 (-25.0%); --eval_file")
    assert "loss" not in summary(TrainerState(global_step=10, log_history=history[:1]), "out/model")


def test_the_summary_is_of_the_model_that_is_saved():
    history = [evaluation(0, 5.0), evaluation(10, 2.0), evaluation(20, 4.0)]
    state = TrainerState(global_step=20, log_history=history, best_model_checkpoint="out/model/checkpoint-10")
    best = best_step(SimpleNamespace(load_best_model_at_end=True), state)
    assert best == 10
    text = summary(state, "out/model", best)
    assert (
        "eval loss 5.0000 before training -> 2.0000 (-60.0%), perplexity 2.00, of the saved model, step 10's, the best"
        in text
    )
    assert "the best (the last, step 20's: 4.0000)" in text
    assert best_step(SimpleNamespace(load_best_model_at_end=False), state) is None


def test_the_last_step_is_evaluated_once():
    assert evaluated_last_step(TrainerState(global_step=2, log_history=[evaluation(2, 1.0)]))
    assert not evaluated_last_step(TrainerState(global_step=3, log_history=[evaluation(2, 1.0)]))
    assert not evaluated_last_step(TrainerState(global_step=3))
