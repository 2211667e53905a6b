"""Which training loop a setting names."""

import torch

from ds_mofa.profiler.setting import RunSetting
from profiling.ranks_trainers import DDPTrainer, FSDP2Trainer
from profiling.trainers import LoRATrainer, TorchTrainer, Trainer, check_measurable, pretend_to_be

__all__ = ["make_trainer"]


def make_trainer(setting: RunSetting, device: torch.device) -> Trainer:
    """The loop that the setting names, on a model of its shape.

    Raises:
        SettingError: a run that can be predicted, and that nothing here trains.
    """
    if setting.card is not None:
        pretend_to_be(setting.card * 2**30, device, distributed=setting.backend != "torch")
    check_measurable(setting)
    if setting.zero is not None:
        from profiling.deepspeed_trainer import DeepSpeedTrainer  # no other run needs DeepSpeed

        return DeepSpeedTrainer(setting, device)
    kinds = {
        "torch": LoRATrainer if setting.optimizer == "LoRA" else TorchTrainer,
        "ddp": DDPTrainer,
        "fsdp2": FSDP2Trainer,
    }
    trainer = kinds[setting.backend](setting, device)
    if setting.graphed:
        trainer.graph()
    return trainer
