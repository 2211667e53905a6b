"""How many GPUs of a size hold a training step, by prediction.

    python profiling/capacity.py
    python profiling/capacity.py --model_configs configs/models/llama-3.1-8b.json --tokens 4096
    python profiling/capacity.py --model_configs configs/models/qwen3-30b-a3b.json --include embed_tokens lm_head
    python profiling/capacity.py --model_configs configs/models/llama-3.1-8b.json --ways FSDP2 "FSDP2, int8"

Prints, for each model, optimizer and size of card, the smallest number of GPUs and in brackets the host memory that each
needs, in GB. One sequence a micro-batch, two micro-batches a step, activations checkpointed, small buckets; liger-kernel's
operators where it is known which of the model's they replace, else ``fused_head`` of ds_mofa's optimizers. A plain loop is on
one GPU, with AdamW's states in the weights' dtype. What a card has to hold is what PyTorch's allocator has in
use, the CUDA context and NCCL; the allocator's slack, which shrinks when memory is short, is not in it.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from ds_mofa.optimizers.registry import find
from ds_mofa.profiler.predict import predict
from ds_mofa.profiler.predict.fitting import needed
from ds_mofa.profiler.predict.simulated.liger import MODELS as LIGER
from ds_mofa.profiler.setting import RunSetting, SettingError

CARDS = {"16 GiB": 16 << 30, "24 GiB": 24 << 30, "40 GiB": 40 << 30, "80 GiB": 80 << 30, "141 GB": 141 * 10**9}
GPUS = (1, 2, 4, 8, 16, 32, 64)
WAYS: dict[str, dict[str, Any]] = {
    "plain loop": {"backend": "torch"},
    "ZeRO-2": {"zero": 2},
    "ZeRO-2, optimizer offloaded": {"zero": 2, "offload": "optimizer"},
    "ZeRO-3": {"zero": 3},
    "ZeRO-3, optimizer offloaded": {"zero": 3, "offload": "optimizer"},
    "ZeRO-3, parameters too": {"zero": 3, "offload": "param"},
}
MORE: dict[str, dict[str, Any]] = {  # FSDP2's takes minutes for a large model: its own code is played through
    "plain loop, int8": {"backend": "torch", "weights": "int8"},
    "ZeRO-2, int8": {"zero": 2, "weights": "int8"},
    "FSDP2": {"backend": "fsdp2"},
    "FSDP2, int8": {"backend": "fsdp2", "weights": "int8"},
}


def main(argv: Sequence[str] | None = None) -> None:
    shapes = [str(ROOT / f"configs/models/llama-3.1-{size}.json") for size in ("8b", "70b", "405b")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_configs", nargs="+", default=shapes, help="shapes, such as configs/models/*.json")
    parser.add_argument("--optimizers", nargs="+", default=["AdamW", "MoFaSGD"])
    parser.add_argument("--rank", type=int, default=8, help="of ds_mofa's optimizers")
    parser.add_argument("--explore", type=int, default=0, help="of MoFaSGD")
    parser.add_argument("--include", nargs="+", default=(), help="of ds_mofa's optimizers: what else is a matrix")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=[*WAYS, *MORE], help="columns", metavar="WAY")
    args = parser.parse_args(argv)
    ways = {name: {**WAYS, **MORE}[name] for name in args.ways}
    print(f"| model, optimizer | card | {' | '.join(ways)} |\n|---|---|{'---|' * len(ways)}")
    for path in args.model_configs:
        liger = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type") in LIGER
        for optimizer in args.optimizers:
            try:
                setting = RunSetting.from_args(
                    args, model_config=path, optimizer=optimizer, zero=3, seq=args.tokens, micro_batches=2,
                    checkpointing=True, liger=liger, bucket=20_000_000, prefetch=50_000_000, leaf=True,
                    **({} if liger or find(optimizer) is None else {"fused_head": True}),
                )  # fmt: skip
            except SettingError as error:
                sys.exit(f"capacity.py: error: {error}")
            columns = [smallest(setting, way) for way in ways.values()]
            for card in CARDS:
                cells = " | ".join(column[card] for column in columns)
                print(f"| {Path(path).stem}, {optimizer} | {card} | {cells} |", flush=True)


def smallest(setting: RunSetting, way: Mapping[str, Any]) -> dict[str, str]:
    """By card, the fewest GPUs that hold a step run this way, with each one's host memory; a dash where none of
    :data:`GPUS` does.
    """
    found = dict.fromkeys(CARDS, "-")
    for gpus in GPUS[:1] if way.get("backend") == "torch" else GPUS:
        try:
            run = setting.but(**way, gpus=gpus)
        except SettingError:  # AdamW's weights have sixteen
            break
        need, host = needs(run)
        for card, size in CARDS.items():
            if found[card] == "-" and need <= size:
                found[card] = f"{gpus} ({host / 1e9:.0f})" if host else str(gpus)
        # Whole weights that the largest card does not hold will not fit on more of them.
        if "-" not in found.values() or (way.get("zero") == 2 and gpus == 1 and weights(setting) > max(CARDS.values())):
            break
    return found


def weights(setting: RunSetting) -> int:
    """Bytes of all of them."""
    return predict(RunSetting.of(setting.model_config, setting.optimizer, zero=3, liger=setting.liger))["categories"][
        "weights"
    ]


def needs(setting: RunSetting) -> tuple[int, int]:
    """Bytes of the device, and of the host, that one rank cannot do without."""
    found = predict(setting)
    return needed(found), found["host"]


if __name__ == "__main__":
    main()
