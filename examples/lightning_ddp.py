"""Lightning, in one process or under DDP: the optimizer is built in `configure_model`, before DDP wraps the model."""

import lightning
import torch
from torch import nn

import ds_mofa


class Toy(lightning.LightningModule):
    def configure_model(self):
        if not hasattr(self, "net"):  # Lightning calls it more than once
            self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
            self.mofasgd = ds_mofa.MoFaSGD(self, lr=2e-3, rank=4)

    def configure_optimizers(self):
        return self.mofasgd

    def training_step(self, batch, _):
        loss = nn.functional.mse_loss(self.net(batch), batch)
        self.log("loss", loss)
        return loss


if __name__ == "__main__":
    trainer = lightning.Trainer(max_steps=100, accelerator="auto", strategy="auto", logger=False, gradient_clip_val=1.0)
    trainer.fit(Toy(), torch.utils.data.DataLoader(torch.randn(256, 32), batch_size=16))
    print("loss", trainer.callback_metrics["loss"].item())
