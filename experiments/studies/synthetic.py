"""Gradient sequences that are made up, of which it is known what there is to find."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from experiments.studies.trajectory import Gradients

__all__ = ["SEQUENCES", "fixed_subspace", "rotating_subspace", "white_noise"]

SHAPE = (128, 256)
COUNT = 4  # matrices, each with signal and noise of its own
DIRECTIONS = 8  # of the signal
NOISE = 0.5  # its norm, of the signal's
TURN = 0.03  # of each basis vector per step, in radians

Sequence = Callable[[int, torch.device], Iterator[Gradients]]


def fixed_subspace(steps: int, device: torch.device, *, noise: float = NOISE) -> Iterator[Gradients]:
    """A C_t B^T + noise with A and B fixed, orthonormal, and C_t = I + white noise of the same norm."""
    return _low_rank(steps, device, noise=noise, turn=0.0)


def rotating_subspace(steps: int, device: torch.device, *, noise: float = NOISE) -> Iterator[Gradients]:
    """The same, but A and B turn a little with each step, in random directions."""
    return _low_rank(steps, device, noise=noise, turn=TURN)


def white_noise(steps: int, device: torch.device) -> Iterator[Gradients]:
    """No signal at all: the control."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield _named(_draw(generator, *SHAPE), device)


SEQUENCES: dict[str, Sequence] = {
    "fixed subspace": fixed_subspace,
    "rotating subspace": rotating_subspace,
    "white noise": white_noise,
}


def _low_rank(steps: int, device: torch.device, *, noise: float, turn: float) -> Iterator[Gradients]:
    generator = torch.Generator().manual_seed(0)
    m, n = SHAPE
    k = DIRECTIONS
    A, B = (torch.linalg.qr(_draw(generator, size, k)).Q for size in SHAPE)
    for _ in range(steps):
        core = torch.eye(k) + _draw(generator, k, k) / math.sqrt(k)
        signal = A @ core @ B.mT
        size = noise * math.sqrt(2 * k) / math.sqrt(m * n)  # |signal|^2 is 2 k in the mean
        yield _named(signal + size * _draw(generator, m, n), device)
        A, B = (
            torch.linalg.qr(basis + turn * _draw(generator, *basis.shape[1:]) / math.sqrt(basis.shape[1])).Q
            for basis in (A, B)
        )


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(COUNT, *shape, generator=generator)


def _named(gradients: Tensor, device: torch.device) -> Gradients:
    return {f"matrix {i}": gradient.to(device) for i, gradient in enumerate(gradients)}
