"""How good a model is on validation pairs: retrieval, and classification among their captions."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from clipfast.emoji.data import Tokenizer
from clipfast.functional import contrastive_loss
from clipfast.metrics import retrieval_metrics
from clipfast.training.batches import Pairs, loader
from clipfast.training.flags import Refused
from clipfast.training.model import autocast_of, clip_of, image_size
from clipfast.training.sources import Source

KS = (1, 5, 10)


@torch.no_grad()
def evaluate(
    model: nn.Module, source: Source, tokenizer: Tokenizer, settings: argparse.Namespace, zero_shot: bool
) -> dict[str, float | None]:
    """Loss and recall over all validation pairs at once; with zero_shot also accuracy among their different captions.

    Args:
        model: as `model.build` makes it, with the weights to judge.
        source: the pairs; those that cannot be read are left out.

    Raises:
        Refused: none can be read.
    """
    clip, device = clip_of(model.eval()), next(model.parameters()).device
    images, texts = [], []
    tokens: list[Tensor] = []
    places = [[(0, i) for i in range(b, min(b + settings.batch_size, len(source)))]
              for b in range(0, len(source), settings.batch_size)]  # fmt: skip
    with autocast_of(settings, device)():
        for batch in loader(Pairs(source, image_size(settings), None), places, tokenizer, settings.workers):
            if len(batch.images):
                images.append(clip.encode_image(batch.images.to(device)).float())
                texts.append(clip.encode_text(batch.tokens.to(device)).float())
                tokens += list(batch.tokens)
    if not images:
        raise Refused("--val-data: no pair can be read")
    x, y, scale = torch.cat(images), torch.cat(texts), clip.head.logit_scale.exp().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this process's own rows, on purpose
        row: dict[str, float | None] = {"pairs": len(x), "loss": contrastive_loss(x, y, scale).item()}
        recall = retrieval_metrics(x, y, KS)
    row |= {name: recall[name] for name in (f"{d}_R@{k}" for d in ("image_to_text", "text_to_image") for k in KS)}
    return row | {"zero_shot_accuracy": _accuracy(x, y, tokens) if zero_shot else None}


def _accuracy(x: Tensor, y: Tensor, tokens: list[Tensor]) -> float:  # x, y [n, d]
    """Of pictures classified among the different captions of all pairs, by the captions themselves as prompts."""
    classes: dict[tuple[int, ...], int] = {}
    keys = [tuple(t for t in row.tolist() if t) for row in tokens]
    labels = torch.tensor([classes.setdefault(key, len(classes)) for key in keys], device=x.device)
    first = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))
    weights = y[[first[key] for key in classes]]  # [classes, d]
    right = sum((part @ weights.T).argmax(1).eq(label).sum().item() for part, label in _chunks(x, labels))
    return float(right) / len(x)


def _chunks(x: Tensor, labels: Tensor, rows: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(x, rows), torch.split(labels, rows), strict=True)
