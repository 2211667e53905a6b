"""A model's linears and token embedding replaced by tensor trains, and back."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ds_mofa.options import OptionError, Options
from ds_mofa.parameters import split_parameters
from experiments.baselines.comera.layers import TensorTrain, TensorTrainEmbedding, TensorTrainLinear
from experiments.baselines.comera.trains import bounded_ranks, factors, gaussian_cores, padded_factors, tt_svd

__all__ = ["Shape", "densify", "tensorize"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """How weights become trains.

    Attributes:
        rank: of the linears' bonds at the start, where a tensor of their dimensions has as much.
        embedding_rank: of the embedding's bonds.
        order: factors of each side of a linear: 2 * order cores.
        embedding_order: factors of rows and of columns: as many cores.
        init: "random", so that the product has mean 0 and the standard deviation of the dense weight that it replaces,
            or "svd", the dense weight itself as far as the ranks hold it.
        threshold: at or below which an entry of a diagonal is zero.
    """

    rank: int
    embedding_rank: int
    order: int
    embedding_order: int
    init: Literal["random", "svd"]
    threshold: float


def tensorize(model: nn.Module, shape: Shape, options: Options) -> dict[str, TensorTrain]:
    """Replace, in place, what can be and what gains by it; returns the new layers by name.

    These are the ``nn.Linear`` whose weights MoFaSGD would take as matrices (:func:`ds_mofa.parameters.split_parameters`:
    neither heads nor what ``exclude`` names), and the token embedding: what ``get_input_embeddings`` returns, or without
    such a method every ``nn.Embedding``. Left as they are, and trained by AdamW: subclasses, weights that two modules
    share, dimensions without ``order`` factors above 1, and trains that would be no smaller than the weight.

    Raises:
        OptionError: nothing can be replaced, or a pattern of ``options`` is wrong.
    """
    matrices = {id(matrix.param) for matrix in split_parameters(model, model.parameters(), options).matrices}
    owners: dict[int, int] = {}
    for module in model.modules():
        for param in module._parameters.values():
            owners[id(param)] = owners.get(id(param), 0) + 1
    embeddings = _token_embeddings(model)
    made: dict[str, TensorTrain] = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            wanted = id(module.weight) in matrices
        else:
            wanted = module in embeddings and not any(re.search(p, f"{name}.weight") for p in options.exclude)
        if wanted and owners[id(module.weight)] == 1:
            train = _train(module, shape)
            if train is not None:
                _replace(model, module, train)
                made[name] = train
    if not made:
        raise OptionError(
            f"no weight of this model becomes smaller as a tensor train of rank {shape.rank}: lower rank or order"
        )
    return made


@torch.no_grad()
def densify(model: nn.Module) -> nn.Module:
    """Put dense linears and embeddings with the same weights in the place of trains; returns the model."""
    for module in list(model.modules()):
        if not isinstance(module, TensorTrain):
            continue
        weight = module.dense()
        # Built without numbers: the weight is put in afterwards, and drawing another would move the global generator.
        if isinstance(module, TensorTrainLinear):
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            dense.bias = module.bias
        else:
            dense = nn.Embedding(*weight.shape, device="meta")
        dense.weight = nn.Parameter(weight.contiguous())
        dense.train(module.training)
        _replace(model, module, dense)
    return model


def _token_embeddings(model: nn.Module) -> list[nn.Module]:
    if hasattr(model, "get_input_embeddings"):
        found = [model.get_input_embeddings()]
    else:
        found = list(model.modules())
    return [
        module
        for module in found
        if type(module) is nn.Embedding
        and module.weight.requires_grad
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    ]


def _train(module: nn.Module, shape: Shape) -> TensorTrain | None:
    """The train in a module's place, None where it has no factors or saves nothing."""
    weight = module.weight.detach()
    if type(module) is nn.Linear:
        (m, n), order, rank = weight.shape, shape.order, shape.rank
        inputs, outputs = factors(n, order), factors(m, order)
        if inputs is None or outputs is None:
            return None
        dims = (*inputs[::-1], *outputs)  # the largest at the ends, where ranks are small
    else:
        (V, e), order, rank = weight.shape, shape.embedding_order, shape.embedding_rank
        rows, columns = padded_factors(V, order), factors(e, order)
        if rows is None or columns is None:
            return None
        dims = tuple(row * column for row, column in zip(rows, columns))
    ranks = bounded_ranks(dims, rank)
    if sum(left * dim * right for left, dim, right in zip(ranks, dims, ranks[1:])) >= weight.numel():
        return None
    if shape.init == "random":
        cores = gaussian_cores(dims, ranks, float(weight.float().std()), weight)
    elif type(module) is nn.Linear:
        cores = tt_svd(weight.mT.reshape(dims), ranks)
    else:
        cores = tt_svd(_interleaved(weight, rows, columns), ranks)
    if type(module) is nn.Linear:
        train: TensorTrain = TensorTrainLinear(cores, shape.threshold, module.bias)
    else:
        train = TensorTrainEmbedding(cores, shape.threshold, rows, V)
    return train.train(module.training)


def _interleaved(table: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """(v_1 e_1, ..., v_K e_K) of a table (V, e), whose missing rows are zero."""
    padded = torch.cat([table, table.new_zeros(math.prod(rows) - len(table), table.shape[1])])
    order = [axis for k in range(len(rows)) for axis in (k, k + len(rows))]
    dims = [row * column for row, column in zip(rows, columns)]
    return padded.reshape(*rows, *columns).permute(order).reshape(dims)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever the model holds ``old``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)
