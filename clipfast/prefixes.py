"""Losses summed over prefixes of the features (Matryoshka)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from clipfast import arguments
from clipfast.modules import Loss


def matryoshka(
    loss: Callable[..., Any], dims: Sequence[int], weights: Sequence[float] | None = None
) -> Callable[..., Any]:
    """A loss that is the weighted sum of `loss` over prefixes of both features, each normalized by itself.

    Kusupati et al. 2022 (arXiv:2205.13147), as in sentence-transformers' MatryoshkaLoss: sum_k weights_k
    loss(image_features[:, :dims_k], text_features[:, :dims_k], ...). The prefixes are views, nothing is copied.

    Args:
        loss: `clipfast.contrastive_loss`, `clipfast.siglip_loss` or another function that takes normalize=True; or a
            module of theirs that was made with normalize=True.
        dims: the prefixes' widths, each from 1 to d.
        weights: one for each; 1 where left out.

    Returns:
        A callable with the loss's arguments, which returns the sum, or with output_dict the dict of the sums.

    Raises:
        TypeError, ValueError: an argument is not as stated, or, when it is called, a prefix is wider than the features.
    """
    widths = tuple(arguments.positive_integer("dims", dim) for dim in dims)
    if not widths:
        raise ValueError("dims: got none; accepted is at least one width")
    factors = (1.0,) * len(widths) if weights is None else tuple(float(weight) for weight in weights)
    if len(factors) != len(widths):
        raise ValueError(f"weights: got {len(factors)}; accepted is one for each of the {len(widths)} dims")
    options = {"normalize": True}
    if isinstance(loss, Loss):
        if not loss.options.get("normalize"):
            raise ValueError("loss: got a module made with normalize=False; each prefix must be normalized by itself")
        options = {}

    def sum_over_prefixes(image_features: Tensor, text_features: Tensor, *rest: Any, **named: Any) -> Any:
        if named.get("return_metrics"):
            raise ValueError("return_metrics: got True; accepted is False, for a sum of losses has no metrics")
        for name, features in {"image_features": image_features, "text_features": text_features}.items():
            if features.shape[-1] < max(widths):
                raise ValueError(f"{name}: got d = {features.shape[-1]}; dims has {max(widths)}")
        parts = [
            loss(image_features[:, :width], text_features[:, :width], *rest, **named, **options) for width in widths
        ]
        if isinstance(parts[0], dict):
            return {name: _weighted(factors, [part[name] for part in parts]) for name in parts[0]}
        return _weighted(factors, parts)

    return sum_over_prefixes


def _weighted(factors: Sequence[float], losses: Sequence[Tensor]) -> Any:
    return sum(factor * loss for factor, loss in zip(factors, losses, strict=True))
