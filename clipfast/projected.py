"""The softmax loss from the encoders' outputs on, as one operation: projections, their norms, logits, softmaxes.

A projection and the norms of its rows are formed together. Saved are the projected rows as they are, and the norms,
which the logits take as factors (clipfast/norms.py): no normalized copy. To project again in the backward pass would
save what `contrastive_loss` saves anyway, at the price of the product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipfast import dispatch, softmax
from clipfast.block import Statistics
from clipfast.norms import norm_factors
from clipfast.problem import kept_dtype
from clipfast.products import returns_sums, summed
from clipfast.softmax import without_autocast


class Projection(NamedTuple):
    """The rows F W + b of one side."""

    features: Tensor  # [n, d']
    weight: Tensor  # [d', d]
    bias: Tensor | None = None  # [d]

    def rows(self, backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # [n, d], [n]
        """The projected rows in `dtype`, and what makes the length of each 1."""
        features, weight = self.features.to(dtype), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if project := getattr(dispatch.get(backend), "project", None):
            return project(features, weight, bias)  # type: ignore[no-any-return]
        rows = features @ weight if bias is None else torch.addmm(bias, features, weight)
        return rows, norm_factors(rows)

    def plain_rows(self, dtype: torch.dtype) -> Tensor:  # [n, d]
        """The projected rows by layers of torch, which differentiates them."""
        rows = self.features.to(dtype) @ self.weight.to(dtype)
        return rows if self.bias is None else rows + self.bias.to(dtype)

    def gradients(
        self, gradient: Tensor, dtype: torch.dtype, of_features: bool, of_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By the features, the weight and the bias, of one by the rows; empty where it is not wanted."""
        unit = None
        if dtype == torch.float16 and not returns_sums(gradient.device):
            dtype = torch.float32
        elif dtype == torch.float16:  # has no range for a gradient over n
            unit = torch.where(gradient.isfinite(), gradient.abs(), 0).amax().clamp_min(torch.finfo(torch.float32).tiny)
        operand = (gradient if unit is None else gradient / unit).to(dtype)

        def by(inputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
            product = summed(left, right)
            return (product if unit is None else product * unit).to(inputs.dtype)

        none = self.features.new_empty(0)
        return (
            by(self.features, operand, self.weight.to(dtype).T) if of_features else none,
            by(self.weight, self.features.to(dtype).T, operand) if of_weight else none,
            none if self.bias is None else gradient.sum(dim=0).to(self.bias.dtype),
        )


class Rows(NamedTuple):
    """Both sides' projected rows and their factors."""

    x: Tensor  # [n, d]
    y: Tensor  # [m, d]
    x_factor: Tensor  # [n]
    y_factor: Tensor  # [m]


def forward(
    images: Projection,
    texts: Projection,
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    dtype: torch.dtype,  # of the projected rows
    options: softmax.Options,
) -> tuple[Tensor, Statistics, Rows]:
    with without_autocast(scale.device):
        (x, x_factor), (y, y_factor) = (side.rows(options.backend, dtype) for side in (images, texts))
        factors = x_factor, y_factor
        loss, statistics = softmax.forward(x, y, scale, bias, image_ids, text_ids, options, factors)
    return loss, statistics, Rows(x, y, *factors)


def backward(
    gradient: Tensor,  # as the loss
    images: Projection,
    texts: Projection,
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    rows: Rows,
    statistics: Statistics,
    wanted: tuple[bool, bool, bool, bool],  # by images' and texts' features, by their weights
    options: softmax.Options,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """`Projection.gradients` of images and texts, dscale [] and dbias []."""
    dtype, inputs = rows.x.dtype, (rows.x, rows.y, scale, bias, image_ids, text_ids)
    with without_autocast(scale.device):
        (dx, dy, dscale), dbias = softmax.backward(
            gradient, *inputs, statistics, options, (rows.x_factor, rows.y_factor), kept_dtype(dtype)
        )
        by_images = images.gradients(dx, dtype, wanted[0], wanted[2])
        by_texts = texts.gradients(dy, dtype, wanted[1], wanted[3])
    return by_images, by_texts, dscale, dbias
