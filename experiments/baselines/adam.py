"""Adam's moments and direction (arXiv 1412.6980), of whatever a method has: matrices, projections, lists of entries.

    m' = beta1 m + (1 - beta1) G        v' = beta2 v + (1 - beta2) G^2
    N  = m' / (1 - beta1^t)  /  (sqrt(v' / (1 - beta2^t)) + eps)

as ``torch.optim.AdamW`` computes them. The published codes of GaLore, Fira and MLorc leave the second bias correction
out of the sum with eps, which makes their eps larger in the first steps, and set eps to 1e-6 (MLorc: 1e-8).
"""

from collections.abc import Sequence

from torch import Tensor

from ds_mofa.options import OptionError, check_number

__all__ = ["adam_moments", "adam_direction", "check_adam"]


def adam_moments(m: Tensor, v: Tensor, G: Tensor, betas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """m' and v', of one shape with G."""
    beta1, beta2 = betas
    return beta1 * m + (1 - beta1) * G, beta2 * v + (1 - beta2) * G.square()


def adam_direction(m: Tensor, v: Tensor, t: int, betas: Sequence[float], eps: float) -> Tensor:
    """N; t is 1 in the first step."""
    beta1, beta2 = betas
    return (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)


def check_adam(betas: Sequence[float], eps: float) -> None:
    """Raise an OptionError where they cannot be Adam's."""
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise OptionError(f"betas={betas!r} must be two numbers, such as (0.9, 0.999)")
    for beta in betas:
        check_number("betas", beta, low=0, high=1)
    check_number("eps", eps, low=0, open_low=True)
