"""torchtitan's container of optimizers, over a model that is no pipeline: one part."""

import torch
from torch import nn

from ds_mofa.integrations.torchtitan import MoFaSGDContainer

if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    config = MoFaSGDContainer.Config(options={"lr": 2e-3, "rank": 4})
    optimizers = config.build(model_parts=[model])
    data = torch.randn(64, 32)
    for _ in range(100):
        loss = nn.functional.mse_loss(model(data), data)
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
    again = config.build(model_parts=[model])
    again.load_state_dict(optimizers.state_dict())
    print("loss", loss.item())
