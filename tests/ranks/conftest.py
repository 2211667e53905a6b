"""The fixture ``ran`` of ``launching.on_ranks``."""

import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
# The scenes' modules, and the reference. Not in the first place: the scripts of launch/ write theirs over it when
# they are imported.
sys.path[1:1] = [str(_HERE), str(_HERE.parent)]

from launching import Case, Launcher, Ran  # noqa: E402


@pytest.fixture(scope="session")
def launcher(tmp_path_factory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def ran(request, launcher: Launcher) -> Ran:
    """The results of the case; the first test of a world size launches for all of them."""
    selected = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = [spec.params["ran"] for spec in selected if spec and isinstance(spec.params.get("ran"), Case)]
    return launcher.result(request.param, wanted)
