"""Which parameter goes where: the matrices to MoFaSGD, the rest to AdamW, and the table that says so."""

import dataclasses
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ds_mofa.groups import check_group
from ds_mofa.options import OptimizerOptions, OptionError

__all__ = ["Frozen", "Leftover", "Matrix", "Split", "split_parameters", "full_shape"]


@dataclasses.dataclass(eq=False)
class Matrix:
    """A 2-D weight whose momentum is kept as factors: a parameter, or one slice of a stack of them.

    Attributes:
        name: the parameter's name in the model; of a slice, one that tells it from the others.
        param: the parameter itself; under ZeRO stage 3 it may be released, so ask ``shape`` for its shape.
        shape: (m, n), of the whole matrix.
        modules: every module that holds the parameter (two, where weights are tied).
        group: index of the param group that it came from: lr and weight decay.
        index: position among all matrices; keys the rounding and the start.
        transposed: the weight is n x m of a linear map from m to n, as in the Conv1D of transformers' GPT-2.
        part: e, where the matrix is param[e] of a stacked (E, m, n) parameter; None where it is all of ``param``.
    """

    name: str
    param: nn.Parameter
    shape: tuple[int, int]
    modules: tuple[nn.Module, ...]
    group: int
    index: int
    transposed: bool = False
    part: int | None = None

    @property
    def weight(self) -> Tensor:
        """The matrix itself, (m, n), detached; only where the parameter is whole."""
        return self.param.data if self.part is None else self.param.data[self.part]

    @property
    def start(self) -> int:
        """Index of its first element in the parameter, row-major."""
        return 0 if self.part is None else self.part * math.prod(self.shape)

    @property
    def slots(self) -> list[tuple[nn.Module, str]]:
        """Where its modules hold the parameter, by the name that it has in them."""
        name = self.name.rpartition(".")[2]
        return [(module, name) for module in self.modules if name in module._parameters]

    @property
    def map_shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the linear map. One that no module tells apart is taken for y = x W^T."""
        m, n = self.shape
        return (n, m) if self.transposed else (m, n)


class Frozen(NamedTuple):
    """A parameter that was handed over with ``requires_grad`` False."""

    name: str
    param: nn.Parameter


class Leftover(NamedTuple):
    """A trained parameter that AdamW gets, and why."""

    name: str
    numel: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Split:
    """The parameters of a model, divided.

    Attributes:
        matrices: what it trains, in the order of the param groups.
        leftovers: what AdamW trains.
        matrix_groups: one param group for each incoming group that has matrices.
        adamw_groups: one param group for each incoming group that has anything else.
        title: of the matrices' optimizer.
        frozen: what of the model was not trained when it was divided, handed over or not.
    """

    matrices: list[Matrix]
    leftovers: list[Leftover]
    matrix_groups: list[dict[str, Any]]
    adamw_groups: list[dict[str, Any]]
    title: str = "MoFaSGD"
    frozen: list[Frozen] = dataclasses.field(default_factory=list)

    def summary(self) -> str:
        """One paragraph for the log: what the matrices' optimizer trains, by shape, and AdamW, by reason."""
        shapes: dict[tuple[int, int], int] = defaultdict(int)
        reasons: dict[str, list[Leftover]] = defaultdict(list)
        for matrix in self.matrices:
            shapes[matrix.shape] += 1
        for leftover in self.leftovers:
            reasons[leftover.reason].append(leftover)
        lines = [
            f"{len(self.matrices)} matrices on {self.title} "
            f"({_count(sum(m * n * count for (m, n), count in shapes.items()))} parameters), "
            f"{len(self.leftovers)} tensors on AdamW ({_count(sum(rest.numel for rest in self.leftovers))} parameters)"
        ]
        lines += [f"  {self.title:7} {count:4d} x ({m}, {n})" for (m, n), count in shapes.items()]
        for reason, rests in reasons.items():
            shown = ", ".join(rest.name for rest in rests[:2]) + (", ..." if len(rests) > 2 else "")
            numel = _count(sum(rest.numel for rest in rests))
            lines.append(f"  AdamW   {len(rests):4d} {reason}, {numel} parameters: {shown}")
        return "\n".join(lines)


def full_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter; ``zero.Init`` leaves (0,) in ``param.shape``."""
    return tuple(getattr(param, "ds_shape", param.shape))


def split_parameters(
    model: nn.Module, groups: Iterable[Any], options: OptimizerOptions, names: Mapping[nn.Parameter, str] | None = None
) -> Split:
    """Divide ``groups`` (parameters, or param groups as dicts, as for any torch optimizer).

    A parameter is a matrix when it is trained, 2-D, at least rank x rank, no embedding, no output head,
    and not excluded. Embeddings and heads are told by the modules that hold them, not by their names: a
    head is what ``get_output_embeddings()`` returns or, where it returns none, the last ``nn.Linear`` outside
    the modules with that method, if it has the shape of an embedding. A group's own ``lr`` and
    ``weight_decay`` go before the options'; its AdamW part steps at ``adamw_lr`` times its ``lr`` over the options'.

    Raises:
        OptionError: nothing is a matrix, a pattern matches nothing, ``include`` names what cannot be one, or a group
            says what :func:`ds_mofa.groups.check_group` refuses.
    """
    names = names if names is not None else {p: name for name, p in model.named_parameters()}
    holders = defaultdict(list)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            holders[param].append(module)
    heads = _output_heads(model)

    split = Split([], [], [], [], options.title)
    split.frozen.extend(Frozen(name, param) for param, name in names.items() if not param.requires_grad)
    seen: set[nn.Parameter] = set()
    matched: set[tuple[str, str]] = set()
    too_small = []
    for incoming in _as_groups(groups, options):
        settings = {key: value for key, value in incoming.items() if key != "params"}
        matrices, rest = [], []
        for param in incoming["params"]:
            if not param.requires_grad:
                continue
            if param in seen:
                raise OptionError(f"parameter {names.get(param)!r} is in two param groups: give each only once")
            seen.add(param)
            if param not in names:
                raise OptionError(
                    f"a parameter of shape {full_shape(param)} is in no module of the model, so it cannot be told "
                    "whether it is an embedding: pass the model that owns the parameters"
                )
            reason = _why_adamw(param, names[param], holders[param], heads, options, matched)
            if reason is None:
                if not param.is_contiguous():
                    raise OptionError(
                        f"the matrix {names[param]!r} is not contiguous in memory (strides {param.stride()}): set "
                        "param.data = param.data.contiguous() before the optimizer is built, or exclude it"
                    )
                matrices.append(param)
            else:
                split.leftovers.append(Leftover(names[param], math.prod(full_shape(param)), reason))
                rest.append(param)
                if reason.startswith("smaller"):
                    too_small.append(min(full_shape(param)))
        if matrices:
            for param in matrices:
                m, n = full_shape(param)
                split.matrices.append(
                    Matrix(
                        name=names[param],
                        param=param,
                        shape=(m, n),
                        modules=tuple(holders[param]),
                        group=len(split.matrix_groups),
                        index=len(split.matrices),
                        transposed=any(map(_is_transposed, holders[param])),
                    )
                )
            split.matrix_groups.append(
                {"lr": options.lr, "weight_decay": options.weight_decay, **settings, **_members(incoming, matrices)}
            )
        if rest:
            split.adamw_groups.append({**_adamw_settings(settings, options), **_members(incoming, rest)})

    for kind in ("include", "exclude"):
        for pattern in getattr(options, kind):
            if (kind, pattern) not in matched:
                raise OptionError(
                    f"{kind}: the pattern {pattern!r} matches no trained parameter. Names look like "
                    + ", ".join(repr(name) for name in list(names.values())[:3])
                )
    if not split.matrices:
        raise OptionError(
            f"{options.title} found no matrix to train: of the parameters that it was given, none is a trained 2-D "
            f"weight of at least {options.rank} x {options.rank} that is no embedding and no output head"
            + (f". Set rank to at most {max(too_small)}" if too_small else ". Use AdamW for this model")
        )
    return split


def _adamw_settings(settings: dict[str, Any], options: OptimizerOptions) -> dict[str, Any]:
    """``lr`` follows the shared schedule, ``lr_scale`` takes it to AdamW's; see MatrixOptimizer."""
    decay = settings.get("weight_decay", options.weight_decay)
    if decay != 0 and options.adamw_weight_decay is not None or "weight_decay" not in settings:
        decay = options.weight_decay if options.adamw_weight_decay is None else options.adamw_weight_decay
    return {"lr": options.lr, **settings, "lr_scale": options.adamw_lr_ratio, "weight_decay": decay}


def _members(incoming: dict[str, Any], params: list[nn.Parameter]) -> dict[str, Any]:
    """``params``, and torch's names of them where the group has names."""
    if "param_names" not in incoming:
        return {"params": params}
    names = dict(zip(incoming["params"], incoming["param_names"]))
    return {"params": params, "param_names": [names[param] for param in params]}


def _as_groups(groups: Iterable[Any], options: OptimizerOptions) -> list[dict[str, Any]]:
    loose: list[Any] = []
    dicts: list[dict[str, Any]] = []
    for item in groups:
        if isinstance(item, dict):
            check_group(item, len(dicts), options)
            params = [item["params"]] if isinstance(item["params"], Tensor) else item["params"]
            dicts.append({**item, **_named(list(params))})
        else:
            loose.append(item)
    return ([_named(loose)] if loose else []) + dicts


def _named(items: list[Any]) -> dict[str, Any]:
    """Of parameters, or of what named_parameters() gives: then with the names, as torch.optim keeps them."""
    params = [item[1] if isinstance(item, tuple) else item for item in items]
    if items and all(isinstance(item, tuple) for item in items):
        return {"params": params, "param_names": [name for name, _ in items]}
    return {"params": params}


def _why_adamw(
    param: nn.Parameter,
    name: str,
    modules: Sequence[nn.Module],
    heads: set[nn.Parameter],
    options: OptimizerOptions,
    matched: set[tuple[str, str]],
) -> str | None:
    hits = {
        kind: [pattern for pattern in getattr(options, kind) if re.search(pattern, name)]
        for kind in ("include", "exclude")
    }
    matched.update((kind, pattern) for kind, patterns in hits.items() for pattern in patterns)
    shape = full_shape(param)
    impossible = None
    if len(shape) != 2:
        impossible = "not 2-D"
    elif min(shape) < options.rank:
        impossible = f"smaller than rank {options.rank}"

    if hits["include"] and not hits["exclude"]:
        if impossible:
            raise OptionError(
                f"include: {hits['include'][0]!r} names {name!r} of shape {shape}, which cannot be a matrix of rank "
                f"{options.rank}: it is {impossible}. Narrow the pattern or lower the rank"
            )
        if any(getattr(module, "max_norm", None) is not None for module in modules):
            raise OptionError(
                f"include: {hits['include'][0]!r} names {name!r}, whose max_norm shortens rows in every forward, which the "
                "momentum of a matrix does not see: set max_norm to None, or leave it to AdamW"
            )
        return None
    if len(shape) == 2:  # what no rank would make a matrix comes before "smaller"
        if hits["exclude"]:
            return "excluded by pattern"
        if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in modules):
            return "embedding"
        if param in heads:
            return "output head"
    return impossible


def _output_heads(model: nn.Module) -> set[nn.Parameter]:
    asked: list[Any] = [
        module for module in model.modules() if callable(getattr(module, "get_output_embeddings", None))
    ]
    heads = [head for head in (module.get_output_embeddings() for module in asked) if head is not None]
    if not heads:
        # A module with the method has answered for what is in it, but not for a head that stands beside it.
        answered = {part for module in asked for part in module.modules()}
        embeddings = [full_shape(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)]
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        heads = [module for module in last if module not in answered and full_shape(module.weight) in embeddings]
    return {head.weight for head in heads if getattr(head, "weight", None) is not None}


def _is_transposed(module: nn.Module) -> bool:
    """Whether the module computes x W: by its class, which is there if anybody has made one."""
    transposed = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return transposed is not None and isinstance(module, transposed)


def _count(numel: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if numel >= limit:
            return f"{numel / limit:.2f}{unit}"
    return str(numel)
