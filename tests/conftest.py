"""What holds for all tests."""

from hypothesis import settings

# Property tests take the same examples on every run, however slow the machine: a change that breaks nothing fails none.
# `pytest --hypothesis-profile explore FILE` looks further, with other examples each time.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("same")
