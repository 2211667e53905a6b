"""What train.py prints: what it is about to do, and what came of it."""

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerState

from launch.arguments import ModelArguments, TrainingArguments
from launch.checkpoints import LAST, step_of
from launch.deepspeed_json import nested_value
from launch.engines import Engine
from launch.fsdp import describe_fsdp
from launch.models import count_parameters, describe_attention, training_dtype


def say(args: TrainingArguments, text: str) -> None:
    """Print once, not once per rank."""
    if args.process_index == 0:
        print(text, flush=True)


def banner(
    model_args: ModelArguments,
    args: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: str,
    train_data: Dataset,
    eval_data: Dataset | None,
) -> str:
    """One line for each thing that decides the run, defaults included."""
    if model_args.model_config:
        origin = f"{model_args.model_config}, random weights"
    else:
        origin = model_args.model_name_or_path
    each, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    lines = {
        "model": f"{origin}, {count_parameters(model) / 1e6:,.1f} M parameters, {describe_precision(args)}",
        "attention": describe_attention(model_args, model),
        "tokenizer": tokenizer,
        "train data": describe_data(train_data, args),
        "eval data": describe_data(eval_data, args) if eval_data is not None else "none",
        "optimizer": f"{describe_optimizer(args)}, lr {args.learning_rate:g} ({args.lr_scheduler_type.value})",
        "batch": f"{each * times * args.world_size} sequences = {each} each on {describe_ranks(args)}"
        + (f", {times} times" if times > 1 else ""),
    }
    return _labelled(lines)


def beginning(checkpoint: str | None, step: int, steps: int, rates: str) -> str:
    """What only the engine knows, once it is there: where the training begins, and with which rates.

    Args:
        checkpoint: that was loaded; None without.
        step, steps: that are done, and that there will be.
        rates: of ``resuming.in_force``.
    """
    begins = f"at step {step} of {steps}, from {checkpoint}" if checkpoint else f"anew, {steps} steps"
    return _labelled({"begins": begins, "in force": rates})


def _labelled(lines: dict[str, str]) -> str:
    """A line each, whose colons stand below each other."""
    return "\n".join(f"{name:>10}: {value}" for name, value in lines.items())


def describe_data(data: Dataset, args: TrainingArguments) -> str:
    """Sizes of a dataset, and what of it the sequence length cuts off."""
    lengths = pc.list_value_length(data.data.column("input_ids"))
    tokens = pc.sum(lengths).as_py()
    text = f"{len(data):,} examples, {tokens:,} tokens"
    if args.max_length is None or (args.packing and args.packing_strategy != "bfd"):
        return text
    overflow = pc.sum(pc.max_element_wise(pc.subtract(lengths, args.max_length), 0)).as_py()
    if overflow:
        text += f"; --max_length {args.max_length} cuts off {overflow:,} tokens ({overflow / tokens:.1%})"
    return text


def describe_precision(args: TrainingArguments) -> str:
    """Of the weights, and what is computed in where that is another."""
    weights = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[training_dtype(args)]
    return f"{weights} weights, computed with in bf16" if args.bf16 and weights == "fp32" else weights


def describe_ranks(args: TrainingArguments) -> str:
    return "one process" if args.engine is Engine.ONE else f"{args.world_size} rank{'s' * (args.world_size != 1)}"


def describe_optimizer(args: TrainingArguments) -> str:
    """Its name, and the engine that it trains under."""
    if args.engine is Engine.DEEPSPEED:
        config = args.hf_deepspeed_config.config
        name = nested_value(config, "optimizer.type") or args.optim
        return f"{name}, ZeRO stage {nested_value(config, 'zero_optimization.stage') or 0}"
    how = f" ({describe_fsdp(args.fsdp_plugin_args, args.device)})" if args.engine is Engine.FSDP2 else ""
    return f"{args.optimizer or args.optim.value}, {args.engine.value}{how}"


def evaluations(state: TrainerState) -> list[dict]:
    """The evaluations so far, in order; those before a resumed checkpoint included."""
    return [entry for entry in state.log_history if "eval_loss" in entry]


def evaluated_last_step(state: TrainerState) -> bool:
    done = evaluations(state)
    return bool(done) and done[-1]["step"] == state.global_step


def stopped(output_dir: str, step: int, trained: bool) -> str:
    """The end of a run that SIGTERM has stopped.

    Args:
        trained: it has trained a step.
    """
    if not trained:
        return "stopped by SIGTERM before it had trained a step, so nothing is saved. Start the same command again."
    return (
        f"stopped by SIGTERM, saved {output_dir}/checkpoint-{step}. Start the same command with "
        f"--resume_from_checkpoint {LAST} to go on from step {step}."
    )


def best_step(args: TrainingArguments, state: TrainerState) -> int | None:
    """The step whose weights HF has loaded at the end; None where the last step's are there."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    return step_of(state.best_model_checkpoint)


def summary(state: TrainerState, output_dir: str, best: int | None = None) -> str:
    """The end of a run: how the loss moved, how fast it went, where the model lies.

    Args:
        best: the step of the saved model, where it is not the last.
    """
    lines = []
    steps = [entry for entry in state.log_history if "tokens_per_second" in entry]
    done = evaluations(state)
    if done:
        saved = done[-1] if best is None else next(entry for entry in done if entry["step"] == best)
        line = f"eval loss {_change(done[0], saved, 'eval_loss')}, perplexity {saved['eval_perplexity']:.2f}"
        if best is not None:
            line += f", of the saved model, step {best}'s, the best"
            if done[-1] is not saved:
                line += f" (the last, step {done[-1]['step']}'s: {done[-1]['eval_loss']:.4f})"
        lines.append(line)
    elif len(steps) > 1:
        lines.append(f"training loss {_change(steps[0], steps[-1], 'loss')}; --eval_file tells that of data held out")
    if steps:
        speed = sum(entry["tokens_per_second"] for entry in steps) / len(steps)
        memory = max(entry["peak_memory_gb"] for entry in steps)
        lines.append(f"{state.global_step} steps, {speed:,.0f} tokens/s, peak memory {memory:.2f} GB on one rank")
    lines.append(f'model saved in {output_dir}: AutoModelForCausalLM.from_pretrained("{output_dir}")')
    return "\n".join(lines)


def _change(first: dict, last: dict, key: str) -> str:
    """From one entry of the history to another; "before training" is the evaluation of step 0."""
    after = f"{last[key]:.4f}"
    if first is last:
        return after
    begun = "before training" if first["step"] == 0 else f"at step {first['step']}"
    share = f" ({last[key] / first[key] - 1:+.1%})" if first[key] else ""
    return f"{first[key]:.4f} {begun} -> {after}{share}"
