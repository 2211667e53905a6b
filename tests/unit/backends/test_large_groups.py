"""Large AdamW parameters get a param group of their own under DeepSpeed."""

import torch
from torch import nn

from ds_mofa.backends.deepspeed import build


def test_large_parameters_are_apart_and_keep_their_settings(monkeypatch):
    monkeypatch.setattr(build, "LARGE", 50)
    small, embedding, bias, head = (nn.Parameter(torch.zeros(size)) for size in (10, 60, 49, 50))
    groups = build._large_ones_apart(
        [
            {"params": [small, embedding, bias, head], "lr": 1.0, "weight_decay": 0.0},
            {"params": [nn.Parameter(torch.zeros(70))], "lr": 2.0, "weight_decay": 0.1},
        ]
    )
    assert [[p.numel() for p in group["params"]] for group in groups] == [[10, 49], [60], [50], [70]]
    assert [group["lr"] for group in groups] == [1.0, 1.0, 1.0, 2.0]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0, 0.0, 0.1]
    assert groups[0]["params"][0] is small and groups[1]["params"][0] is embedding
