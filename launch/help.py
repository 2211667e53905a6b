"""``--help``: what most runs need, on one screen and at once. ``--help_all`` is the parser's, with all of Hugging Face's.

Nothing is imported here: the imports of the command take seconds.
"""

__all__ = ["ALL", "HELP", "wants_help"]

ALL = "--help_all"

HELP = """\
usage: ds-mofa train OPTIONS
from a clone: deepspeed --log_level error launch/train.py OPTIONS; or torchrun, accelerate launch, python

Fine-tune a causal language model, all of its parameters, with MoFaSGD or another optimizer.

  ds-mofa train --deepspeed zero2 --model_name_or_path MODEL --train_file chats.jsonl --output_dir out/tuned
  ds-mofa train --fsdp --optimizer MoFaSGD --model_name_or_path MODEL --train_file alpaca.json
  ds-mofa train --optimizer MoFaSGD --optimizer_args '{"explore": 128}' --train_file rows.csv ...
  the same command with --resume_from_checkpoint last: go on where it was stopped

model
  --model_name_or_path MODEL       a folder, or a name on the Hub
  --model_config FILE              a model's shape instead, with random weights; `ds-mofa config` lists some
data
  --train_file FILE ...            .txt (a text), .jsonl, .json, .csv or .parquet with records of
                                   messages | conversations | prompt, completion | instruction, input, output | text
  --eval_file FILE ...             the same, held out: the loss on it is told before, after and by --eval_strategy
  --dataset_name NAME              of the Hub instead; with --dataset_train_split and --dataset_eval_split
  --ignore_keys KEY ...            keys of the records to leave out
  --max_length N                   tokens of an example; what is longer is cut (1024)
  --packing                        several examples a row, kept apart
who trains
  --gpus N                         of ds-mofa train: how many GPUs, or CPU ranks where there is none; default: all
  --deepspeed CONFIG               a JSON file, or zero0 to zero3: it names the optimizer
  --fsdp                           FSDP2; without either DDP, or one process
  --optimizer NAME                 without --deepspeed: MoFaSGD, GaLore, AdamW
  --rank N                         momentum directions of a matrix (32, and 32 explored; a rank alone explores none)
  --optimizer_args JSON            its other options, or a .json file with them
how
  --learning_rate LR               default: the optimizer's, which the first lines say
  --lr_scheduler_type NAME         linear, cosine, constant, ... (linear)
  --num_train_epochs N             passes over the data (3)
  --max_steps N                    or so many steps
  --per_device_train_batch_size N  examples at a time on each GPU (8)
  --gradient_accumulation_steps N  of them to a step (1)
  --gradient_checkpointing         recompute activations in backward: less memory, more time
  --bf16 true|false                default: where the GPU has it
  --cuda_graphs                    the whole model on each GPU, which then waits for no host: faster at 1024 tokens
saving
  --output_dir FOLDER              checkpoints and the model (out/model)
  --save_strategy WHEN             checkpoints: no, steps, epoch; with --save_steps N (no)
  --eval_strategy WHEN             evaluations on the way: no, steps, epoch; with --eval_steps N (no)
  --load_best_model_at_end         keep the step of the least eval loss, not the last
  --resume_from_checkpoint WHICH   last, or a folder; SIGTERM to ds-mofa train saves one, and ends with 143
  --report_to NAME                 tensorboard, wandb (none)
  --profile_memory                 where the memory goes, a page in the output folder

--help_all lists every option, those of TRL and Hugging Face too. Questions: docs/faq.md, docs/support.md.
"""


def wants_help(argv: list[str]) -> bool:
    """Whether to print :data:`HELP`, and nothing else."""
    return bool({"-h", "--help"} & set(argv))
