"""What the user sees while training: one bar on rank 0, and a line for each evaluation."""

import sys

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

# A log file keeps every redraw of the bar, a terminal only the last one.
SECONDS_BETWEEN_REDRAWS_IN_A_FILE = 10


class ProgressBar(ProgressCallback):
    """HF's bar with loss, learning rate, tokens/s and memory beside it instead of dictionaries between its redraws."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.is_world_process_zero:
            interval = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_REDRAWS_IN_A_FILE
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, mininterval=interval, desc="train"
            )
        self.current_step = state.global_step

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """No second bar: an evaluation says what it found in one line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "eval_loss" in logs:
            self.training_bar.write(
                f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}, perplexity {logs['eval_perplexity']:.2f}"
            )
        elif "loss" in logs:
            self.training_bar.set_postfix_str(describe(logs), refresh=False)


def describe(logs: dict[str, float]) -> str:
    """One training log, as it stands beside the bar."""
    parts = [f"loss {logs['loss']:.3f}", f"lr {logs['learning_rate']:.2g}"]
    if "tokens_per_second" in logs:
        parts += [f"{logs['tokens_per_second']:,.0f} tokens/s", f"{logs['peak_memory_gb']:.2f} GB"]
    return ", ".join(parts)
