"""What holds for all tests."""

from pathlib import Path

from hypothesis import settings

# Property tests take the same examples on every run, however slow the machine: a change that breaks nothing fails none.
# `pytest --hypothesis-profile explore FILE` looks further, with other examples each time.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("same")

# Of two workers that take a file at a time, none should begin a long one when the other is done: those come first.
LONG = (
    "launch/test_train_command.py",
    "profiler/predict/test_predict.py",
    "profiler/predict/test_offload_prediction.py",
    "experiments/test_compare.py",
    "profiler/test_commands.py",
    "unit/capture/test_sketch.py",
)


def pytest_collection_modifyitems(items) -> None:
    names = [str(Path(__file__).parent / name) for name in LONG]
    items.sort(key=lambda item: str(item.path) not in names)
