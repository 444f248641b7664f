"""A model to train in the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Towers(nn.Module):
    """Two towers with open_clip's forward: a dictionary that the loss takes as keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 5), nn.Linear(7, 5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": nn.functional.normalize(self.image(images), dim=1),
            "text_features": nn.functional.normalize(self.text(texts), dim=1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }
