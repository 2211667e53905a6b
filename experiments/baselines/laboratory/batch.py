"""The matrices of one shape, stacked, with what is kept of each."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_mofa.linalg.factors import Factors
from experiments.baselines.randomness import keyed_generator

__all__ = ["Batch", "keep_factors", "masked_factors", "Terms"]


class Terms(NamedTuple):
    """A matrix as sum_j coefficients_j U_j V_j^T: U (B, m, k), coefficients (B, k), V (B, n, k)."""

    U: Tensor
    coefficients: Tensor
    V: Tensor


class Batch:
    """All matrices of one shape that move in this step, stacked."""

    def __init__(self, params: list[nn.Parameter], states: list[dict[str, Any]], indices: list[int]):
        self.params, self.states, self.indices = params, states, indices
        exact = torch.promote_types(params[0].dtype, torch.float32)
        self.G = torch.stack([p.grad for p in params]).to(exact)  # (B, m, n)
        self.t: int = states[0]["step"]
        self.shape: tuple[int, int] = tuple(params[0].shape)

    def get(self, key: str) -> Tensor:
        return torch.stack([state[key] for state in self.states])

    def put(self, key: str, value: Tensor) -> None:
        for state, part in zip(self.states, value.unbind()):
            state[key] = part

    def averaged(self, key: str, value: Tensor, decay: float) -> Tensor:
        """The debiased average over the steps of ``value``, kept under ``key``."""
        old = self.get(key) if key in self.states[0] else torch.zeros_like(value)
        new = decay * old + (1 - decay) * value
        self.put(key, new)
        return new / (1 - decay**self.t)

    def gaussian(self, columns: int, seed: int, stream: int, hold: int = 1) -> Tensor:
        """(B, n, columns) for stream 0, (B, m, columns) for stream 1; of each matrix's own, new every ``hold`` steps."""
        rows = self.shape[1 - stream]
        draws = [
            torch.randn(
                rows,
                columns,
                generator=keyed_generator(seed + stream, (self.t - 1) // hold + 1, index, self.G.device),
                device=self.G.device,
                dtype=self.G.dtype,
            )
            for index in self.indices
        ]
        return torch.stack(draws)


def keep_factors(batch: Batch, factors: Factors) -> None:
    for key, value in zip(("U", "sigma", "V"), factors):
        batch.put(key, value)


def masked_factors(factors: Factors, ranks: Tensor) -> Factors:
    """Zero beyond each matrix's rank; ranks (B,)."""
    U, sigma, V = factors
    kept = torch.arange(sigma.shape[-1], device=sigma.device) < ranks.unsqueeze(-1)
    return Factors(U * kept.unsqueeze(-2), sigma * kept, V * kept.unsqueeze(-2))
