"""Of many settings of one test some in every run, the others with ``-m slow``."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["slow_but"]


def slow_but(is_quick: Callable[..., bool], values: Iterable[Any]) -> list[Any]:
    """The values for ``parametrize``, all marked slow but those that ``is_quick``; a tuple is several arguments."""
    found = []
    for value in values:
        several = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*several, marks=() if is_quick(*several) else pytest.mark.slow))
    assert any(not param.marks for param in found), "at least one is for every run"
    return found
