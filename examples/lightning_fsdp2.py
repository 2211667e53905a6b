"""Lightning's FSDP2 strategy: `configure_model` shards, and the optimizer is built after it."""

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

import ds_mofa


class Toy(lightning.LightningModule):
    def configure_model(self):
        net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.net = fully_shard(net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return ds_mofa.MoFaSGD(self, lr=2e-3, rank=4)

    def training_step(self, batch, _):
        self.log("loss", loss := nn.functional.mse_loss(self.net(batch), batch))
        return loss


if __name__ == "__main__":
    ranks = max(2, torch.cuda.device_count())  # without a GPU two CPU ranks
    strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    trainer = lightning.Trainer(max_steps=100, strategy=strategy, devices=ranks, logger=False)
    trainer.fit(Toy(), torch.utils.data.DataLoader(torch.randn(256, 32), batch_size=16))
    print("loss", trainer.callback_metrics["loss"].item())
