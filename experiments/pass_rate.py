#!/usr/bin/env python
"""How many of MBPP's held-out problems a fine-tuned decoder solves: greedy answers, run against the problems' own tests.

    python experiments/compare.py experiments/configs/comparisons/finetune_answers.yaml ... --keep_models AdamW r=8
    python experiments/pass_rate.py out/finetune_answers/models/* --data_dir path/to/mbpp --output out/pass_rate.jsonl

It RUNS what the models wrote, each answer in a process of its own that ends after --seconds, but without any other fence: use a
machine that holds nothing you would miss. Prints, and appends to --output, a line of JSON for each model: its folder, how many
problems there are, and which are solved.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# A script's first import folder is its own; this makes it the repository's, from wherever it is run.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import AutoModelForCausalLM

from experiments.comparison.tasks.decoder import load_decoder
from launch.errors import UserError
from launch.records import read_records
from launch.tokenizer import load_tokenizer

_BEFORE_THE_TESTS = "The code must pass:\n"
_REACHED = "all assertions hold"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders, each with its tokenizer")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of dev.jsonl")
    parser.add_argument("--output", type=Path, default=Path("out/pass_rate.jsonl"))
    parser.add_argument("--new_tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="that an answer may run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    prompts = [record["prompt"] for _, _, record in read_records(str(args.data_dir / "dev.jsonl"), ())]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for folder in args.models:
        answers = answer(folder, prompts, args.new_tokens, args.batch_size, args.device)
        with ThreadPoolExecutor() as pool:
            passed = list(pool.map(lambda pair: passes(*pair, args.seconds), zip(answers, map(assertions_of, prompts))))
        row = {"model": folder.name, "problems": len(prompts), "solved": [i for i, ok in enumerate(passed) if ok]}
        print(f"{folder.name}: {len(row['solved'])} of {len(prompts)}", flush=True)
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def assertions_of(prompt: str) -> str:
    """The assertions of a problem, a line each, which stand at the end of its prompt."""
    return prompt.partition(_BEFORE_THE_TESTS)[2]


def passes(code: str, assertions: str, seconds: float) -> bool:
    """Whether code holds its assertions. One without any holds none."""
    if not assertions.strip():
        return False
    with tempfile.TemporaryDirectory() as folder:
        # -I: nothing of this folder or of the user's is imported by accident.
        command = [sys.executable, "-I", "-c", f"{code}\n{assertions}\nprint({_REACHED!r})"]
        try:
            done = subprocess.run(command, cwd=folder, timeout=seconds, capture_output=True, stdin=subprocess.DEVNULL)
        except (subprocess.TimeoutExpired, ValueError):  # a NUL in it is no code
            return False
    return done.returncode == 0 and done.stdout.endswith(f"{_REACHED}\n".encode())  # code may exit before its tests


@torch.no_grad()
def answer(folder: Path, prompts: Sequence[str], new_tokens: int, batch_size: int, device: str) -> list[str]:
    """What the model says to each prompt, greedily, encoded as in training."""
    tokenizer = load_tokenizer(str(folder))[0]
    tokenizer.padding_side = "left"
    model: AutoModelForCausalLM = load_decoder(str(folder), tokenizer).to(device, torch.bfloat16).eval()
    model.config.use_cache = True
    answers = []
    for start in range(0, len(prompts), batch_size):
        chosen = list(prompts[start : start + batch_size])
        batch = tokenizer(chosen, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        ids = model.generate(
            **batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        answers += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"pass_rate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
