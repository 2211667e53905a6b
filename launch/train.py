#!/usr/bin/env python
"""Fine-tune a causal language model with MoFaSGD or another optimizer, under DeepSpeed, FSDP2, DDP, or in one process.

    deepspeed launch/train.py --deepspeed configs/zero2_mofasgd.json \
        --model_name_or_path path/to/model --train_file chats.jsonl --eval_file held_out.jsonl --output_dir out/model

    torchrun --nproc_per_node 2 launch/train.py --fsdp --optimizer MoFaSGD --rank 32 ...     # FSDP2
    torchrun --nproc_per_node 2 launch/train.py --optimizer MoFaSGD --rank 32 ...            # DDP
    python launch/train.py --optimizer MoFaSGD --rank 32 ...                                 # one process

From an installed package it is `ds-mofa train`, which starts the ranks itself.

Built on TRL's SFTTrainer, for what it carries beyond HF's Trainer and would otherwise be ours to write: packing that
keeps packed examples apart (where the model does, which is measured: launch/packing.py), batches without padding, and a
head that computes the loss without ever holding the (tokens x vocabulary) logits, which at a vocabulary of 128,256
would be the largest tensor of a step.
"""

import os
import sys
from pathlib import Path

# A script's first import folder is its own; this makes it the repository's, from wherever the launcher runs it.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.help import ALL, HELP, wants_help
from launch.launcher import end_with_launcher

if __name__ == "__main__":  # before the imports that take most of a start
    if wants_help(sys.argv[1:]):
        if os.environ.get("RANK", "0") == "0":
            print(HELP, end="")
        sys.exit()
    end_with_launcher()

from transformers import ProgressCallback, set_seed

from ds_mofa import OptionError  # importing it registers "MoFaSGD" with DeepSpeed, before any engine is made
from ds_mofa.backends.deepspeed.checkpoints import CheckpointError
from ds_mofa.profiler import MemoryCallback
from launch.arguments import make_parser, parse_arguments
from launch.callbacks import ProgressBar
from launch.checkpoints import check_written_by, checkpoint_to_resume, start_run
from launch.data import load_data
from launch.distributed import from_first_rank, join_ranks, leave_ranks
from launch.eight_bits import keep_in_eight_bits
from launch.engines import chosen_engine
from launch.errors import RankError, UserError
from launch.graphs import check_model
from launch.lengths import check_lengths
from launch.models import load_model
from launch.named_optimizer import trainer_s_optimizer
from launch.output import check_output, writing
from launch.packing import packing_problem
from launch.preemption import EXIT_CODE, SaveOnSigterm, Stopped
from launch.profile import describe_run, start_profiler
from launch.report import banner, best_step, evaluated_last_step, say, stopped, summary
from launch.tokenizer import load_tokenizer
from launch.trainer import FineTuner


def main(argv: list[str]) -> None:
    if ALL in argv:
        if os.environ.get("RANK", "0") == "0":
            make_parser().print_help()
        return
    profiler = start_profiler(argv)  # first, for all that follows may open the GPU
    join_ranks(argv, chosen_engine(argv))
    model_args, data_args, args = parse_arguments(argv)
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    check_written_by(checkpoint, args.engine)
    set_seed(args.seed)
    tokenizer, tokenizer_description = load_tokenizer(model_args.tokenizer_source)
    with args.main_process_first(desc="tokenizing"):
        train_data, eval_data = load_data(data_args, tokenizer, args.max_length)
    check_lengths(args, train_data, eval_data)
    model = load_model(model_args, args, tokenizer)
    check_model(args, model)
    keep_in_eight_bits(model, args)
    check_output(args, model)
    say(args, banner(model_args, args, model, tokenizer_description, train_data, eval_data))
    if args.cuda_graphs and args.device.type != "cuda":
        say(args, "cuda_graphs: there is no GPU, so nothing is captured")
    trainer = FineTuner(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=trainer_s_optimizer(args),
    )
    if trainer.padding_free:
        problem = from_first_rank(lambda: packing_problem(model, trainer.data_collator, args.device))
        if problem is not None:
            raise UserError(problem)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressBar)
    if profiler is not None:
        describe_run(profiler, args.output_dir)
        trainer.memory_profiler = profiler
        trainer.add_callback(MemoryCallback(profiler))
    trainer.lineage, others = from_first_rank(lambda: start_run(args.output_dir, checkpoint))
    if others:
        say(args, others)
    trainer.preemption = preemption = SaveOnSigterm()
    trainer.add_callback(preemption)
    best = train_and_evaluate(trainer, checkpoint, preemption)
    if preemption.stopped:
        say(args, stopped(args.output_dir, trainer.state.global_step, trainer.trained))
        leave_ranks()
        sys.exit(EXIT_CODE)
    with writing(args.output_dir, "the model"):
        trainer.save_model()
    if args.load_best_model_at_end and best is None:
        say(args, "load_best_model_at_end: there is no checkpoint of the best step, so the last weights are saved")
    say(args, summary(trainer.state, args.output_dir, best))
    if preemption.asked():
        say(args, "SIGTERM came while the model was being saved. It is whole, and nothing is left to do.")
    if profiler is not None:
        say(args, f"memory report: {profiler.output_dir / 'report.html'}, and report.md beside it")
    leave_ranks()


def train_and_evaluate(trainer: FineTuner, checkpoint: str | None, preemption: SaveOnSigterm) -> int | None:
    """Up to the weights that are to be saved, or, on SIGTERM, to a checkpoint to go on from.

    Returns:
        The step that the weights are of, where they are not the last step's.
    """
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if preemption.stopped:
            return None
        best = best_step(trainer.args, trainer.state)
        if best is not None:
            return best
        if trainer.eval_dataset is not None and not evaluated_last_step(trainer.state):
            trainer.evaluate()
        if preemption.asked():
            raise Stopped
    except Stopped:
        preemption.stopped = True
        trainer.save_unless_saved()
    return None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OptionError, CheckpointError) as error:
        # The message is the whole story; a traceback per rank would bury it.
        if isinstance(error, RankError) or os.environ.get("RANK", "0") == "0":
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
