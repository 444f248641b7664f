"""The losses as operators, `clipfast::...`: tensors and plain values in, tensors out (clipfast/autograd.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipfast import distillation, sigmoid, softmax
from clipfast.autograd import differentiable, flat
from clipfast.block import Statistics
from clipfast.problem import kept_dtype, statistics_dtype


@flat
def _contrastive_forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    options: softmax.Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and the statistics; row_above and col_above are empty without metrics."""
    loss, statistics = softmax.forward(x, y, scale, bias, image_ids, text_ids, options)
    row_lse, col_lse, positive, *above = statistics
    row_above, col_above = (x.new_empty(0, dtype=torch.int32) if t is None else t for t in above)
    return loss, row_lse, col_lse, positive, row_above, col_above


@flat
def _contrastive_backward(
    gradient: Tensor,  # as the loss
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    row_lse: Tensor,  # [n]
    col_lse: Tensor,  # [m]
    positive: Tensor,  # [n]
    options: softmax.Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # dx [n, d], dy [m, d], dscale [], dbias []
    statistics = Statistics(row_lse, col_lse, positive)
    gradients, dbias = softmax.backward(gradient, x, y, scale, bias, image_ids, text_ids, statistics, options)
    return *gradients, dbias.to(bias.dtype)


def _contrastive_shapes(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, image_ids: Any, text_ids: Any, *options: Any
) -> tuple[Tensor, ...]:
    n, m, chosen = x.shape[0], y.shape[0], softmax.Options(*options)
    row_lse, col_lse, positive = (x.new_empty(size, dtype=statistics_dtype(x.device)) for size in (n, m, n))
    above = (x.new_empty(size if chosen.metrics else 0, dtype=torch.int32) for size in (n, m))
    return chosen.chosen(scale.new_empty(n), scale.new_empty(n)), row_lse, col_lse, positive, *above


def _contrastive_backward_shapes(
    gradient: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(()), bias.new_empty(())


contrastive_loss = differentiable(
    "contrastive_loss",
    _contrastive_forward,
    _contrastive_backward,
    _contrastive_shapes,
    _contrastive_backward_shapes,
    # x, y, scale, bias, both ids and the three statistics; the options.
    save=lambda inputs, outputs: ((*inputs[:6], *outputs[1:4]), inputs[6:]),
)


@flat
def _siglip_forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    gradients: bool,
    options: sigmoid.Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # the loss, dx, dy, dscale, dbias; without gradients they are empty
    loss, formed, dbias = sigmoid.forward(x, y, scale, bias, image_ids, text_ids, gradients, options)
    if formed is None or dbias is None:
        dx, dy, dscale, dbias = _no_gradients(x, y, scale, bias)
        return loss, dx, dy, dscale, dbias
    return loss, *formed, dbias.to(bias.dtype)


@flat
def _distillation_forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    teacher_x: Tensor,  # [n, d']
    teacher_y: Tensor,  # [m, d']
    teacher_scale: Tensor,  # []
    gradients: bool,
    options: distillation.Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # the loss, dx, dy, dscale; without gradients they are empty
    loss, formed = distillation.forward(x, y, scale, teacher_x, teacher_y, teacher_scale, gradients, options)
    dx, dy, dscale = _no_gradients(x, y, scale) if formed is None else formed
    return loss, dx, dy, dscale


def _no_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(0, dtype=kept_dtype(t.dtype)) for t in inputs)


def _formed_shapes(inputs: tuple[Tensor, ...], gradients: bool) -> tuple[Tensor, ...]:
    kept = (t.new_empty(t.shape if gradients else 0, dtype=kept_dtype(t.dtype)) for t in inputs)
    return inputs[2].new_empty(()), *kept


def _siglip_backward(
    gradient: Tensor,  # []
    dx: Tensor,  # [n, d]
    dy: Tensor,  # [m, d]
    dscale: Tensor,  # []
    dbias: Tensor,  # []
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (dx * gradient).to(dtype), (dy * gradient).to(dtype), dscale * gradient, dbias * gradient


def _distillation_backward(
    gradient: Tensor,  # []
    dx: Tensor,  # [n, d]
    dy: Tensor,  # [m, d]
    dscale: Tensor,  # []
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return (dx * gradient).to(dtype), (dy * gradient).to(dtype), dscale * gradient


def _save_gradients(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return outputs[1:], (inputs[0].dtype,)


# The gradients of these two are formed with the loss, and what is saved for the backward pass is those.
siglip_loss = differentiable(
    "siglip_loss",
    _siglip_forward,
    _siglip_backward,
    lambda *inputs: _formed_shapes(inputs[:4], inputs[6]),
    lambda gradient, *saved: _siglip_backward(gradient, *saved),
    _save_gradients,
    formed=True,
)
distillation_loss = differentiable(
    "distillation_loss",
    _distillation_forward,
    _distillation_backward,
    lambda *inputs: _formed_shapes(inputs[:3], inputs[6]),
    lambda gradient, *saved: _distillation_backward(gradient, *saved),
    _save_gradients,
    formed=True,
)
