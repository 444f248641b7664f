"""The reference CLIP: two encoders and the projection head, and the paper's models by name.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020),
sections 2.4 (the encoders), 2.5 (their initial values and the temperature), tables 19 and 20 (the models).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipfast.models.image import ResNet, VisionTransformer
from clipfast.models.text import CBOW, TextTransformer
from clipfast.modules import ProjectionHead
from clipfast.norms import l2_normalize

VOCAB_SIZE, CONTEXT_LENGTH = 49_408, 77


class Head(ProjectionHead):
    """`clipfast.ProjectionHead` with a bias b_i of the image projection, or without, where b_i is None."""

    def __init__(self, image_dim: int, text_dim: int, embed_dim: int, image_bias: bool) -> None:
        super().__init__(image_dim, text_dim, embed_dim)
        self.b_i = nn.Parameter(torch.zeros(embed_dim)) if image_bias else None

    def encode_image(self, image_features: Tensor) -> Tensor:
        """[n, image_dim] -> l2-normalized image embeddings [n, embed_dim]."""
        projected = image_features @ self.w_i
        return l2_normalize(projected if self.b_i is None else projected + self.b_i)

    def forward(self, image_features: Tensor, text_features: Tensor, **options: Any) -> Tensor:
        return super().forward(image_features, text_features, b_i=self.b_i, **options)


class CLIP(nn.Module):
    """Two encoders and the head that holds W_i, W_t and the temperature.

    `loss(**model(images, tokens))` works with `clipfast.ContrastiveLoss()` as it does in open_clip.

    Args:
        image_encoder: maps images to features [b, output_dim] and has the attribute `output_dim`.
        text_encoder: maps tokens to features [b, output_dim] and has the attribute `output_dim`.
        embed_dim: d, the width of the joint embedding.
        image_bias: the image projection has a bias, as that of the paper's ResNets has.
    """

    def __init__(
        self, image_encoder: nn.Module, text_encoder: nn.Module, embed_dim: int, image_bias: bool = False
    ) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        image_dim, text_dim = cast(int, image_encoder.output_dim), cast(int, text_encoder.output_dim)
        self.head = Head(image_dim, text_dim, embed_dim, image_bias)

    def encode_image(self, images: Tensor) -> Tensor:  # [b, 3, h, w] -> [b, d]
        """Normalized embeddings of pictures."""
        return self.head.encode_image(self.image_encoder(images))

    def encode_text(self, tokens: Tensor) -> Tensor:  # [b, s] -> [b, d]
        """Normalized embeddings of texts."""
        return self.head.encode_text(self.text_encoder(tokens))

    def loss(self, images: Tensor, tokens: Tensor, **options: Any) -> Tensor:
        """The contrastive loss, 0-D, of images [n, 3, h, w] and tokens [m, s], from the encoders' outputs on in one
        operation: what `clipfast.ContrastiveLoss(**options)` makes of `forward`, without the embeddings in memory.

        Under DistributedDataParallel or fully_shard it is `forward` that must be called.
        """
        return self.head(self.image_encoder(images), self.text_encoder(tokens), **options)  # type: ignore[no-any-return]

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The loss's arguments: image_features [b, d], text_features [b, d], logit_scale exp(t), 0-D."""
        return {
            "image_features": self.encode_image(images),
            "text_features": self.encode_text(tokens),
            "logit_scale": self.head.logit_scale.exp(),
        }


@dataclass(frozen=True)
class Config:
    """One row of the paper's tables 19 and 20. Without a patch size the image encoder is a ResNet."""

    embed_dim: int
    image_size: int
    image_layers: int | tuple[int, ...]
    image_width: int
    image_heads: int
    patch_size: int | None
    text_layers: int
    text_width: int
    text_heads: int


CONFIGS = {
    "RN50": Config(1024, 224, (3, 4, 6, 3), 64, 32, None, 12, 512, 8),
    "RN101": Config(512, 224, (3, 4, 23, 3), 64, 32, None, 12, 512, 8),
    "RN50x4": Config(640, 288, (4, 6, 10, 6), 80, 40, None, 12, 640, 10),
    "RN50x16": Config(768, 384, (6, 8, 18, 8), 96, 48, None, 12, 768, 12),
    "RN50x64": Config(1024, 448, (3, 15, 36, 10), 128, 64, None, 12, 1024, 16),
    "ViT-B-32": Config(512, 224, 12, 768, 12, 32, 12, 512, 8),
    "ViT-B-16": Config(512, 224, 12, 768, 12, 16, 12, 512, 8),
    "ViT-L-14": Config(768, 224, 24, 1024, 16, 14, 12, 768, 12),
    "ViT-L-14-336": Config(768, 336, 24, 1024, 16, 14, 12, 768, 12),
    # For the drawings of the demo.
    "vit-tiny": Config(256, 48, 4, 128, 4, 8, 2, 256, 4),
    "resnet-tiny": Config(256, 48, (1, 1, 1), 24, 4, None, 2, 256, 4),
}
TEXT_ENCODERS = ("transformer", "cbow")


def create_model(
    name: str | Config,
    vocab_size: int = VOCAB_SIZE,
    context_length: int = CONTEXT_LENGTH,
    text: str = "transformer",
    dropout: float = 0.0,
    *,
    quick_gelu: bool = False,
    device: torch.device | str | None = None,
) -> CLIP:
    """A CLIP with new weights.

    Args:
        name: a row of CONFIGS, or a row of your own.
        vocab_size: number of token ids.
        context_length: most tokens in a text.
        text: the text encoder, "transformer" or "cbow", a bag of words as wide as the transformer.
        dropout: of both transformers, or of the bag of words.
        quick_gelu: the activation of OpenAI's weights, x sigmoid(1.702 x), in place of GELU.
        device: where the weights are made; "meta" makes none.

    Raises:
        ValueError: the name or the text encoder is unknown, or a size is wrong.
    """
    if not isinstance(name, Config) and name not in CONFIGS:
        raise ValueError(f"name: got {name!r}; accepted are {', '.join(CONFIGS)}")
    if text not in TEXT_ENCODERS:
        raise ValueError(f"text: got {text!r}; accepted are {', '.join(TEXT_ENCODERS)}")
    row = name if isinstance(name, Config) else CONFIGS[name]
    image_encoder: nn.Module
    text_encoder: nn.Module
    with nullcontext() if device is None else torch.device(device):
        if isinstance(row.image_layers, tuple):
            image_encoder = ResNet(row.image_layers, row.image_width, row.image_heads, row.image_size)
        else:
            image_encoder = VisionTransformer(
                row.image_size,
                row.patch_size or 0,
                row.image_width,
                row.image_layers,
                row.image_heads,
                dropout,
                quick_gelu,
            )
        if text == "cbow":
            text_encoder = CBOW(vocab_size, row.text_width, dropout)
        else:
            text_encoder = TextTransformer(
                vocab_size, context_length, row.text_width, row.text_layers, row.text_heads, dropout, quick_gelu
            )
        return CLIP(image_encoder, text_encoder, row.embed_dim, image_bias=row.patch_size is None)


build_model = create_model  # the older name
