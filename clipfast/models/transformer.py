"""The transformer block that both encoders of CLIP are made of, and what their sizes must be."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}; accepted is a positive number")


def check_divides(width: int, heads: int) -> None:
    check_positive(width=width, heads=heads)
    if width % heads:
        raise ValueError(f"heads: got {heads}; accepted is a divisor of the width, {width}")


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), which OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float = 0.0, quick_gelu: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), QuickGELU() if quick_gelu else nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, w] -> [b, s, w]
        b, s, w = x.shape
        qkv = self.qkv(self.norm_1(x)).view(b, s, 3, self.heads, w // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [b, heads, s, w / heads]
        attended = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(b, s, w)))
        x = x + self.dropout(self.mlp(self.norm_2(x)))
        return x


def transformer(width: int, layers: int, heads: int, causal: bool, dropout: float, quick_gelu: bool) -> nn.Sequential:
    """Blocks with the paper's initial values: the residual branches shrink with the depth."""
    blocks = nn.Sequential(*(Block(width, heads, causal, dropout, quick_gelu) for _ in range(layers)))
    for module in blocks:
        block = cast(Block, module)
        nn.init.normal_(block.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.out.weight, std=(2 * layers * width) ** -0.5)
        nn.init.normal_(cast(nn.Linear, block.mlp[0]).weight, std=(2 * width) ** -0.5)
        nn.init.normal_(cast(nn.Linear, block.mlp[2]).weight, std=(2 * layers * width) ** -0.5)
    return blocks
