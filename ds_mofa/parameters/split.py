"""Divides the parameters of a model: the matrices, and what AdamW trains, with the reason."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ds_mofa.groups import check_group
from ds_mofa.options import OptimizerOptions, OptionError
from ds_mofa.parameters import experts
from ds_mofa.parameters.heads import output_heads
from ds_mofa.parameters.kinds import (
    Slot,
    is_convolution,
    is_embedding,
    is_linear_map,
    is_transposed,
    other_kind,
    slots_of,
)
from ds_mofa.parameters.shapes import full_shape
from ds_mofa.parameters.summary import summary_lines, warning_lines

__all__ = ["Frozen", "Leftover", "Matrix", "Split", "full_shape", "split_parameters"]


@dataclasses.dataclass(eq=False)
class Matrix:
    """A parameter whose momentum is kept as factors: one matrix, or a stack of them, each with factors of its own.

    Attributes:
        name: the parameter's name in the model.
        param: the parameter itself; under ZeRO stage 3 it may be released, so ask ``full_shape`` for its shape.
        shape: (m, n), of the whole matrix, or of each in the stack.
        modules: every module that holds the parameter (two, where weights are tied).
        group: index of the param group that it came from: lr and weight decay.
        index: position among all of these.
        transposed: the weight is n x m of a linear map from m to n, as in the Conv1D of transformers' GPT-2.
        stack: E, where the parameter is (E, m, n), as experts are; None where it is (m, n).
        included: the option ``include`` names it.
    """

    name: str
    param: nn.Parameter
    shape: tuple[int, int]
    modules: tuple[nn.Module, ...]
    group: int
    index: int
    transposed: bool = False
    stack: int | None = None
    included: bool = False

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return self.shape if self.stack is None else (self.stack, *self.shape)

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.full_shape)

    @property
    def place(self) -> tuple[tuple[int, int], int, int | None]:
        """What :class:`ds_mofa.partition.layout.Layout` asks of it."""
        return self.shape, self.group, self.stack

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
    """A trained parameter that AdamW gets, and why; ``itemsize``: bytes of one of its numbers."""

    name: str
    numel: int
    reason: str
    itemsize: int = 4


@dataclasses.dataclass(frozen=True)
class Split:
    """The parameters of a model, divided.

    Attributes:
        matrices: what it trains, in the order of the param groups.
        leftovers: what AdamW trains.
        matrix_groups: one param group for each incoming group that has matrices.
        adamw_groups: one param group for each incoming group that has anything else.
        options: of the optimizer, by which it was divided.
        frozen: what of the model was not trained when it was divided, handed over or not.
    """

    matrices: list[Matrix]
    leftovers: list[Leftover]
    matrix_groups: list[dict[str, Any]]
    adamw_groups: list[dict[str, Any]]
    options: OptimizerOptions
    frozen: list[Frozen] = dataclasses.field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the trained parameters, what part the matrices are."""
        matrices = sum(matrix.numel for matrix in self.matrices)
        return matrices / max(1, matrices + sum(rest.numel for rest in self.leftovers))

    def summary(self) -> str:
        """For the log: what the matrices' optimizer trains, by shape, and AdamW, by reason; and the warning if there is
        one.
        """
        rates = [group["lr"] for group in self.matrix_groups], [g["lr"] * g["lr_scale"] for g in self.adamw_groups]
        table = summary_lines([matrix.full_shape for matrix in self.matrices], self.leftovers, self.options, *rates)
        return "\n".join([*table, *warning_lines(self.share, self.leftovers, self.options)])


def split_parameters(
    model: nn.Module, groups: Iterable[Any], options: OptimizerOptions, names: Mapping[nn.Parameter, str] | None = None
) -> Split:
    """Divide ``groups`` (parameters, or param groups as dicts, as for any torch optimizer).

    A parameter is a matrix when it is trained, 2-D, at least rank x rank, the weight of a linear map
    (:mod:`ds_mofa.parameters.kinds`), no embedding, no output head (:mod:`ds_mofa.parameters.heads`), and not
    excluded; or when ``include`` names it, whatever it is, and ``exclude`` does not. Stacked experts (E, m, n) are a stack
    of matrices, and so is any other (E, m, n) that ``include`` names. A group's own ``lr`` and
    ``weight_decay`` go before the options'; its AdamW part steps at ``adamw_lr`` times its ``lr`` over the options'.

    Raises:
        OptionError: nothing is a matrix, a pattern matches nothing, ``include`` names what cannot be one, a parameter
            has no shape yet, or a group says what :func:`ds_mofa.groups.check_group` refuses.
    """
    names = names if names is not None else {p: name for name, p in model.named_parameters()}
    _refuse_lazy(model)
    experts.refuse(model)
    slots = slots_of(model)
    heads = output_heads(model, slots)

    split = Split([], [], [], [], options)
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
            reason = _why_adamw(param, names[param], slots[param], heads, options, matched)
            if reason is None:
                if not param.is_contiguous():
                    raise OptionError(
                        f"the matrix {names[param]!r} is not contiguous in memory (strides {param.stride()}): set "
                        "param.data = param.data.contiguous() before the optimizer is built, or exclude it"
                    )
                matrices.append(param)
            else:
                numel = math.prod(full_shape(param))
                split.leftovers.append(Leftover(names[param], numel, reason, param.element_size()))
                rest.append(param)
                if reason.startswith("smaller"):
                    too_small.append(min(full_shape(param)[-2:]))
        if matrices:
            for param in matrices:
                *stack, m, n = full_shape(param)
                modules = _holders(param, slots[param])
                split.matrices.append(
                    Matrix(
                        name=names[param],
                        param=param,
                        shape=(m, n),
                        modules=modules,
                        group=len(split.matrix_groups),
                        index=len(split.matrices),
                        transposed=any(map(is_transposed, modules)),
                        stack=stack[0] if stack else None,
                        included=any(re.search(pattern, names[param]) for pattern in options.include),
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
            f"weight of a linear map of at least {options.rank} x {options.rank} that is no embedding and no output head"
            + (f". Set rank to at most {max(too_small)}" if too_small else _else_than_rank(split.leftovers))
        )
    return split


def _refuse_lazy(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if isinstance(param, nn.parameter.UninitializedParameter):
            place, _, slot = name.rpartition(".")
            kind = type(model.get_submodule(place)).__name__
            raise OptionError(
                f"{name!r} has no shape yet, so it cannot be told whether it is a matrix: its {kind} makes its {slot} in "
                "the first forward. Call the model once on an input, under torch.no_grad(), before the optimizer is "
                "built; or give the module its sizes"
            )


def _holders(param: nn.Parameter, slots: Sequence[Slot]) -> tuple[nn.Module, ...]:
    """The modules whose own parameter it is, each once."""
    modules = [module for module, _ in slots if any(own is param for own in module._parameters.values())]
    return tuple(dict.fromkeys(modules))


def _else_than_rank(leftovers: Sequence[Leftover]) -> str:
    bare = [rest.name for rest in leftovers if rest.reason.startswith("2-D in")]
    if bare:
        return f". If {bare[0]!r} is the weight of a linear map, name it by include"
    return ". Use AdamW for this model"


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
    slots: Sequence[Slot],
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
    if len(shape) not in (2, 3):
        impossible = "neither a matrix nor a stack of them"
    elif is_convolution(slots):
        impossible = "a convolution"
    elif min(shape[-2:]) < options.rank:
        impossible = f"smaller than rank {options.rank}"

    if hits["include"] and not hits["exclude"]:
        if impossible:
            raise OptionError(
                f"include: {hits['include'][0]!r} names {name!r} of shape {shape}, which cannot be a matrix of rank "
                f"{options.rank}: it is {impossible}. Narrow the pattern or lower the rank"
            )
        if any(getattr(module, "max_norm", None) is not None for module, _ in slots):
            raise OptionError(
                f"include: {hits['include'][0]!r} names {name!r}, whose max_norm shortens rows in every forward, which the "
                "momentum of a matrix does not see: set max_norm to None, or leave it to AdamW"
            )
        return None
    if len(shape) == 2:  # what no rank would make a matrix comes before "smaller"
        if hits["exclude"]:
            return "excluded by pattern"
        if is_embedding(slots):
            return "embedding"
        if param in heads:
            return "output head"
        if not is_linear_map(param, slots):
            return other_kind(param, name, slots)
        return impossible
    if len(shape) == 3 and experts.is_experts(param, slots):
        return "excluded by pattern" if hits["exclude"] else impossible
    return other_kind(param, name, slots)
