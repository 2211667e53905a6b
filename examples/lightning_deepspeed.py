"""Lightning's DeepSpeedStrategy, on GPUs: the config names the optimizer, and `configure_optimizers` returns none."""

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

import ds_mofa  # noqa: F401  not needed where the package is installed


class Toy(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def configure_optimizers(self):
        return None

    def training_step(self, batch, _):
        return nn.functional.mse_loss(self.net(batch), batch)


if __name__ == "__main__":
    # With torch's AdamW for the rest: DeepSpeed's own is compiled at the first run, for which it needs a CUDA toolkit.
    optimizer = {"type": "MoFaSGD", "params": {"lr": 2e-3, "rank": 4, "torch_adam": True}}
    strategy = DeepSpeedStrategy(config={"zero_optimization": {"stage": 2}, "optimizer": optimizer})
    trainer = lightning.Trainer(max_steps=100, strategy=strategy, precision="bf16-true", logger=False)
    trainer.fit(Toy(), torch.utils.data.DataLoader(torch.randn(256, 32), batch_size=16))
