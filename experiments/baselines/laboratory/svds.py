"""Work on several batches that needs SVDs, which are served to all at once."""

from collections.abc import Generator
from typing import Any

from torch import Tensor

from ds_mofa.linalg.batching import together
from ds_mofa.linalg.factors import leading_svd
from experiments.baselines.laboratory.batch import Terms

__all__ = ["SVDs", "with_svds"]

SVDs = Generator[tuple[Tensor, int], tuple[Tensor, Tensor, Tensor], Terms]


def with_svds(works: list[SVDs]) -> list[Terms]:
    """What each returns, given the leading singular triplets that it asks for; on a GPU few calls count, so all are
    served at once. They ask equally often.
    """
    results = []
    answers: list[Any] = [None] * len(works)
    while len(results) < len(works):
        asked = []
        for work, answer in zip(works, answers):
            try:
                asked.append(work.send(answer))
            except StopIteration as done:
                results.append(done.value)
        if asked:
            answers = together([K for K, _ in asked], leading_svd, [r for _, r in asked])
    return results
