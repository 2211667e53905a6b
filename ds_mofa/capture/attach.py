"""Attaches captures to the modules of a model: the kinds that are known, and the parameters' hooks."""

from collections.abc import Callable, Sequence

from ds_mofa.capture.embedding import EmbeddingCapture
from ds_mofa.capture.experts import ExpertsCapture
from ds_mofa.capture.hook import attach_hook
from ds_mofa.capture.linear import LinearCapture
from ds_mofa.capture.sink import Capture, Gathered, Sink
from ds_mofa.options import CaptureMode, OptionError
from ds_mofa.parameters import Matrix

__all__ = ["CAPTURES", "Attachment", "attach"]

# The first that serves a module gets it. Put one of your own before them: CAPTURES.insert(0, MyCapture()).
CAPTURES: list[Capture] = [LinearCapture(), EmbeddingCapture(), ExpertsCapture()]


def attach(
    matrices: Sequence[Matrix], sinks: Sequence[Sink], mode: CaptureMode, gathered: Gathered | None = None
) -> "Attachment":
    """Make every backward of the model fill ``sinks``.

    Args:
        matrices: the matrix parameters; ``requires_grad`` stays True.
        sinks: one for each.
        mode: ``"linear"``: by the first of :data:`CAPTURES` that serves a module, else by the hook; ``"hook"``: by the
            hook alone.
        gathered: context manager from a weight to the whole of it, for backends that release weights between forward
            and backward; None where they stay.

    Returns:
        The attachment, whose ``remove()`` puts the model back as it was.

    Raises:
        OptionError: a module has been changed by something else. Nothing has changed.
    """
    attachment = Attachment()
    try:
        for matrix, sink in zip(matrices, sinks):
            sink.param = matrix.param
            for module in matrix.modules if mode == "linear" else ():
                capture = next((one for one in CAPTURES if one.serves(module, matrix)), None)
                if capture is not None:
                    attachment.add(capture.attach(module, matrix, sink, gathered))
            attachment.add(attach_hook(matrix, sink))
    except OptionError:
        attachment.remove()
        raise
    return attachment


class Attachment:
    """What :func:`attach` changed in a model."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def add(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def remove(self) -> None:
        """Put the model back as it was."""
        while self._undo:
            self._undo.pop(0)()
