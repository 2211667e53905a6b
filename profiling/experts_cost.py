"""What the sketches of stacked experts cost beside the experts' own products, on one GPU.

    python profiling/experts_cost.py
    python profiling/experts_cost.py --models Qwen3-30B-A3B --tokens 8192 --columns 16 40 --output out/experts.jsonl

For the experts of one layer, both stacks, in bf16 with random weights: milliseconds of the forward, of the backward's dX
and of the dense dW of all experts, which AdamW needs, by torch's grouped_mm; and of the sketches of all experts in its
place, by ds_mofa's kernel and by grouped_mm. ``share`` is the kernel's time over that of forward and dX. ``of_tokens``: the
kernel finds the rows of gate_up_proj's inputs by their token, of which each stands once in memory. Neither the activation
nor the router is in it. Tokens choose their experts at random; ``--spread`` says how unlike the experts are in
popularity: the standard deviation of the logarithm, so that 1 makes some experts of 128 a hundred times as full as others.

Medians, by events on the GPU, which does not wait for the host; the cache is flushed before each repetition. ``host_us`` is
how long the host takes to launch a layer's sketches. Prints a line of JSON for each result, with hardware, versions and date.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of a layer: a gated MLP of which a token takes ``chosen``, as in the model's config."""

    count: int
    hidden: int
    width: int
    chosen: int
    transposed: bool = False  # stored (E, in, out)

    def stacks(self) -> list[tuple[int, int]]:
        """Outputs and inputs of a token in gate_up_proj and down_proj."""
        return [(2 * self.width, self.hidden), (self.hidden, self.width)]


MODELS = {
    "Qwen3-30B-A3B": Experts(128, hidden=2048, width=768, chosen=8),
    "Mixtral-8x7B": Experts(8, hidden=4096, width=14336, chosen=2),
    "GPT-OSS-20B": Experts(32, hidden=2880, width=2880, chosen=4, transposed=True),
}


_BUSY_CYCLES = 4_000_000  # two milliseconds at 2 GHz


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument(
        "--columns", nargs="+", type=int, default=[16], help="of the sketches: rank and explore together"
    )
    parser.add_argument("--spread", type=float, default=1.0, help="of the experts' popularity; 0: all alike")
    parser.add_argument("--repetitions", type=int, default=30, help="of which a number is the median")
    parser.add_argument("--output", help="a file to which the lines are added")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("experts_cost.py: error: needs a CUDA device: grouped_mm and the kernel are timed on one")
    for name in args.models:
        for tokens in args.tokens:
            for columns in args.columns:
                result = {"model": name, "tokens": tokens, "columns": columns, "spread": args.spread}
                result |= measure(MODELS[name], tokens, columns, args.spread, args.repetitions)
                line = json.dumps(result | surroundings())
                print(line, flush=True)
                if args.output:
                    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
                    with open(args.output, "a") as file:
                        file.write(line + "\n")


def route(experts: Experts, tokens: int, spread: float) -> tuple[Tensor, Tensor]:
    """Which of ``tokens`` each expert gets, where each token chooses ``experts.chosen`` different experts.

    Returns:
        (E,), int64: how many rows each expert has; (S,), int32: the token of each row, sorted by expert.
    """
    generator = torch.Generator().manual_seed(0)
    popularity = spread * torch.randn(experts.count, generator=generator)
    uniform = torch.rand(tokens, experts.count, generator=generator)
    # The largest of logits with Gumbel noise: a sample without replacement from their softmax.
    chosen = (popularity - (-uniform.log()).log()).topk(experts.chosen).indices.flatten()
    return chosen.bincount(minlength=experts.count), (chosen.argsort(stable=True) // experts.chosen).int()


class Stack:
    """One stack of a layer, with its activations X (S, in), output gradients dY (S, out), factors and sketches."""

    def __init__(
        self, outputs: int, inputs: int, counts: Tensor, columns: int, *, transposed: bool, rows: Tensor | None
    ):
        """``rows``: which token each row of X is; None: X is not a token's."""

        def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=dtype)

        E, S = len(counts), int(counts.sum())
        self.ends = counts.cumsum(0).int().cuda()
        self.dy = draw(S, outputs)
        self.rows = None if rows is None else rows.cuda()
        self.tokens = draw(S if rows is None else int(rows.max()) + 1, inputs)
        self.x = self.tokens if rows is None else self.tokens[self.rows]
        stored = draw(E, inputs, outputs) if transposed else draw(E, outputs, inputs)
        self.weight = stored if transposed else stored.mT  # (E, in, out), as the forward takes it
        self.transposed = transposed
        m, n = stored.shape[1:]
        self.U, self.V = draw(E, m, columns), draw(E, n, columns)
        self.Y, self.Z = (torch.zeros(E, size, columns, device="cuda") for size in (m, n))

    @property
    def left(self) -> Tensor:
        return self.x if self.transposed else self.dy

    @property
    def right(self) -> Tensor:
        return self.dy if self.transposed else self.x

    def forward(self) -> Tensor:
        return F.grouped_mm(self.x, self.weight, offs=self.ends)

    def input_gradient(self) -> Tensor:
        return F.grouped_mm(self.dy, self.weight.mT, offs=self.ends)

    def weight_gradient(self) -> Tensor:
        return F.grouped_mm(self.left.mT, self.right, offs=self.ends)

    def sketch(self) -> None:
        from ds_mofa.kernels import _experts

        _experts.launch(self.left, self.right, self.ends, self.U, self.V, self.Y, self.Z)

    def sketch_tokens(self) -> None:
        """The same, with X once for each token where it is a token's."""
        from ds_mofa.kernels import _experts

        stack = self.ends, self.U, self.V, self.Y, self.Z
        if self.transposed:
            _experts.launch(self.tokens, self.dy, *stack, left_rows=self.rows)
        else:
            _experts.launch(self.dy, self.tokens, *stack, right_rows=self.rows)

    def sketch_by_grouped_mm(self) -> None:
        """The same but for its sums, which leave the product in bf16; columns must be a multiple of 8."""
        P = F.grouped_mm(self.right, self.V, offs=self.ends)
        Q = F.grouped_mm(self.left, self.U, offs=self.ends)
        self.Y += F.grouped_mm(self.left.mT, P, offs=self.ends)
        self.Z += F.grouped_mm(self.right.mT, Q, offs=self.ends)


def measure(experts: Experts, tokens: int, columns: int, spread: float, repetitions: int) -> dict[str, Any]:
    """Times of one layer's experts."""
    counts, rows = route(experts, tokens, spread)
    stacks = [
        Stack(outputs, inputs, counts, columns, transposed=experts.transposed, rows=of)
        for (outputs, inputs), of in zip(experts.stacks(), (rows, None))
    ]

    def of_layer(part: Callable[[Stack], Any]) -> Callable[[], None]:
        def run() -> None:
            for stack in stacks:
                part(stack)

        return run

    parts = {"forward_ms": Stack.forward, "dx_ms": Stack.input_gradient, "dw_ms": Stack.weight_gradient}
    parts |= {"sketches_ms": Stack.sketch, "sketches_of_tokens_ms": Stack.sketch_tokens}
    if columns % 8 == 0:  # as grouped_mm wants it
        parts["sketches_by_grouped_mm_ms"] = Stack.sketch_by_grouped_mm
    times = {name: median_ms(of_layer(part), repetitions) for name, part in parts.items()}
    return {
        "rows": int(counts.sum()),
        "fullest": int(counts.max()),
        "emptiest": int(counts.min()),
        **{name: round(ms, 4) for name, ms in times.items()},
        "share": round(times["sketches_ms"] / (times["forward_ms"] + times["dx_ms"]), 4),
        "share_of_tokens": round(times["sketches_of_tokens_ms"] / (times["forward_ms"] + times["dx_ms"]), 4),
        "share_of_dw": round(times["sketches_ms"] / times["dw_ms"], 4),
        "host_us": round(host_us(of_layer(Stack.sketch))),
    }


def median_ms(run: Callable[[], None], repetitions: int) -> float:
    """Milliseconds on the GPU, which is kept busy before each repetition until the host has launched it."""
    flush = torch.empty(1 << 26, device="cuda")  # 256 MiB, more than any cache
    for _ in range(3):
        run()
    spans = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(_BUSY_CYCLES)
        start.record()
        run()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans)


def host_us(run: Callable[[], None]) -> float:
    """Microseconds until the host has launched it, while the device is free to follow."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def surroundings() -> dict[str, str]:
    import triton

    return {
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
