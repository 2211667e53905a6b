"""Lines of the libraries that say nothing to who trains a model. ``DS_MOFA_VERBOSE=1`` leaves them all.

Warnings stay, the user's and the libraries': what is left out are progress bars in files and inside of the training's own,
and what is printed once per rank for the library's authors.
"""

import contextlib
import io
import os
import sys
import threading
import warnings
from collections.abc import Iterator

import datasets
from transformers.utils import logging

__all__ = ["SWITCH", "quiet_libraries", "without_built_lines", "without_saving_bar"]

SWITCH = "DS_MOFA_VERBOSE"
_BUILT = "built successfully"  # DeepSpeed, on every rank, of an operator that lies there already as well
_SECONDS = 5.0  # it takes a minute to compile one


def verbose() -> bool:
    return os.environ.get(SWITCH) == "1"


def quiet_libraries() -> None:
    """For the rest of this process."""
    if verbose():
        return
    # DeepSpeed's calls by older names: news for its authors, once per rank and name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # TRL's own default goes by transformers' older name.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        logging.disable_progress_bar()


@contextlib.contextmanager
def without_built_lines() -> Iterator[None]:
    """Within: DeepSpeed does not say that it has an operator; what takes long is said instead, by the first rank."""
    if verbose():
        yield
        return
    stdout, said = sys.stdout, io.StringIO()
    message = (
        "waiting for the other ranks, or for DeepSpeed to compile an operator, which it does once (a minute or two)"
    )
    timer = threading.Timer(_SECONDS, lambda: print(message, file=stdout, flush=True))
    if os.environ.get("RANK", "0") == "0":
        timer.daemon = True
        timer.start()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        timer.cancel()
        for line in said.getvalue().splitlines():
            if _BUILT not in line:
                print(line, flush=True)


@contextlib.contextmanager
def without_saving_bar() -> Iterator[None]:
    """Within: no bar of the files of a checkpoint, which would break that of the training."""
    if verbose() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
