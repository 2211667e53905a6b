"""AdamW with 8-bit moments: torchao's arithmetic and number format, on whole parameters and on ZeRO's flat partitions.

torchao's own ``AdamW8bit`` keeps a moment in 8 bits where a tensor has 4096 elements and a multiple of 256, and in full
otherwise, without a word: a flat partition that is 2 elements longer would cost four times as much. It takes its
learning rate as a tensor that nobody replaces, steps a tensor of any size at once, and compiles on a CPU too. Hence the
loop around it here:

*Pieces.* A parameter is stepped in pieces of whole blocks, of one size, so its temporaries are those of a piece, the
compiler meets few shapes, and in a tensor of 2^31 elements and more it indexes within 32 bits. What is left past the
last whole block, 255 elements at most, has moments in fp32.

*Plain tensors.* Codes and scales are state of their own, so that checkpoints hold no objects of a library and DeepSpeed
does not take a moment for one that it may cut.

*No second moment of zero.* Where an element's gradients are below 5e-4 of its block's largest, its second moment rounds
to zero while its first does not; with no gradient in the next step, as for a token that does not occur, the update
would be first moment / eps. The smallest code above zero takes its place.
"""

import contextlib
import functools
import logging
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ds_mofa.kernels.random_bits import mix
from ds_mofa.options import OptimizerOptions, OptionError
from ds_mofa.parameters import is_sharded

__all__ = ["AdamW8bit", "BLOCK", "SMALLEST", "check_states", "moment_bytes", "rounding_seed"]

BLOCK = 256  # elements that share a scale
SMALLEST = 4096  # elements: below, moments are in fp32, as with torchao and bitsandbytes
_PIECE = 1 << 24  # elements of a parameter that are stepped at once

_COMPILED_ON = frozenset({"cuda"})  # elsewhere a compiler may be missing, and speed is not the point

_MOMENTS = ("exp_avg", "exp_avg_sq")  # the second has no sign


def moment_bytes(numel: int) -> int:
    """Bytes of one moment of a parameter, or flat partition, of ``numel`` elements."""
    coded = _coded(numel)
    return coded + coded // BLOCK * 4 + (numel - coded) * 4


class AdamW8bit(torch.optim.Optimizer):
    """AdamW, with both moments in blocks of 256 8-bit codes and an fp32 scale (Dettmers et al., arXiv 2110.02861).

    The arithmetic is torchao's, in fp32; on CUDA it is compiled, elsewhere it runs as it is. State of a parameter of
    n >= 4096 elements, of each moment ``exp_avg`` and ``exp_avg_sq``: ``_codes`` (n // 256, 256) uint8, ``_scales``
    (n // 256,) fp32, and where 256 does not divide n ``_rest`` (n % 256,) fp32. That of a smaller one is the moment
    itself, fp32.

    Args:
        params: parameters or param groups; each of them contiguous.
        options: of MoFaSGD; ``lr``, ``adamw_betas``, ``adamw_eps``, ``rounding`` (of updates into bf16 parameters, which
            ``"stochastic"`` makes right in the mean; fp32 ones, ZeRO's masters for one, need none) and ``seed`` are
            read.

    Raises:
        OptionError: torchao is missing or of another layout, or a parameter is not contiguous.
    """

    def __init__(self, params: Iterable[Any], options: OptimizerOptions):
        self._torchao = _torchao()
        self._maps: dict[tuple[bool, torch.device], Tensor] = {}
        self._stochastic, self._seed = options.rounding == "stochastic", options.seed
        defaults = {
            "lr": options.lr,
            "betas": tuple(options.adamw_betas),
            "eps": options.adamw_eps,
            "weight_decay": 0.0,
        }
        super().__init__(params, defaults)
        for param in self._params():
            if not param.is_contiguous():
                raise OptionError(
                    f"adamw_states='8bit': a parameter of shape {tuple(param.shape)} is not contiguous in memory "
                    f"(strides {param.stride()}): set param.data = param.data.contiguous() before the optimizer is built"
                )

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = ((group, param) for group in self.param_groups for param in group["params"])
        for index, (group, param) in enumerate(members):
            if param.grad is not None:
                self._step(param, param.grad, group, index)
        return loss

    def summary(self, params: Iterable[Tensor] | None = None) -> str:
        """One line: how many of the parameters have 8-bit moments.

        Args:
            params: what will be stepped; by default what the param groups hold.
        """
        sizes = [param.numel() for param in (self._params() if params is None else params)]
        coded, whole = sum(map(_coded, sizes)), sum(sizes)
        line = f"AdamW's moments have 8 bits for {coded:,} of {whole:,} parameters"
        if coded < whole:
            line += f", 32 for {whole - coded:,} (tensors below {SMALLEST} elements, or past the last block of {BLOCK})"
        return line

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of the same parameters, which :func:`check_states` has let pass.

        Raises:
            ValueError: the groups do not fit.
        """
        super().load_state_dict({**state_dict, "state": {}})  # which would cast codes to the parameter's dtype
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, param in zip(saved, self._params(), strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[param][name] = value.to("cpu" if name == "step" else param.device, copy=True)

    def check_whole(self) -> None:
        """Refuse sharded parameters.

        Raises:
            OptionError: there is one.
        """
        if any(map(is_sharded, self._params())):
            raise OptionError(
                "adamw_states='8bit' is not served under fully_shard: set adamw_states='full', or use DeepSpeed's ZeRO"
            )

    @staticmethod
    def new_state(param: Tensor) -> dict[str, Tensor]:
        """Of a parameter before its first step."""
        return _new_state(param)

    # ------------------------------------------------------------------ one parameter

    def _step(self, param: Tensor, grad: Tensor, group: Mapping[str, Any], index: int) -> None:
        if grad.is_sparse:
            raise OptionError(
                "adamw_states='8bit' does not take sparse gradients: build the embedding without sparse=True"
            )
        state = self.state[param]
        if "step" not in state:
            state.update(self.new_state(param))
        state["step"] = state["step"] + 1
        values, grad = param.detach().view(-1), grad.reshape(-1)
        stochastic = self._stochastic and param.dtype == torch.bfloat16
        # On the device: numbers would be compiled in, and tensors on the host would need a host compiler.
        step, lr = (
            torch.full((), float(number), dtype=torch.float32, device=param.device)
            for number in (state["step"], group["lr"])
        )
        constants = (*group["betas"], group["weight_decay"], group["eps"], True, stochastic)
        key = rounding_seed(self._seed, int(state["step"]), index, len(self._params())) if stochastic else None
        with self._update(param.device) as update, _random_bits(param.device, key):
            for view, at in self._pieces(state, param.numel()):
                shape = view["exp_avg"].shape
                update(values[at].view(shape), grad[at].view(shape), step, *view.values(), None, lr, *constants)
        if "exp_avg_sq_codes" in state:
            state["exp_avg_sq_codes"].clamp_(min=1)

    def _pieces(self, state: Mapping[str, Any], numel: int) -> Iterator[tuple[dict[str, Tensor], slice]]:
        """Both moments of each piece, and where it lies in the flat parameter."""
        coded = _coded(numel)
        for start in range(0, coded, _PIECE):
            stop = min(start + _PIECE, coded)
            blocks = slice(start // BLOCK, stop // BLOCK)
            yield {name: self._moment(state, name, blocks) for name in _MOMENTS}, slice(start, stop)
        if coded < numel:
            rest = "_rest" if coded else ""
            yield {name: state[name + rest].view(-1) for name in _MOMENTS}, slice(coded, numel)

    def _moment(self, state: Mapping[str, Any], name: str, blocks: slice) -> Tensor:
        codes, scales = state[f"{name}_codes"][blocks], state[f"{name}_scales"][blocks]
        signed = name == "exp_avg"
        return self._torchao.OptimState8bit(codes, scales, self._map(signed, codes.device), signed, dtype=torch.float32)

    def _map(self, signed: bool, device: torch.device) -> Tensor:
        """The value of each code, (256,) fp32."""
        if (signed, device) not in self._maps:
            self._maps[signed, device] = torch.tensor(self._torchao.maps[signed], dtype=torch.float32, device=device)
        return self._maps[signed, device]

    @contextlib.contextmanager
    def _update(self, device: torch.device) -> Iterator[Any]:
        function = self._torchao.single_param_adam
        if device.type not in _COMPILED_ON:
            yield function
            return
        from torch._dynamo.utils import disable_cache_limit

        with disable_cache_limit():  # as many graphs as there are shapes, and no more
            yield _compiled(function)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]


@functools.cache
def _compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def check_states(state_dict: Mapping[str, Any] | None, eight_bit: bool) -> None:
    """Refuse AdamW's state of the other ``adamw_states``.

    Raises:
        ValueError: it says which one to set.
    """
    for one in (state_dict or {}).get("state", {}).values():
        coded = "exp_avg_codes" in one
        whole = isinstance(one.get("exp_avg"), Tensor) and _coded(one["exp_avg"].numel()) > 0
        if coded and not eight_bit or whole and eight_bit:
            there, here = ("8bit", "full") if coded else ("full", "8bit")
            raise ValueError(
                f"the state was saved with adamw_states='{there}', this run has '{here}': set adamw_states='{there}', "
                "or start from the weights alone"
            )


def _coded(numel: int) -> int:
    """How many of a parameter's elements have 8-bit moments: the first so many."""
    return numel // BLOCK * BLOCK if numel >= SMALLEST else 0


def _new_state(param: Tensor) -> dict[str, Tensor]:
    numel, coded = param.numel(), _coded(param.numel())
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": param.device}
    state = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}
    for name in _MOMENTS:
        if not coded:
            state[name] = torch.zeros_like(param, dtype=torch.float32)
            continue
        state[f"{name}_codes"] = torch.zeros(coded // BLOCK, BLOCK, dtype=torch.uint8, device=param.device)
        state[f"{name}_scales"] = torch.zeros(coded // BLOCK, **fp32)
        if coded < numel:
            state[f"{name}_rest"] = torch.zeros(numel - coded, **fp32)
    return state


def rounding_seed(seed: int, step: int, index: int, count: int) -> int:
    """32 bits that seed the rounding of parameter ``index`` of ``count`` in a step; its elements take numbers in turn.

    No two steps and parameters of a run have the same, until 2^32 of them: their number is hashed one to one.
    """
    return mix((step * count + index ^ mix(seed + 0x9E3779B9 & 0xFFFFFFFF)) & 0xFFFFFFFF)


@contextlib.contextmanager
def _random_bits(device: torch.device, seed: int | None) -> Iterator[None]:
    """Within: the default generator starts from ``seed``, so that a resumed run rounds alike; then it is as before."""
    if seed is None:
        yield
        return
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    else:
        generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


@functools.cache
def _torchao() -> types.SimpleNamespace:
    log = logging.getLogger("torchao")  # where it says that its CUDA libraries, of no use here, do not load on a CPU
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from torchao.optim.adam import single_param_adam
        from torchao.optim.quant_utils import create_dynamic_map
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise OptionError(
            f"adamw_states='8bit' computes with torchao 0.18 ({error}): pip install 'ds_mofa[adamw8bit]', or set "
            "adamw_states='full'"
        ) from error
    finally:
        log.setLevel(level)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # it computes them in whatever that is, and wherever
    try:
        with torch.device("cpu"):
            maps = {signed: create_dynamic_map(signed) for signed in (True, False)}
    finally:
        torch.set_default_dtype(default)
    return types.SimpleNamespace(single_param_adam=single_param_adam, OptimState8bit=OptimState8bit, maps=maps)
