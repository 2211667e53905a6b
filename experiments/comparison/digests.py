"""Short hashes, by which two runs are seen to have had the same weights and the same tokens."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Digest", "digest_of_files"]


class Digest:
    """A running SHA-256 over named tensors."""

    def __init__(self, batches: Iterable[Mapping[str, Tensor]] = ()):
        self._hash = hashlib.sha256()
        for batch in batches:
            self.add(batch)

    def add(self, tensors: Mapping[str, Tensor]) -> "Digest":
        for name, tensor in tensors.items():
            self._hash.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            # As bytes: NumPy has no bfloat16.
            self._hash.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return self

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


def digest_of_files(files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its name without its folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
