"""The demo's image encoder: a residual network that learns drawings in minutes on a CPU."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import relu

PATCH, WIDTHS = 4, (48, 96, 192)


def _norm(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (He et al. 2016, arXiv:1512.03385); a stride of the shortcut is an average pool."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_norm(nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)),
            nn.ReLU(),
            *_norm(nn.Conv2d(width, width, 3, padding=1, bias=False)),
        )
        nn.init.zeros_(cast(nn.BatchNorm2d, self.residual[-1]).weight)  # the block begins as its shortcut
        project = nn.Sequential(nn.AvgPool2d(stride), *_norm(nn.Conv2d(inputs, width, 1, bias=False)))
        self.shortcut = nn.Identity() if stride == 1 and inputs == width else project

    def forward(self, x: Tensor) -> Tensor:  # [b, inputs, h, w] -> [b, width, h / stride, w / stride]
        return relu(self.shortcut(x) + self.residual(x))


class DrawingEncoder(nn.Module):
    """Patches of 4x4 pixels, then three stages of 48, 96 and 192 channels, then their mean over the picture.

    Patches let the first layers have many channels at few places, which a CPU multiplies fast.
    """

    output_dim = WIDTHS[-1]

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_norm(nn.Conv2d(3, WIDTHS[0], PATCH, PATCH, bias=False)), nn.ReLU()]
        for inputs, width in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False):
            layers.append(BasicBlock(inputs, width, 1 if width == WIDTHS[0] else 2))
        self.layers, self.dropout = nn.Sequential(*layers), nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:  # [b, 3, h, w] -> [b, 192], h and w multiples of 16
        return cast(Tensor, self.dropout(self.layers(images).mean(dim=(2, 3))))
