"""TRL's trainer, with speed, memory and perplexity in its logs."""

import functools
import math
import resource
import shutil
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from ds_mofa import GraphedMicroBatch
from ds_mofa.backends.deepspeed.registration import optimizer_of
from ds_mofa.optimizers.base import MatrixOptimizer
from launch.checkpoints import is_ours, remove_old, seal, unseal
from launch.cpu_fsdp import offer_fsdp_on_cpu
from launch.encoding import IGNORED
from launch.engines import Engine
from launch.errors import UserError
from launch.fsdp import FULL, state_dict_type, written_as
from launch.lengths import check_batches
from launch.output import writing
from launch.preemption import SaveOnSigterm, Stopped
from launch.quiet import without_saving_bar
from launch.report import beginning, say
from launch.resuming import differences, enforce, in_force, reschedule, settings
from launch.runs import Lineage


class FineTuner(SFTTrainer):
    """``SFTTrainer`` whose logs also hold:

    - ``tokens_per_second``: over all ranks, since the last log, evaluation and checkpoints left out;
    - ``peak_memory_gb``: the largest of all ranks, in 1e9 bytes (see ``peak_memory``);
    - ``eval_perplexity``: exp of the evaluation loss.

    Its evaluation loss is the mean over tokens, so that perplexity is what the word says. HF's is the mean over
    batches of each batch's mean: with answers of unequal length it depends on the batch size, and on the number of
    ranks, since examples that fill up the last batches count again.
    """

    memory_profiler = None  # a ds_mofa.profiler.MemoryProfiler, where one is running
    lineage: Lineage | None = None  # of this run: what its checkpoints are known by
    preemption: SaveOnSigterm | None = None  # where one is among the callbacks

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._interval_start: float | None = None  # seconds
        self._interval_tokens = 0  # all tokens trained on, when the interval began
        self._reported = 0  # step of the last diagnostics that were logged
        self._began = 0  # step that this start has begun to train at
        self._saved = 0  # step of the last checkpoint, or the same
        self._micro_batch: GraphedMicroBatch | None = None
        self._uncounted: torch.Tensor | None = None  # tokens since the last log, (), on the device
        self._eval_sums = torch.zeros(2, dtype=torch.float64)  # (summed loss, tokens) of this rank's evaluation

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        check_batches(loader, self.args)
        return loader

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.engine is Engine.FSDP2:
            offer_fsdp_on_cpu()
        super().create_accelerator_and_postprocess()
        if self.args.cuda_graphs:  # GraphedMicroBatch does DistributedDataParallel's part, which cannot be captured
            without = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
            self.accelerator.prepare_model = without

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """HF's, and what the checkpoint puts in force instead of what the command says is said, or put back."""
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        optimizer = self.deepspeed.optimizer if self.is_deepspeed_enabled else self.optimizer
        if resume_from_checkpoint is not None:
            asked = settings(optimizer, scheduler)
            self._load_training(resume_from_checkpoint)
            if self.args.override_checkpoint:
                enforce(optimizer, scheduler, asked)
            reschedule(scheduler)
            for line in differences(asked, settings(optimizer, scheduler)):
                say(self.args, line)
        rates = in_force(optimizer, scheduler)
        say(self.args, beginning(resume_from_checkpoint, self.state.global_step, max_steps, rates))
        return model, loader

    def _load_training(self, checkpoint: str) -> None:
        """Weights, optimizer and schedule; where nothing is sharded HF has loaded the weights before."""
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.deepspeed, checkpoint)
        with self.cut_as(written_as(checkpoint)):
            if self.is_fsdp_enabled:
                self._load_from_checkpoint(checkpoint, self.model_wrapped)
            self._load_optimizer_and_scheduler(checkpoint)

    def cut_as(self, name: str | None) -> AbstractContextManager[None]:
        """Within: FSDP2's states are cut as ``name`` says; None for as they are, and under another engine."""
        if name is None or not self.is_fsdp_enabled:
            return nullcontext()
        return state_dict_type(self.accelerator.state.fsdp_plugin, name)

    def _init_training_state(self, max_steps, *args, **kwargs) -> tuple[int, int]:
        done = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # --save_steps and the like are the command's, resumed or not
        self._began = self._saved = self.state.global_step
        return done

    @property
    def trained(self) -> bool:
        """Whether this start of the command has trained a step."""
        return self.state.global_step > self._began

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # HF would train a finished run for one step more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self._interval_start is None:
            self._interval_start = time.perf_counter()
        if not self.args.cuda_graphs:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = dict(self._prepare_inputs(inputs))
        if self._micro_batch is None:
            if self.aux_loss_enabled:
                raise UserError(
                    "--cuda_graphs: the router's auxiliary loss is weighed outside the model. Set router_aux_loss_coef to 0, "
                    "or leave --cuda_graphs out."
                )
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # in Accelerate's
            self._micro_batch = GraphedMicroBatch(self._scaled_loss, optimizer)
        items, share = None, 1 / self.current_gradient_accumulation_steps
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:  # of all micro-batches of the step
            items, share = torch.as_tensor(num_items_in_batch, device=self.args.device), 1.0
        with nullcontext() if self.accelerator.sync_gradients else self._micro_batch.no_sync():
            loss = self._micro_batch(inputs, items, share)
        self._count_tokens(inputs)
        return loss

    def _scaled_loss(self, inputs: dict, items: torch.Tensor | None, share: float) -> torch.Tensor:
        """The model's own loss, by its share in the step's."""
        with self.compute_loss_context_manager():
            loss = Trainer.compute_loss(self, self.model, {**inputs, "use_cache": False}, num_items_in_batch=items)
        return loss * share

    def _count_tokens(self, inputs: dict) -> None:
        """As TRL does where it computes the loss; but the host learns of it when it logs, and waits for no micro-batch."""
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].size(1)
        tokens = torch.as_tensor(tokens, device=self.args.device)
        came = self.accelerator.gather_for_metrics(tokens).sum()
        self._uncounted = came if self._uncounted is None else self._uncounted + came

    def _settle_tokens(self) -> None:
        """Let TRL's count have what came since the last log."""
        if self._uncounted is not None:
            self._total_train_tokens += int(self._uncounted)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            self._uncounted = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or not self.loss_is_in_head(model):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # TRL computes loss, entropy and accuracy around the head; HF's Trainer takes the loss that the model gives.
        inputs = {**inputs, "use_cache": False}
        loss = Trainer.compute_loss(self, model, inputs, num_items_in_batch=num_items_in_batch)
        self._count_tokens(inputs)
        return loss

    def loss_is_in_head(self, model) -> bool:
        """Whether MoFaSGD's ``fused_head`` computes this loss; TRL's other losses, and an evaluation's, it does not."""
        mofa = self.matrix_optimizer()
        plain = self.args.loss_type == "nll" and self.label_smoother is None and self.compute_loss_func is None
        fused = mofa is not None and mofa.options.fused_head
        return fused and model.training and plain and not self.aux_loss_enabled

    def matrix_optimizer(self) -> MatrixOptimizer | None:
        """ds_mofa's, where one trains."""
        if self.is_deepspeed_enabled:
            return optimizer_of(self.model_wrapped)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # in Accelerate's
        return optimizer if isinstance(optimizer, MatrixOptimizer) else None

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        self._eval_sums.zero_()
        with self.stopped_clock():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        self.ignore_repeats(inputs)
        # The first label is never predicted.
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum().item()
        step = super().prediction_step(model, inputs, *args, **kwargs)
        self._eval_sums += torch.tensor([step[0].item() * tokens, tokens], dtype=torch.float64)
        return step

    def _save_checkpoint(self, *args, **kwargs) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        first = self.args.should_save
        with self.stopped_clock(), writing(self.args.output_dir, f"the checkpoint of step {self.state.global_step}"):
            if first:
                if folder.exists():
                    unseal(folder)
                    # Other ranks, or another run, may have left files that this save does not write.
                    shutil.rmtree(folder)
                # HF asks on each rank whether the best step's folder is there. Where states are sharded it has by then
                # written nothing into this one: some would find it, others not, and they would load different steps.
                folder.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            with self.removing_nothing(), self.without_a_foreign_best(), without_saving_bar():
                super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            if first:
                seal(folder, self.lineage)
                best = self.state.best_model_checkpoint
                remove_old(self.args.output_dir, self.args.save_total_limit, best, self.lineage)
        self._saved = self.state.global_step

    def save_unless_saved(self) -> None:
        """Write a checkpoint of where the training stands, if none is there. Collective."""
        if self.state.global_step != self._saved:
            self._save_checkpoint(self.model_wrapped, None)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Stopped:  # HF evaluates before it saves
            self.control.should_evaluate, self.control.should_training_stop = False, True
            self.save_unless_saved()

    def _load_best_model(self) -> None:
        if self.preemption is None or not self.preemption.stopped:  # else there may not be the time
            with self.cut_as(written_as(self.state.best_model_checkpoint)):
                super()._load_best_model()

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """HF's; the model at the end is whole also where checkpoints are sharded."""
        with self.cut_as(None if _internal_call else FULL):
            super().save_model(output_dir, _internal_call)

    def _finalize_training(self, *args, **kwargs):
        with self.removing_nothing():  # with a limit of 1, HF would remove all checkpoints but the best, of all runs
            return super()._finalize_training(*args, **kwargs)

    @contextmanager
    def removing_nothing(self):
        """Within: HF removes no checkpoints. It would while other ranks still write, and those of other runs first."""
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = keep

    @contextmanager
    def without_a_foreign_best(self):
        """Within: HF does not take another run's checkpoint for this one's best, for its folder has the best step."""
        step = self.state.best_global_step
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        another = step and step != self.state.global_step and self.lineage and folder.exists()
        foreign = another and not is_ours(folder, self.lineage)
        if foreign:
            self.state.best_global_step = None
        try:
            yield
        finally:
            if foreign:
                self.state.best_global_step = step

    @contextmanager
    def stopped_clock(self):
        """Leave the time spent inside out of ``tokens_per_second``."""
        start = time.perf_counter()
        yield
        if self._interval_start is not None:
            self._interval_start += time.perf_counter() - start

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._settle_tokens()
        if "eval_loss" in logs:
            # The same dictionary is what evaluate() returns.
            logs["eval_loss"] = self.mean_eval_loss()
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        elif "loss" in logs and self._interval_start is not None:
            now, tokens = time.perf_counter(), self._total_train_tokens
            logs["tokens_per_second"] = (tokens - self._interval_tokens) / (now - self._interval_start)
            peak = peak_memory(self.args.device)
            if self.memory_profiler is not None:  # it resets PyTorch's own peak at every phase
                peak = max(peak, self.memory_profiler.peak_allocated)
            logs["peak_memory_gb"] = self.largest(peak / 1e9)
            logs.update(self.diagnostics())
            self._interval_start, self._interval_tokens = now, tokens
        super().log(logs, start_time)

    def diagnostics(self) -> dict[str, float]:
        """What MoFaSGD's last report sums up to, once; empty with another optimizer, or without diagnostics_every."""
        mofa = self.matrix_optimizer()
        report = mofa.matrices.report if mofa is not None else None
        if report is None or report.step == self._reported:
            return {}
        self._reported = report.step
        return {f"mofasgd/{name}": value for name, value in report.summary().items()}

    def ignore_repeats(self, inputs: dict[str, torch.Tensor]) -> None:
        """Take out of the loss, in place, the examples that Accelerate repeats so that all last batches are full."""
        progress = self.accelerator.gradient_state
        if not progress.end_of_dataloader or progress.remainder <= 0:
            return
        # ``remainder`` examples are left for all ranks together, dealt out in rank order.
        size = self.args.per_device_eval_batch_size
        left = progress.remainder - self.args.process_index * size
        labels = inputs["labels"]  # (batch, length), or (1, all lengths) without padding
        if self.padding_free:
            example = (inputs["position_ids"] == 0).cumsum(dim=1) - 1
        else:
            example = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
        labels[example >= left] = IGNORED

    def mean_eval_loss(self) -> float:
        """Mean loss per token of an evaluation, over all ranks; every rank must call it."""
        # fp64 would be enough for any data, but not every device gathers it; sums of fp32 means are exact to 1e-7.
        sums = self.accelerator.gather(self._eval_sums.float()[None].to(self.args.device)).double().sum(dim=0)
        return (sums[0] / sums[1].clamp(min=1)).item()

    def largest(self, value: float) -> float:
        """The largest of a number over all ranks; every rank must call it."""
        return self.accelerator.gather(torch.tensor([value], device=self.args.device)).max().item()


def peak_memory(device: torch.device) -> int:
    """Bytes: the peak that PyTorch has allocated on a GPU, or the peak resident size of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def perplexity(loss: float) -> float:
    """exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf
