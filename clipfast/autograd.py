"""The loss as one differentiable PyTorch operator: visible to torch.compile, checked by opcheck, few calls at small n.

Where nothing looks at operators, the same two functions run as a torch.autograd.Function, which costs half the time.

The forward pass takes a backend's block statistics (clipfast/backends/__init__.py) and makes the loss of them; the
backward pass makes their weights and hands them to the backend, which recomputes the logits. Saved for it are x, y and
vectors over the batch: O((n + m) d) bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from clipfast import dispatch
from clipfast.norms import l2_normalize, norm_factors, through_norms
from clipfast.problem import accumulation_dtype, statistics_dtype


def margin(negatives: Tensor, positive: Tensor) -> Tensor:  # [n], [n] -> [n]
    """z - p of one direction: the negatives' logsumexp less the positive logit.

    The cross-entropy of a row is -log(e^p / (e^p + e^z)) = softplus(z - p) and its derivative is sigmoid(z - p). In
    this form both keep their relative precision however small they get.
    """
    # A logit of +inf makes the dense formula NaN (inf - inf); 0 * inf brings that NaN back.
    infinite = 0 * (negatives.clamp(min=0) + positive.clamp(min=0))
    return negatives - positive + infinite


def margins(row_lse: Tensor, col_lse: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:  # [n], [m], [n] -> [n], [n]
    """z - p of both directions."""
    return margin(row_lse, positive), margin(col_lse[: positive.shape[0]], positive)


def symmetric_cross_entropy(row_lse: Tensor, col_lse: Tensor, positive: Tensor) -> Tensor:  # [n], [m], [n] -> []
    """Mean cross-entropy of both directions."""
    image_to_text, text_to_image = (-logsigmoid(-margin) for margin in margins(row_lse, col_lse, positive))
    return (image_to_text + text_to_image).mean() / 2


def symmetric_cross_entropy_weights(
    row_lse: Tensor,  # [n]
    col_lse: Tensor,  # [m]
    positive: Tensor,  # [n]
    gradient: Tensor,  # []
) -> tuple[Tensor, Tensor, Tensor]:  # [n], [m], [n]
    """The derivatives of the symmetric cross-entropy by row_lse, col_lse and positive, times `gradient`."""
    n = positive.shape[0]
    row_weight, own_col_weight = (
        gradient * margin.sigmoid() / (2 * n) for margin in margins(row_lse, col_lse, positive)
    )
    col_weight = torch.nn.functional.pad(own_col_weight, (0, col_lse.shape[0] - n))
    return row_weight, col_weight, -(row_weight + own_col_weight)


def row_cross_entropy(row_lse: Tensor, col_lse: Tensor, positive: Tensor) -> Tensor:  # [n], [m], [n] -> []
    """Mean cross-entropy of the rows alone."""
    return -logsigmoid(-margin(row_lse, positive)).mean()


def row_cross_entropy_weights(
    row_lse: Tensor,  # [n]
    col_lse: Tensor,  # [m]
    positive: Tensor,  # [n]
    gradient: Tensor,  # []
) -> tuple[Tensor, Tensor, Tensor]:  # [n], [m], [n]
    """The derivatives of the rows' cross-entropy by row_lse, col_lse and positive, times `gradient`."""
    row_weight = gradient * margin(row_lse, positive).sigmoid() / positive.shape[0]
    return row_weight, torch.zeros_like(col_lse), -row_weight


def _cross_entropy(backend: ModuleType, symmetric: bool) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """The cross-entropy of the statistics and its weights: both directions, in the backend's one call if it has one."""
    if not symmetric:
        return row_cross_entropy, row_cross_entropy_weights
    return (
        getattr(backend, "symmetric_cross_entropy", symmetric_cross_entropy),
        getattr(backend, "symmetric_cross_entropy_weights", symmetric_cross_entropy_weights),
    )


def smoothing_term(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    positive: Tensor,  # [n]
    symmetric: bool,
) -> Tensor:  # []
    """What smoothed labels add to the loss per unit: the mean positive logit less the mean logit of the directions.

    Means of logits need the mean features alone.
    """
    mean_x, mean_y = _mean_features(x, y, symmetric)
    return positive.mean() - scale * (mean_x * mean_y).sum() - bias


def _add_smoothing_gradients(
    weight: Tensor,  # []
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    symmetric: bool,
    dx: Tensor,  # [n, d], added to
    dy: Tensor,  # [m, d], added to
) -> Tensor:  # []
    """Add weight times the gradients of `smoothing_term` to dx and dy, and return what dscale gets."""
    n, m = x.shape[0], y.shape[0]
    mean_x, mean_y = _mean_features(x, y, symmetric)
    rows, columns = (0.5, 0.5) if symmetric else (1.0, 0.0)  # the directions' parts in the loss
    share = mean_x / (m / rows)  # of every text in the images' mean logit
    dx += weight * scale / n * (y[:n] - mean_y)
    dy[:n] += weight * scale * ((x - columns * mean_x) / n - share)
    dy[n:] -= weight * scale * share
    own = (x.to(mean_x.dtype) * y[:n]).sum() / n
    return weight * (own - (mean_x * mean_y).sum())


def _add_smoothing_gradients_through_norms(
    weight: Tensor,  # []
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    factors: tuple[Tensor, ...],  # [n], [m]
    scale: Tensor,  # []
    symmetric: bool,
    dx: Tensor,  # [n, d], added to
    dy: Tensor,  # [m, d], added to
) -> Tensor:  # []
    """`_add_smoothing_gradients` of the normalized rows, by x and y."""
    by_rows = scale.new_zeros(x.shape), scale.new_zeros(y.shape)
    dscale = _add_smoothing_gradients(weight, l2_normalize(x), l2_normalize(y), scale, symmetric, *by_rows)
    for total, gradient, features, factor in zip((dx, dy), by_rows, (x, y), factors, strict=True):
        total += through_norms(gradient, features, factor)
    return dscale


def _operands(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    normalize: bool,
    backend: ModuleType,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """x and y as the backend takes them, and their row factors if it is the one to normalize.

    The normalized rows that other backends take are made anew for the backward pass, so that none keeps a copy.
    """
    if normalize and backend.folds_norms(x.dtype):
        return x, y, (norm_factors(x), norm_factors(y))
    return (l2_normalize(x), l2_normalize(y), ()) if normalize else (x, y, ())


def _mean_features(x: Tensor, y: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:  # [n, d], [m, d] -> [d], [d]
    n, accumulator = x.shape[0], accumulation_dtype(x.dtype)
    mean_y = y.mean(dim=0, dtype=accumulator)
    if symmetric:
        mean_y = (mean_y + y[:n].mean(dim=0, dtype=accumulator)) / 2
    return x.mean(dim=0, dtype=accumulator), mean_y


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast would round the logits to half precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d], m >= n
    scale: Tensor,  # []
    bias: Tensor,  # []
    normalize: bool,
    label_smoothing: float,
    backend: str,
    symmetric: bool = True,  # both directions, or the rows' alone
) -> tuple[
    Tensor, Tensor, Tensor, Tensor
]:  # loss [], row_lse [n], col_lse [m], positive [n]; only the loss has a gradient
    with _without_autocast(x.device):
        chosen = dispatch.get(backend)
        rows_x, rows_y, factors = _operands(x, y, normalize, chosen)
        row_lse, col_lse, positive = chosen.forward(rows_x, rows_y, scale, bias, 0, *factors)
        cross_entropy, _ = _cross_entropy(chosen, symmetric)
        loss = cross_entropy(row_lse, col_lse, positive)
        if label_smoothing:
            if factors:
                rows_x, rows_y = l2_normalize(x), l2_normalize(y)
            loss = loss + label_smoothing * smoothing_term(rows_x, rows_y, scale, bias, positive, symmetric)
        return loss.to(scale.dtype), row_lse, col_lse, positive


def _backward(
    gradient: Tensor,  # []
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    row_lse: Tensor,  # [n]
    col_lse: Tensor,  # [m]
    positive: Tensor,  # [n]
    normalize: bool,
    label_smoothing: float,
    backend: str,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # dx [n, d], dy [m, d], dscale [], dbias []
    with _without_autocast(x.device):
        chosen = dispatch.get(backend)
        rows_x, rows_y, factors = _operands(x, y, normalize, chosen)
        _, weights_of = _cross_entropy(chosen, symmetric)
        weights = row_weight, col_weight, positive_weight = weights_of(row_lse, col_lse, positive, gradient)
        dx, dy, dscale = chosen.backward(rows_x, rows_y, scale, bias, row_lse, col_lse, *weights, 0, *factors)
        # db = sum_ij G_ij, and each exp(L_ij - lse) sums to 1 over its row or column.
        dbias = row_weight.sum() + col_weight.sum() + positive_weight.sum()
        if label_smoothing:
            weight = label_smoothing * gradient
            if factors:
                dscale = dscale + _add_smoothing_gradients_through_norms(
                    weight, x, y, factors, scale, symmetric, dx, dy
                )
            else:
                dscale = dscale + _add_smoothing_gradients(weight, rows_x, rows_y, scale, symmetric, dx, dy)
        if normalize and not factors:
            dx, dy = (through_norms(g, t, norm_factors(t)).to(t.dtype) for g, t in ((dx, x), (dy, y)))
        return dx, dy, dscale, dbias.to(bias.dtype)


contrastive_loss = torch.library.custom_op("clipfast::contrastive_loss", mutates_args=())(_forward)
contrastive_loss_backward = torch.library.custom_op("clipfast::contrastive_loss_backward", mutates_args=())(_backward)


@contrastive_loss.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_lse, col_lse, positive = (
        x.new_empty(size, dtype=statistics_dtype(x.device)) for size in (x.shape[0], y.shape[0], x.shape[0])
    )
    return scale.new_empty(()), row_lse, col_lse, positive


@contrastive_loss_backward.register_fake
def _(gradient: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(()), bias.new_empty(())


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, bias, *ctx.options = inputs
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(x, y, scale, bias, *statistics)


def _operator_backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = contrastive_loss_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * len(ctx.options)


def _refuse_double_backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "clipfast does not support double backward: its backward pass has no derivative. Use "
        "clipfast.reference.contrastive_loss where a gradient of the gradient is needed."
    )


contrastive_loss.register_autograd(_operator_backward, setup_context=_save_for_backward)
contrastive_loss_backward.register_autograd(_refuse_double_backward)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *options: Any) -> Tensor:
        loss, *statistics = _forward(x, y, scale, bias, *options)
        ctx.save_for_backward(x, y, scale, bias, *statistics)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # With create_graph the operator is what refuses a second derivative.
        derivative = contrastive_loss_backward if torch.is_grad_enabled() else _backward
        return *derivative(gradient, *ctx.saved_tensors, *ctx.options), *[None] * len(ctx.options)


def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *options: Any) -> Tensor:  # []
    """`contrastive_loss`'s first output, with as little overhead as what watches the call allows.

    torch.compile, dispatch modes (fake tensors, counters of operations), functorch's transforms and subclasses of
    Tensor see an operator.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in (x, y, scale, bias))
    )
    value: Tensor
    if watched:
        value, *_ = contrastive_loss(x, y, scale, bias, *options)
    else:
        value = _Eager.apply(x, y, scale, bias, *options)  # type: ignore[no-untyped-call]
    return value
