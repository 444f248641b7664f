"""The losses as operators, `clipfast::...`: tensors and plain values in, tensors out (clipfast/autograd.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipfast import dispatch, distillation, projected, sigmoid, softmax
from clipfast.autograd import differentiable
from clipfast.block import Statistics
from clipfast.problem import accumulation_dtype, kept_dtype, statistics_dtype
from clipfast.projected import Projection, Rows


def _contrastive_forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    bias: Tensor,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    options: softmax.Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss and the statistics; row_above and col_above are empty without metrics, kept without `keep`."""
    loss, statistics = softmax.forward(x, y, scale, bias, image_ids, text_ids, options)
    return loss, *_tensors(statistics, scale)


def _tensors(statistics: Statistics, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With empty ones in place of those that there are not."""
    row_lse, col_lse, positive, row_above, col_above, kept = statistics
    if row_above is None or col_above is None:
        row_above, col_above = (scale.new_empty(0, dtype=torch.int32) for _ in range(2))
    return row_lse, col_lse, positive, row_above, col_above, scale.new_empty(0) if kept is None else kept


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
    kept: Tensor,
    options: softmax.Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # dx [n, d], dy [m, d], dscale [], dbias []
    statistics = Statistics(row_lse, col_lse, positive, kept=kept if options.keep else None)
    gradients, dbias = softmax.backward(gradient, x, y, scale, bias, image_ids, text_ids, statistics, options)
    return *gradients, dbias if dbias.dtype == bias.dtype else dbias.to(bias.dtype)


def _contrastive_shapes(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, image_ids: Any, text_ids: Any, *options: Any
) -> tuple[Tensor, ...]:
    n, m, chosen = x.shape[0], y.shape[0], softmax.Options(*options)
    row_lse, col_lse, positive = (x.new_empty(size, dtype=statistics_dtype(x.device)) for size in (n, m, n))
    above = (x.new_empty(size if chosen.metrics else 0, dtype=torch.int32) for size in (n, m))
    kept = scale.new_empty(dispatch.get(chosen.backend).kept_size(n, m) if chosen.keep else 0)
    return chosen.chosen(scale.new_empty(n), scale.new_empty(n)), row_lse, col_lse, positive, *above, kept


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
    # x, y, scale, bias, both ids, the three statistics and the kept logits; the options.
    save=lambda inputs, outputs: ((*inputs[:6], *outputs[1:4], outputs[6]), inputs[6:]),
)


def _projected_forward(
    image_features: Tensor,  # [n, d']
    text_features: Tensor,  # [m, d'']
    w_i: Tensor,  # [d', d]
    w_t: Tensor,  # [d'', d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    b_i: Tensor | None,  # [d]
    b_t: Tensor | None,  # [d]
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    dtype: torch.dtype,  # of the projected rows
    of_images: bool,  # which gradients are wanted
    of_texts: bool,
    of_w_i: bool,
    of_w_t: bool,
    options: softmax.Options,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # as _contrastive_forward; x [n, d], y [m, d] and their rows' factors [n], [m]
    images, texts = Projection(image_features, w_i, b_i), Projection(text_features, w_t, b_t)
    loss, statistics, rows = projected.forward(images, texts, scale, bias, image_ids, text_ids, dtype, options)
    return loss, *_tensors(statistics, scale), *rows


def _projected_backward(
    gradient: Tensor,  # as the loss
    image_features: Tensor,  # [n, d']
    text_features: Tensor,  # [m, d'']
    w_i: Tensor,  # [d', d]
    w_t: Tensor,  # [d'', d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    b_i: Tensor | None,  # [d]
    b_t: Tensor | None,  # [d]
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    row_lse: Tensor,  # [n]
    col_lse: Tensor,  # [m]
    positive: Tensor,  # [n]
    kept: Tensor,
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    x_factor: Tensor,  # [n]
    y_factor: Tensor,  # [m]
    of_images: bool,
    of_texts: bool,
    of_w_i: bool,
    of_w_t: bool,
    options: softmax.Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # by the inputs but ids; unwanted are empty
    statistics = Statistics(row_lse, col_lse, positive, kept=kept if options.keep else None)
    by_images, by_texts, dscale, dbias = projected.backward(
        gradient,
        Projection(image_features, w_i, b_i),
        Projection(text_features, w_t, b_t),
        *(scale, bias, image_ids, text_ids, Rows(x, y, x_factor, y_factor), statistics),
        (of_images, of_texts, of_w_i, of_w_t),
        options,
    )
    (of_features, of_weights, of_biases) = zip(by_images, by_texts, strict=True)
    return *of_features, *of_weights, dscale, dbias.to(bias.dtype), *of_biases


def _projected_shapes(image_features: Tensor, text_features: Tensor, w_i: Tensor, *others: Any) -> tuple[Tensor, ...]:
    scale, bias, _, _, image_ids, text_ids, dtype, *_ = others[1:]
    x, y = (t.new_empty((t.shape[0], w_i.shape[1]), dtype=dtype) for t in (image_features, text_features))
    factors = (t.new_empty(t.shape[0], dtype=accumulation_dtype(dtype)) for t in (x, y))
    return *_contrastive_shapes(x, y, scale, bias, image_ids, text_ids, *others[12:]), x, y, *factors


def _projected_backward_shapes(gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    wanted = (*inputs[18:22], True, True, *(t is not None for t in inputs[6:8]))
    return tuple(
        t.new_empty(t.shape) if wants else inputs[0].new_empty(0) for t, wants in zip(inputs[:8], wanted, strict=True)
    )


projected_contrastive_loss = differentiable(
    "projected_contrastive_loss",
    _projected_forward,
    _projected_backward,
    _projected_shapes,
    _projected_backward_shapes,
    # All tensors, the three statistics, the kept logits and the rows with their factors; what is wanted, the options.
    save=lambda inputs, outputs: ((*inputs[:10], *outputs[1:4], *outputs[6:]), inputs[11:]),
)


def _symmetric_forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    bias: Tensor | None,  # []
    image_ids: Tensor | None,  # [n], int32
    text_ids: Tensor | None,  # [m], int32
    options: softmax.Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # the loss, dx, dy, dscale, dbias
    loss, formed, dbias = softmax.symmetric(x, y, scale, bias, image_ids, text_ids, options)
    return loss, *formed, dbias


def _symmetric_backward(
    gradient: Tensor | None,  # []
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor | None,  # []
    dx: Tensor,  # [n, d]
    dy: Tensor,  # [m, d]
    dscale: Tensor,  # []
    dbias: Tensor,  # []
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _scaled_gradients(gradient, dx, dy, dscale, dbias, x.dtype)


# Its gradients are formed with the loss. The inputs are saved as well: a graph through the gradients leads to them, and
# autograd sees whether they were changed.
symmetric_loss = differentiable(
    "symmetric_loss",
    _symmetric_forward,
    _symmetric_backward,
    lambda x, y, scale, *_: _formed_shapes((x, y, scale, scale), True),
    _symmetric_backward,
    save=lambda inputs, outputs: ((*inputs[:4], *outputs[1:]), ()),
    formed=True,
)


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


def _scaled_gradients(
    gradient: Tensor | None,  # []
    dx: Tensor,  # [n, d]
    dy: Tensor,  # [m, d]
    dscale: Tensor,  # []
    dbias: Tensor,  # []
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dy, dscale = _distillation_backward(gradient, dx, dy, dscale, dtype)
    return dx, dy, dscale, dbias if gradient is None else dbias * gradient


def _distillation_backward(
    gradient: Tensor | None,  # []
    dx: Tensor,  # [n, d]
    dy: Tensor,  # [m, d]
    dscale: Tensor,  # []
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    if gradient is not None:
        dx, dy, dscale = dx * gradient, dy * gradient, dscale * gradient
    if dx.dtype != dtype:
        dx, dy = dx.to(dtype), dy.to(dtype)
    return dx, dy, dscale


def _save_gradients(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return outputs[1:], (inputs[0].dtype,)


# The gradients of these two are formed with the loss, and what is saved for the backward pass is those.
siglip_loss = differentiable(
    "siglip_loss",
    _siglip_forward,
    _scaled_gradients,
    lambda *inputs: _formed_shapes(inputs[:4], inputs[6]),
    lambda gradient, *saved: _scaled_gradients(gradient, *saved),
    _save_gradients,
    formed=True,
    through=False,
)
distillation_loss = differentiable(
    "distillation_loss",
    _distillation_forward,
    _distillation_backward,
    lambda *inputs: _formed_shapes(inputs[:3], inputs[6]),
    lambda gradient, *saved: _distillation_backward(gradient, *saved),
    _save_gradients,
    formed=True,
    through=False,
)
