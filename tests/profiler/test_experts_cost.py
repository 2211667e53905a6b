"""profiling/experts_cost.py: how tokens are routed, and that it says what it needs."""

import pytest
import torch

from profiling import experts_cost
from profiling.experts_cost import MODELS, route


@pytest.mark.parametrize("name", MODELS)
def test_every_token_chooses_different_experts(name):
    experts, tokens = MODELS[name], 512
    counts, rows = route(experts, tokens, spread=1.0)
    assert len(counts) == experts.count and counts.sum() == len(rows) == tokens * experts.chosen
    assert (rows.bincount(minlength=tokens) == experts.chosen).all()
    for of in rows.split(counts.tolist()):
        assert (of.diff() > 0).all()  # each once


def test_the_spread_makes_experts_unlike():
    even, uneven = (route(MODELS["Qwen3-30B-A3B"], 8192, spread)[0] for spread in (0.0, 1.0))
    assert even.max() < 2 * even.min()
    assert uneven.max() > 100 * uneven.min() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_it_says_what_it_needs():
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        experts_cost.main(["--tokens", "64"])
