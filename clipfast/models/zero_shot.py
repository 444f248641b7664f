"""A classifier made of words (Radford et al. 2021, arXiv:2103.00020, sections 3.1.2 and 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipfast.models.clip import CLIP


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
