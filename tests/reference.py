"""MoFaSGD once more, dense, in float64 and in one process: what every backend and stage must agree with.

Nothing here is fast or small. Gradients are autograd's, whole; the momentum is a dense m x n matrix whose rank is
r; a projection is an m x m matrix. Only the three things that are random by definition are shared with the
package's conventions: the seeded test matrices of the first step, the fixed columns that fill a basis up, and the signs
that are explored along.

A matrix without a gradient, or whose gradient is zero, does nothing in that step: no momentum, no update, no decay, no
part in ``balance``'s mean.
"""

import math

import torch
from torch import Tensor, nn

from ds_mofa.kernels.random_bits import Rounding, rounding_key
from ds_mofa.linalg.exploring import sign_words, signs

__all__ = ["DenseMomentum", "Reference", "random_columns"]


def random_columns(shapes: list[tuple[int, int]], k: int, steps: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """F (m x k) and E (n x k) of every matrix in a step: 32 signs a word, and the words counted through all of them."""
    found, first = [], 0
    for shape in shapes:
        pair = []
        for rows in shape:
            words = sign_words(
                torch.arange(first, first + -(-rows * k // 32)), rounding_key(Rounding(0, seed, steps), -1)
            )
            pair.append(signs(words)[: rows * k].view(rows, k).double() / math.sqrt(rows))
            first += len(words)
        found.append(tuple(pair))
    return found


def test_matrices(shape: tuple[int, ...], rank: int, *, index: int, seed: int) -> tuple[Tensor, Tensor]:
    """Psi (m x r) and Omega (n x r) of the first step, of a stack (E, ., r): its matrices' are drawn together."""
    *stack, m, n = shape
    generator = torch.Generator().manual_seed(rounding_key(Rounding(False, seed), index))
    psi, omega = (torch.randn(*stack, size, rank, generator=generator) / math.sqrt(rank) for size in (m, n))
    return psi.double(), omega.double()


test_matrices.__test__ = False  # no test of pytest's


class DenseMomentum:
    """The momentum of one m x n matrix: ``M``, dense, of rank at most r, with bases of its two subspaces.

    Attributes:
        M: m x n.
        left, right: m x r and n x r, orthonormal, spanning the column and row space of M and, where M has
            fewer than r directions, fixed ones besides.
        seen: which rows, and which columns, of a gradient have not been all zero so far. What is fixed or random stays
            out of the others.
    """

    def __init__(self, shape: tuple[int, int], rank: int, *, index: int, seed: int = 0, tests=None):
        self.rank = rank
        self.M = torch.zeros(shape, dtype=torch.float64)
        self.left = self.right = None
        self.seen = tuple(torch.zeros(size, dtype=torch.bool) for size in shape)
        self.psi, self.omega = tests or test_matrices(shape, rank, index=index, seed=seed)

    def wait(self) -> None:
        """A step without a gradient: before the first one, what meets it is a projection onto random directions."""
        if self.left is None:
            self.left, self.right = torch.linalg.qr(self.psi).Q, torch.linalg.qr(self.omega).Q
            self.seen = tuple(torch.ones_like(seen) for seen in self.seen)  # they reach all rows

    def square_norm(self, G: Tensor) -> Tensor:
        """|G_hat|^2, which clipping counts; in the first step its estimate from the two sketches."""
        if self.left is None:
            return ((G @ self.omega).square().sum() + (G.mT @ self.psi).square().sum()) / 2
        return self.tangent(G).square().sum()

    def tangent(self, G: Tensor) -> Tensor:
        """The projection of G onto the tangent space at M (Theorem 4.3 of the paper)."""
        P_left, P_right = self.left @ self.left.mT, self.right @ self.right.mT
        return P_left @ G + G @ P_right - P_left @ G @ P_right

    def move(self, G: Tensor, beta: float) -> None:
        """M <- the best rank-r approximation of beta M + (1 - beta) G_hat."""
        if self.left is None:
            M, kept = (1 - beta) * self._first_look(G), (self.rank + 1) // 2
        else:
            M, kept = beta * self.M + (1 - beta) * self.tangent(G), self.rank
        U, sigma, Vt = torch.linalg.svd(M, full_matrices=False)
        self.M = U[:, :kept] * sigma[:kept] @ Vt[:kept]
        self.seen = self._seen_with(G)
        bases = U[:, :kept], Vt[:kept].mT
        self.left, self.right = (_fill_up(basis, self.rank, seen) for basis, seen in zip(bases, self.seen))

    def direction(self) -> Tensor:
        """U V^T over the directions that hold momentum."""
        U, sigma, Vt = torch.linalg.svd(self.M, full_matrices=False)
        live = sigma > 1e-7 * sigma[0]
        return U[:, live] @ Vt[live]

    def beside(self, G: Tensor, F: Tensor, E: Tensor) -> Tensor:
        """A E^T + F B^T, A and B the polar factors of G_perp E and G_perp^T F; before :meth:`move`."""
        if self.left is None:
            return torch.zeros_like(G)
        P_left, P_right = (torch.eye(len(one), dtype=one.dtype) - one @ one.mT for one in (self.left, self.right))
        rest = P_left @ G @ P_right
        F, E = (signs * seen[:, None] for signs, seen in zip((F, E), self._seen_with(G)))
        return _polar(rest @ E, G @ E) @ E.mT + F @ _polar(rest.mT @ F, G.mT @ F).mT

    def _seen_with(self, G: Tensor) -> tuple[Tensor, Tensor]:
        return self.seen[0] | G.any(dim=1), self.seen[1] | G.any(dim=0)

    def _first_look(self, G: Tensor) -> Tensor:
        """Q (Psi^T Q)^+ (G^T Psi)^T, Q the leading ceil(r / 2) left singular vectors of G Omega."""
        Q = torch.linalg.svd(G @ self.omega, full_matrices=False).U[:, : (self.rank + 1) // 2]
        return Q @ torch.linalg.pinv(self.psi.mT @ Q) @ (self.psi.mT @ G)


def _polar(H: Tensor, whole: Tensor) -> Tensor:
    """P Q^T over the singular values of H that are not rounding beside ``whole``, of which H is a part."""
    P, sigma, Qt = torch.linalg.svd(H, full_matrices=False)
    live = sigma > 1e-10 * whole.norm()
    return P[:, live] @ Qt[live]


def _fill_up(basis: Tensor, rank: int, seen: Tensor) -> Tensor:
    """``basis`` and as many seeded columns as make ``rank``, orthonormal; zero in the rows that are not ``seen``."""
    missing = rank - basis.shape[1]
    fill = torch.randn(len(basis), missing, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fill = fill * seen[:, None] if seen.sum() >= rank else fill
    return torch.linalg.qr(torch.cat([basis, fill], dim=1)).Q


class DenseStack:
    """The momenta of a stack (E, m, n), one by one; a matrix without a gradient does nothing."""

    def __init__(self, shape: tuple[int, int, int], rank: int, *, index: int, seed: int = 0):
        psi, omega = test_matrices(shape, rank, index=index, seed=seed)
        self.parts = [DenseMomentum(shape[1:], rank, index=index, tests=some) for some in zip(psi, omega)]
        self.moved = torch.zeros(shape[0], dtype=torch.bool)

    @property
    def M(self) -> Tensor:
        return torch.stack([part.M for part in self.parts])

    def square_norm(self, G: Tensor) -> Tensor:
        return sum(part.square_norm(own) for part, own in zip(self.parts, G))

    def wait(self) -> None:
        self.moved[:] = False
        for part in self.parts:
            part.wait()

    def move(self, G: Tensor, beta: float) -> None:
        self.moved = G.flatten(1).any(1)
        for part, own, moves in zip(self.parts, G, self.moved):
            part.move(own, beta) if moves else part.wait()

    def direction(self) -> Tensor:
        return torch.stack([part.direction() if moves else 0 * part.M for part, moves in zip(self.parts, self.moved)])

    def beside(self, G: Tensor, signs: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([part.beside(own, F, E) for part, own, (F, E) in zip(self.parts, G, signs)])


class Reference:
    """Trains ``model`` in float64: ``matrices`` by MoFaSGD, its other trained parameters by AdamW.

    Args:
        model: becomes float64 where it is.
        matrices: names, in the order of the model's parameters.
        lr, adamw_lr: constants, or functions of the step's number, from 1. AdamW's is the matrices' unless given.
        no_decay: names of AdamW parameters without weight decay.
        clip: to this norm, of the gradients of all.
        clip_apart: beginnings of names; those are clipped to it by a norm of their own, and the others by theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: list[str],
        *,
        lr,
        rank: int,
        beta: float,
        adamw_lr=None,
        weight_decay: float = 0.0,
        adamw_eps: float = 1e-8,
        no_decay=(),
        clip: float = 0.0,
        clip_apart: tuple[str, ...] = (),
        balance: float = 0.0,
        explore: int = 0,
        explore_scale: float = 1.0,
        seed: int = 0,
    ):
        self.model = model.double()
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.momenta, number = {}, 0
        for name in matrices:
            shape = tuple(self.params[name].shape)
            kind = DenseMomentum if len(shape) == 2 else DenseStack
            self.momenta[name] = kind(shape, rank, index=number, seed=seed)
            number += math.prod(shape[:-2])
        self.explore, self.explore_scale, self.seed = explore, explore_scale, seed
        self.moments = {name: (0.0, 0.0) for name in self.params if name not in self.momenta}
        self.clip_apart = tuple(clip_apart)
        self.lr = lr if callable(lr) else lambda step: lr
        if adamw_lr is None:
            self.adamw_lr = self.lr
        else:
            self.adamw_lr = adamw_lr if callable(adamw_lr) else lambda step: adamw_lr
        self.beta, self.weight_decay, self.eps, self.clip = beta, weight_decay, adamw_eps, clip
        self.no_decay, self.balance = set(no_decay), balance
        self.steps = 0
        self.norm: float | list[float] | None = None

    def step(self, batch) -> float:
        """One step on the whole of a global batch; its loss before the step.

        ``norm`` is the combined one; with ``clip_apart`` a list of two, that of the others last.
        """
        loss = self.model(*batch)
        loss.backward()
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.params.items()}
        apart = {name: grad for name, grad in grads.items() if name.startswith(self.clip_apart)}
        norms = [self._clip(apart)] if apart else []
        norms.append(self._clip({name: grad for name, grad in grads.items() if name not in apart}))
        self.norm = norms if apart else norms[0]
        self.steps += 1
        with torch.no_grad():
            self.beside = self._directions_beside(grads)
            self.moving = {name for name in self.momenta if grads[name].any()}
            for name, momentum in self.momenta.items():
                if name in self.moving:
                    momentum.move(grads[name], self.beta)
                else:
                    momentum.wait()
            for name, param in self.params.items():
                if name in self.moving:
                    self._move_matrix(name, param, grads[name])
                elif name not in self.momenta:
                    self._move_by_adamw(name, param, grads[name])
                param.grad = None
        return loss.item()

    @torch.no_grad()
    def loss(self, batch) -> float:
        return self.model(*batch).item()

    def weights(self) -> dict[str, Tensor]:
        return {name: param.detach().clone() for name, param in self.model.named_parameters()}

    def _clip(self, grads: dict[str, Tensor]) -> float:
        """Scale these down to a common norm of at most ``clip``; their norm before that."""
        norm = self._combined_norm(grads)
        for grad in grads.values():
            grad.mul_(min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0)
        return norm

    def _combined_norm(self, grads: dict[str, Tensor]) -> float:
        squares = [
            self.momenta[name].square_norm(grad) if name in self.momenta else grad.square().sum()
            for name, grad in grads.items()
        ]
        return math.sqrt(sum(float(square) for square in squares))

    def _move_matrix(self, name: str, param: Tensor, grad: Tensor) -> None:
        lr, momentum = self.lr(self.steps), self.momenta[name]
        if isinstance(momentum, DenseStack):
            self._move_stack(param, momentum, name)
            return
        sizes = [float(self.momenta[other].M.norm()) for other in self.moving]
        mean = math.prod(size for size in sizes if size) ** (1 / max(1, sum(size > 0 for size in sizes)))
        factor = (mean / float(momentum.M.norm() or mean)) ** self.balance
        param.mul_(1 - lr * self.weight_decay)
        factor = min(10.0, max(0.1, factor))
        length = self.explore_scale * math.sqrt(min(param.shape) / max(1, self.explore))
        direction = momentum.direction() + length * self.beside[name]
        param.sub_(factor * lr * math.sqrt(max(param.shape)) * direction)

    def _move_stack(self, param: Tensor, momentum: DenseStack, name: str) -> None:
        assert not self.balance, "the reference balances no stacks"
        lr, shape = self.lr(self.steps), param.shape[1:]
        length = self.explore_scale * math.sqrt(min(shape) / max(1, self.explore))
        update = math.sqrt(max(shape)) * (momentum.direction() + length * self.beside[name])
        moved = momentum.moved.view(-1, 1, 1)
        param.copy_(torch.where(moved, param * (1 - lr * self.weight_decay) - lr * update, param))

    def _directions_beside(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.explore:
            return dict.fromkeys(self.momenta, 0.0)
        stacks = {name: tuple(self.params[name].shape) for name in self.momenta}
        shapes = [shape[-2:] for shape in stacks.values() for _ in range(math.prod(shape[:-2]))]
        drawn, found = iter(random_columns(shapes, self.explore, self.steps - 1, self.seed)), {}
        for name, momentum in self.momenta.items():
            signs = [next(drawn) for _ in range(math.prod(stacks[name][:-2]))]
            one = isinstance(momentum, DenseMomentum)
            found[name] = momentum.beside(grads[name], *signs[0]) if one else momentum.beside(grads[name], signs)
        return found

    def _move_by_adamw(self, name: str, param: Tensor, grad: Tensor) -> None:
        lr, decay = self.adamw_lr(self.steps), 0.0 if name in self.no_decay else self.weight_decay
        first, second = self.moments[name]
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad.square()
        self.moments[name] = first, second
        debiased = first / (1 - 0.9**self.steps)
        root = (second / (1 - 0.999**self.steps)).sqrt()
        param.mul_(1 - lr * decay)
        param.sub_(lr * debiased / (root + self.eps))
