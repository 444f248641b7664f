"""Rows of length 1: the rows, the factors that make them, and the gradient through them."""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.block import Gradients
from clipfast.problem import accumulation_dtype

Factors = tuple[Tensor, Tensor]  # of x [n] and y [m]

MIN_NORM = 1e-12  # as in torch.nn.functional.normalize: a zero row stays zero


def l2_normalize(features: Tensor) -> Tensor:
    """Rows of length 1 in the features' dtype, with norms in the accumulation dtype; a zero row stays zero."""
    return (features / _norms(features)[:, None]).to(features.dtype)


def norm_factors(features: Tensor) -> Tensor:  # [n, d] -> [n]
    """What makes a row's length 1, in the accumulation dtype."""
    return _norms(features).reciprocal()


def through_norms(
    gradient: Tensor,  # [n, d], by the rows of length 1
    features: Tensor,  # [n, d]
    factors: Tensor,  # [n]
) -> Tensor:  # [n, d], by the features, in the accumulation dtype
    """u = f x has the gradient f (g - <g, u> u) by x; where the norm is at its floor, f does not depend on x."""
    rows = features * factors[:, None]
    along = torch.where(factors * MIN_NORM < 1 - 1e-6, (gradient * rows).sum(dim=1), 0)
    return (gradient - along[:, None] * rows) * factors[:, None]


def operands(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    normalize: bool,
    fold: bool,
    factors: Factors | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x and y as a block takes them, and their factors if the backend is to fold them in; `factors` where known.

    Rows that are normalized here are made anew in the backward pass, so that none keeps a copy.
    """
    if not normalize:
        return x, y, None, None
    if not fold:
        return l2_normalize(x), l2_normalize(y), None, None
    return x, y, *(factors or (norm_factors(x), norm_factors(y)))


def gradients_through_norms(
    gradients: Gradients, x: Tensor, y: Tensor, dtype: torch.dtype, factors: Factors | None = None
) -> Gradients:
    """By x and y what was by their normalized rows, in the accumulation dtype; rounded to `dtype` once."""
    x_factor, y_factor = factors or (norm_factors(x), norm_factors(y))
    dx = through_norms(gradients.dx, x, x_factor).to(dtype)
    return Gradients(dx, through_norms(gradients.dy, y, y_factor).to(dtype), gradients.dscale)


def _norms(features: Tensor) -> Tensor:  # [n, d] -> [n]
    norms: Tensor = torch.linalg.vector_norm(features, dim=1, dtype=accumulation_dtype(features.dtype))
    return norms.clamp_min(MIN_NORM)
