"""Embeddings under stage 3: their backward needs ids and no weight, and DeepSpeed would gather the weight for it."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ds_mofa.parameters import Matrix

__all__ = ["spare_gathering"]

_DEPTH = 8  # operators between an embedding and what a subclass makes of it


def spare_gathering(matrices: Iterable[Matrix]) -> Callable[[], None]:
    """Have no embedding among the matrices gathered for a backward that sketches it.

    DeepSpeed passes what a module returns through the module's ``pre_bwd_fn``, whose backward gathers the module's weights.

    Returns:
        What undoes that.
    """
    modules: list[Any] = [
        module
        for matrix in matrices
        for module in matrix.modules
        if isinstance(module, nn.Embedding) and len(list(module.parameters())) == 1 and "pre_bwd_fn" in vars(module)
    ]
    originals = [module.pre_bwd_fn for module in modules]
    for module, original in zip(modules, originals):
        module.pre_bwd_fn = _Spared(original)

    def undo() -> None:
        for module, original in zip(modules, originals):
            module.pre_bwd_fn = original

    return undo


class _Spared:
    """In the place of ``pre_bwd_fn``."""

    def __init__(self, original: Any):
        self._original = original

    def apply(self, output: Tensor) -> Tensor:
        return output if _is_sketched(output) else self._original.apply(output)


def _is_sketched(output: Tensor) -> bool:
    node = output.grad_fn
    for _ in range(_DEPTH):
        if node is None or node.name() == "SketchedEmbeddingBackward":
            return node is not None
        node = node.next_functions[0][0] if node.next_functions else None
    return False
