"""CLIP's loss over all workers of Ray Train, on CPUs: `pip install "ray[train]" clipfast`, then `python ray_train.py`.

Ray starts the processes and torch.distributed; the loss takes their group, and `prepare_model` wraps the model in DDP.
"""

from __future__ import annotations

import math

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch import Tensor, nn

import clipfast


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(32, 16), nn.Linear(24, 16)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(images), self.text(texts), self.logit_scale.exp()


def train(config: dict[str, int]) -> None:
    model = prepare_model(Towers())
    loss = clipfast.ContrastiveLoss(normalize=True, group=torch.distributed.group.WORLD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(ray.train.get_context().get_world_rank())
    images = torch.randn(config["batch"], 32)
    texts = images[:, :24] + 0.1 * torch.randn(config["batch"], 24)
    for _ in range(config["steps"]):
        optimizer.zero_grad()
        value = loss(*model(images, texts))
        value.backward()
        optimizer.step()
    ray.train.report({"loss": value.item()})


if __name__ == "__main__":
    trainer = TorchTrainer(
        train,
        train_loop_config={"batch": 64, "steps": 20},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=2),
    )
    print(trainer.fit().metrics)
