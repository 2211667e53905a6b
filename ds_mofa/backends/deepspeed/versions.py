"""Which versions of DeepSpeed this package works with, and what one outside of them is told when it is used.

Importing ds_mofa beside any DeepSpeed, or none, is no error: a program may have it for something else.
"""

import warnings

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from packaging.version import Version

from ds_mofa.optimizers import registry
from ds_mofa.options import OptionError

__all__ = ["NEWEST", "OLDEST", "WHOLE", "is_older", "problem", "refuse_when_used", "warn_if_untested"]

OLDEST = "0.18.6"  # the first and the last that the tests have run on
NEWEST = "0.19.8"
WHOLE = "0.19.8"  # from here on everything works; before it what older.py can do


def is_older(than: str, version: str | None = None) -> bool:
    """Whether DeepSpeed (``version``, or the one that is installed) comes before ``than``; 0.19.8+cu13 is 0.19.8."""
    return Version(Version(version or deepspeed.__version__).base_version) < Version(than)


def problem(version: str) -> str | None:
    """Why a version cannot work, with what to install; None if it may."""
    if not is_older(OLDEST, version):
        return None
    return (
        f"this is DeepSpeed {version}, and ds_mofa works with {OLDEST} to {NEWEST}: pip install 'deepspeed>={OLDEST}'"
    )


def warn_if_untested(version: str) -> None:
    """Warn where DeepSpeed's ``version`` is newer than the tests have seen."""
    if Version(Version(version).base_version) > Version(NEWEST):
        warnings.warn(
            f"ds_mofa is tested with DeepSpeed {OLDEST} to {NEWEST}, this is {version}: its hooks may not fit. "
            f"Install deepspeed=={NEWEST} if anything looks wrong",
            stacklevel=2,
        )


def refuse_when_used(why: str) -> None:
    """Have an engine whose config names an optimizer of this package raise an OptionError that says ``why``.

    By the one method that every DeepSpeed has had since its first ZeRO, before anything of the model is touched.
    """
    original = DeepSpeedEngine._do_sanity_check

    def _do_sanity_check(engine):
        entry = registry.find(engine.optimizer_name())
        if entry is not None:
            raise OptionError(f'"type": "{entry.name}": {why}')
        original(engine)

    DeepSpeedEngine._do_sanity_check = _do_sanity_check
