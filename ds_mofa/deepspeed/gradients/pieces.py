"""Large tensors piece by piece, so that what is made of one on its way is small."""

from collections.abc import Iterator

import torch
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor

from ds_mofa.host_weights import CHUNK_BYTES

__all__ = ["PIECE", "norm_of", "pieces_of"]

PIECE = CHUNK_BYTES // torch.float32.itemsize  # elements that a norm is taken of, or that pass to the host, at a time


def pieces_of(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat tensors of one length, piece by piece."""
    return zip(*(tensor.split(PIECE) for tensor in tensors), strict=True)


def norm_of(tensor: Tensor) -> Tensor:
    """The 2-norm, in DeepSpeed's dtype for norms."""
    wide = get_norm_dtype()
    # The GPU adds squares of 16-bit numbers up in fp32 as it reads them; any other widening is a copy.
    direct = torch.float32 if tensor.itemsize == 2 else wide
    pieces = tensor.detach().reshape(-1).split(PIECE)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=direct).to(wide) for p in pieces]))
