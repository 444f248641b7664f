"""CLIP's image encoders in plain PyTorch (Radford et al. 2021, arXiv:2103.00020, section 2.4): ViT and ResNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from clipfast.models.transformer import check_divides, check_positive, transformer


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021, arXiv:2010.11929) with CLIP's extra layer norm before the transformer.

    Args:
        image_size: height and width of the pictures, in pixels.
        patch_size: height and width of a patch, a divisor of image_size.
        width: channels of a token.
        layers: transformer blocks.
        heads: attention heads, a divisor of width.
        dropout: of each residual branch.
        quick_gelu: the activation of OpenAI's weights in place of GELU.

    Raises:
        ValueError: a size is not positive, or one that must divide another does not.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        check_positive(image_size=image_size, patch_size=patch_size, layers=layers)
        check_divides(width, heads)
        if image_size % patch_size:
            raise ValueError(f"patch_size: got {patch_size}; accepted is a divisor of image_size, {image_size}")
        self.image_size, self.output_dim = image_size, width
        self.patches = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_token = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positions = nn.Parameter(width**-0.5 * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = transformer(width, layers, heads, causal=False, dropout=dropout, quick_gelu=quick_gelu)
        self.norm_post = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:  # [b, 3, image_size, image_size] -> [b, width]
        x = self.patches(images).flatten(2).transpose(1, 2)  # [b, patches, width]
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.positions
        x = self.blocks(self.norm_pre(x))
        return cast(Tensor, self.norm_post(x[:, 0]))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions; a stride is an average pool, against aliasing."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width

        def pool() -> nn.Module:
            return nn.AvgPool2d(stride) if stride > 1 else nn.Identity()

        self.residual = nn.Sequential(
            *_conv(inputs, width, 1), nn.ReLU(), *_conv(width, width, 3), nn.ReLU(), pool(), *_conv(width, outputs, 1)
        )
        # The block begins as the identity.
        nn.init.zeros_(cast(nn.BatchNorm2d, self.residual[-1]).weight)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(pool(), *_conv(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:  # [b, inputs, h, w] -> [b, 4 * width, h / stride, w / stride]
        return relu(self.shortcut(x) + self.residual(x))


class AttentionPool(nn.Module):
    """Multi-head attention whose one query is the mean feature; CLIP's output projection is W_i of the head."""

    def __init__(self, positions: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(width**-0.5 * torch.randn(positions + 1, width))
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        for linear in (self.q, self.k, self.v):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:  # [b, width, h, w] -> [b, width]
        x = x.flatten(2).transpose(1, 2)  # [b, h * w, width]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positions
        q, k, v = (
            linear(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b, heads, tokens, width / heads]
            for linear, tokens in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        return scaled_dot_product_attention(q, k, v).flatten(1)


class ResNet(nn.Module):
    """CLIP's ResNet (section 2.4): a stem of three convolutions, anti-aliased strides, attention pooling.

    Args:
        layers: blocks of each stage; every stage after the first halves the picture and doubles the channels.
        width: channels of the stem.
        heads: attention heads of the pooling, a divisor of output_dim = 4 * width * 2**(stages - 1).
        image_size: height and width of the pictures, in pixels, a multiple of 4 * 2**(stages - 1).

    Raises:
        ValueError: a size is not positive, or one that must divide another does not.
    """

    def __init__(self, layers: Sequence[int], width: int, heads: int, image_size: int) -> None:
        super().__init__()
        check_positive(image_size=image_size, stages=len(layers), layers=min(layers, default=1))
        reduction = 4 * 2 ** (len(layers) - 1)
        self.layers, self.image_size, self.output_dim = tuple(layers), image_size, width * reduction
        check_divides(self.output_dim, heads)
        if width % 2:
            raise ValueError(f"width: got {width}; accepted is an even number")
        if image_size % reduction:
            raise ValueError(f"image_size: got {image_size}; accepted is a multiple of {reduction}")
        stem: list[nn.Module] = []
        for inputs, outputs, stride in ((3, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1)):
            stem += [*_conv(inputs, outputs, 3, stride), nn.ReLU()]
        stages: list[nn.Module] = []
        inputs = width
        for stage, blocks in enumerate(layers):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Bottleneck(inputs, width * 2**stage, stride))
                inputs = 4 * width * 2**stage
        self.stem = nn.Sequential(*stem, nn.AvgPool2d(2))
        self.stages = nn.Sequential(*stages)
        self.pool = AttentionPool((image_size // reduction) ** 2, self.output_dim, heads)

    def forward(self, images: Tensor) -> Tensor:  # [b, 3, image_size, image_size] -> [b, output_dim]
        return cast(Tensor, self.pool(self.stages(self.stem(images))))
