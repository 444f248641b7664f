"""The reference CLIP in plain PyTorch: two encoders, the projection head, and zero-shot classification.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv:2103.00020),
sections 2.4 (the encoders), 2.5 (their initial values and the temperature) and 3.1.4 (prompts).

Token ids follow the paper's code: 0 pads, and the end-of-text token has the largest id of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu, scaled_dot_product_attention

from clipfast.modules import ProjectionHead

PAD = 0


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {size}; accepted is a positive number")


def _check_divides(width: int, heads: int) -> None:
    _check_positive(width=width, heads=heads)
    if width % heads:
        raise ValueError(f"heads: got {heads}; accepted is a divisor of the width, {width}")


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, w] -> [b, s, w]
        b, s, w = x.shape
        qkv = self.qkv(self.norm_1(x)).view(b, s, 3, self.heads, w // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [b, heads, s, w / heads]
        attended = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(b, s, w)))
        x = x + self.dropout(self.mlp(self.norm_2(x)))
        return x


def _transformer(width: int, layers: int, heads: int, causal: bool, dropout: float) -> nn.Sequential:
    """Blocks with the paper's initial values: the residual branches shrink with the depth."""
    blocks = nn.Sequential(*(Block(width, heads, causal, dropout) for _ in range(layers)))
    for module in blocks:
        block = cast(Block, module)
        nn.init.normal_(block.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.out.weight, std=(2 * layers * width) ** -0.5)
        nn.init.normal_(cast(nn.Linear, block.mlp[0]).weight, std=(2 * width) ** -0.5)
        nn.init.normal_(cast(nn.Linear, block.mlp[2]).weight, std=(2 * layers * width) ** -0.5)
    return blocks


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021, arXiv:2010.11929) with CLIP's extra layer norm before the transformer.

    Args:
        image_size: height and width of the pictures, in pixels.
        patch_size: height and width of a patch, a divisor of image_size.
        width: channels of a token.
        layers: transformer blocks.
        heads: attention heads, a divisor of width.
        dropout: of each residual branch.

    Raises:
        ValueError: a size is not positive, or one that must divide another does not.
    """

    def __init__(
        self, image_size: int, patch_size: int, width: int, layers: int, heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        _check_positive(image_size=image_size, patch_size=patch_size, layers=layers)
        _check_divides(width, heads)
        if image_size % patch_size:
            raise ValueError(f"patch_size: got {patch_size}; accepted is a divisor of image_size, {image_size}")
        self.image_size, self.output_dim = image_size, width
        self.patches = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_token = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positions = nn.Parameter(width**-0.5 * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = _transformer(width, layers, heads, causal=False, dropout=dropout)
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
        pool: list[nn.Module] = [nn.AvgPool2d(stride)] if stride > 1 else []
        self.residual = nn.Sequential(
            *_conv(inputs, width, 1), nn.ReLU(), *_conv(width, width, 3), nn.ReLU(), *pool, *_conv(width, outputs, 1)
        )
        # The block begins as the identity.
        nn.init.zeros_(cast(nn.BatchNorm2d, self.residual[-1]).weight)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*pool, *_conv(inputs, outputs, 1))

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
        _check_positive(image_size=image_size, stages=len(layers), layers=min(layers, default=1))
        reduction = 4 * 2 ** (len(layers) - 1)
        self.image_size, self.output_dim = image_size, width * reduction
        _check_divides(self.output_dim, heads)
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


class TextTransformer(nn.Module):
    """A causal pre-norm transformer; a text's features are those of its end-of-text token.

    Args:
        vocab_size: number of token ids; the largest is the end-of-text token.
        context_length: most tokens in a text.
        width: channels of a token.
        layers: transformer blocks.
        heads: attention heads, a divisor of width.
        dropout: of the token embeddings and of each residual branch.

    Raises:
        ValueError: a size is not positive, or heads does not divide width.
    """

    def __init__(
        self, vocab_size: int, context_length: int, width: int, layers: int, heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        _check_positive(vocab_size=vocab_size, context_length=context_length, layers=layers)
        _check_divides(width, heads)
        self.output_dim = width
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = _transformer(width, layers, heads, causal=True, dropout=dropout)
        self.norm_post = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def hidden(self, tokens: Tensor) -> Tensor:  # [b, s] -> [b, s, width], s <= context_length
        """Features of every token; those of token i depend on tokens up to i."""
        x = self.dropout(self.tokens(tokens) + self.positions[: tokens.shape[1]])
        return cast(Tensor, self.norm_post(self.blocks(x)))

    def forward(self, tokens: Tensor) -> Tensor:  # [b, s] -> [b, width]
        end = tokens.argmax(dim=-1)
        return self.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), end]


class CBOW(nn.Module):
    """A bag of words: the mean of the token embeddings without padding, then a residual MLP.

    Args:
        vocab_size: number of token ids, 0 pads.
        width: channels of a token.
        dropout: of whole token embeddings' channels and of the MLP.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, vocab_size: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        _check_positive(vocab_size=vocab_size, width=width)
        self.output_dim = width
        self.tokens = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.norm_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm_2 = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # [b, s] -> [b, width]
        present = (tokens != PAD).unsqueeze(-1)  # [b, s, 1]
        mean = (self.tokens(tokens) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        x = self.dropout(self.norm_1(mean))
        return cast(Tensor, self.norm_2(x + self.dropout(self.mlp(x))))


class CLIP(nn.Module):
    """Two encoders and the head that holds W_i, W_t and the temperature.

    `loss(**model(images, tokens))` works with `clipfast.ContrastiveLoss()` as it does in open_clip.

    Args:
        image_encoder: maps images to features [b, output_dim] and has the attribute `output_dim`.
        text_encoder: maps tokens to features [b, output_dim] and has the attribute `output_dim`.
        embed_dim: d, the width of the joint embedding.
    """

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module, embed_dim: int) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        image_dim, text_dim = cast(int, image_encoder.output_dim), cast(int, text_encoder.output_dim)
        self.head = ProjectionHead(image_dim, text_dim, embed_dim)

    def encode_image(self, images: Tensor) -> Tensor:  # [b, 3, h, w] -> [b, d]
        """Normalized embeddings of pictures."""
        return self.head.encode_image(self.image_encoder(images))

    def encode_text(self, tokens: Tensor) -> Tensor:  # [b, s] -> [b, d]
        """Normalized embeddings of texts."""
        return self.head.encode_text(self.text_encoder(tokens))

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The loss's arguments: image_features [b, d], text_features [b, d], logit_scale exp(t), 0-D."""
        return {
            "image_features": self.encode_image(images),
            "text_features": self.encode_text(tokens),
            "logit_scale": self.head.logit_scale.exp(),
        }


@torch.no_grad()
def zero_shot_weights(
    model: CLIP,
    tokenize: Callable[[Sequence[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str] = ("{}",),
) -> Tensor:  # [classes, d]
    """The classifier made of words (section 3.1.4): each class is the mean of its prompts' embeddings, normalized.

    Args:
        model: in eval mode.
        tokenize: maps texts to tokens [b, s] on the model's device.
        class_names: one name for each class.
        templates: prompts with `{}` where the name goes.

    Raises:
        ValueError: there are no names, no templates, or a template without `{}`.
    """
    if not class_names:
        raise ValueError("class_names: got none; accepted is at least one name")
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"templates: got {templates!r}; accepted is at least one text, each with {{}} for the name")
    means = [
        model.encode_text(tokenize([template.format(name) for template in templates])).mean(dim=0)
        for name in class_names
    ]
    return normalize(torch.stack(means), dim=-1)


@torch.no_grad()
def classify(model: CLIP, images: Tensor, weights: Tensor) -> Tensor:
    """Probabilities [b, classes] of images [b, 3, h, w] under `zero_shot_weights` [classes, d]."""
    logits = model.head.logit_scale.exp() * model.encode_image(images) @ weights.T
    return logits.softmax(dim=-1)


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
    "vit-tiny": Config(256, 48, 4, 128, 4, 8, 2, 256, 4),
    "resnet-tiny": Config(256, 48, (1, 1, 1), 24, 4, None, 2, 256, 4),
}
TEXT_ENCODERS = ("transformer", "cbow")


def build_model(
    name: str, vocab_size: int, context_length: int = 77, text: str = "transformer", dropout: float = 0.0
) -> CLIP:
    """A CLIP with new weights.

    Args:
        name: a row of CONFIGS.
        vocab_size: number of token ids.
        context_length: most tokens in a text.
        text: the text encoder, "transformer" or "cbow".
        dropout: of both transformers, or of the bag of words.

    Raises:
        ValueError: the name or the text encoder is unknown, or a size is wrong.
    """
    if name not in CONFIGS:
        raise ValueError(f"name: got {name!r}; accepted are {', '.join(CONFIGS)}")
    if text not in TEXT_ENCODERS:
        raise ValueError(f"text: got {text!r}; accepted are {', '.join(TEXT_ENCODERS)}")
    row = CONFIGS[name]
    image_encoder: nn.Module
    text_encoder: nn.Module
    if isinstance(row.image_layers, tuple):
        image_encoder = ResNet(row.image_layers, row.image_width, row.image_heads, row.image_size)
    else:
        assert row.patch_size is not None
        image_encoder = VisionTransformer(
            row.image_size, row.patch_size, row.image_width, row.image_layers, row.image_heads, dropout
        )
    if text == "cbow":
        text_encoder = CBOW(vocab_size, row.text_width, dropout)
    else:
        text_encoder = TextTransformer(
            vocab_size, context_length, row.text_width, row.text_layers, row.text_heads, dropout
        )
    return CLIP(image_encoder, text_encoder, row.embed_dim)
