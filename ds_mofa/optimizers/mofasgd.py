"""MoFaSGD (arXiv 2507.08091) as users construct it."""

from ds_mofa.optimizer import MatrixOptimizer
from ds_mofa.optimizers.registry import register
from ds_mofa.options import Options
from ds_mofa.rules.mofasgd import MoFaSGDRule

__all__ = ["MoFaSGD"]


@register
class MoFaSGD(MatrixOptimizer):
    """Momentum-factorized SGD for the matrices of a model, AdamW for everything else.

    In a plain PyTorch loop, with no DeepSpeed:

    >>> optimizer = MoFaSGD(model, lr=6e-3, rank=8)
    >>> loss.backward()          # no weight matrix gets a .grad
    >>> optimizer.step()
    >>> optimizer.zero_grad()

    Under DeepSpeed, ``"optimizer": {"type": "MoFaSGD", "params": {...}}`` in the JSON builds it. Its options are
    :class:`ds_mofa.options.Options`, its other arguments those of :class:`MatrixOptimizer`.
    """

    options_class = Options
    rule_class = MoFaSGDRule
