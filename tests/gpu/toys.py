"""The model that several tests of CUDA graphs train."""

import torch
from torch import nn

from ds_mofa import MoFaSGD

__all__ = ["MICRO_BATCHES", "STEPS", "TOKENS", "Model", "mofasgd"]

WIDTH, TOKENS, MICRO_BATCHES, STEPS = 256, 128, 3, 8


class Model(nn.Module):
    """Linears with and without a bias, more than the queue takes at once, an embedding, and one linear that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=i % 2 == 0) for i in range(20))
        self.head = nn.Linear(WIDTH, 100)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in (*self.layers, self.layers[0]):
            x = x + torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.head(x).float().flatten(0, -2), ids.flatten())


def mofasgd(**options):
    return lambda model: MoFaSGD(model, **{"lr": 1e-3, "rank": 8, **options})
