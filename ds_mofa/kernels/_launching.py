"""Launches of a Triton kernel that cost the host little."""

from typing import Any

__all__ = ["Compiled"]


class Compiled:
    """A kernel with its constants, compiled at its first launch. Later ones ask nothing of their arguments, which takes several
    times as long as to launch: so these always have the same types, tensors begin at multiples of 16 bytes, and the kernel is
    compiled with ``do_not_specialize`` for every integer.

    Attributes:
        constants: by name, those of the compiler's options that were given among them.
    """

    __slots__ = ("_kernel", "constants", "_compiled", "_values")

    def __init__(self, kernel: Any, **constants: Any):
        self._kernel, self.constants = kernel, constants
        self._compiled: Any = None
        self._values: tuple = ()

    def __call__(self, grid: tuple[int, int], *args: Any) -> None:
        """
        Args:
            grid: programs.
            args: of the kernel, but for its constants, which are the last.
        """
        if self._compiled is not None:
            self._compiled[(*grid, 1)](*args, *self._values)
            return
        self._compiled = self._kernel[grid](*args, **self.constants)  # None from Triton's interpreter
        self._values = tuple(self.constants[name] for name in self._kernel.arg_names[len(args) :])
