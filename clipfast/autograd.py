"""The block statistics as a differentiable PyTorch operator: visible to torch.compile, checked by opcheck.

What a backend computes and the symbols are in clipfast/backends/__init__.py. The operator's backward pass recomputes
the logits; it saves x, y and the two logsumexps, O((n + m) d).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipfast import dispatch
from clipfast.problem import positive_rows, statistics_dtype


@torch.library.custom_op("clipfast::block_statistics", mutates_args=())
def block_statistics(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    diag_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # row_lse [n], col_lse [m], positive [n]
    # Autocast would round the logits to half precision.
    with torch.autocast(x.device.type, enabled=False):
        row_lse, col_lse, positive = dispatch.get(backend).forward(x, y, scale, bias, diag_offset)
    return row_lse, col_lse, positive


@torch.library.custom_op("clipfast::block_statistics_backward", mutates_args=())
def block_statistics_backward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    row_lse: Tensor,  # [n]
    col_lse: Tensor,  # [m]
    row_weight: Tensor,  # [n]
    col_weight: Tensor,  # [m]
    positive_weight: Tensor,  # [n]
    diag_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # dx [n, d], dy [m, d], dscale []
    with torch.autocast(x.device.type, enabled=False):
        dx, dy, dscale = dispatch.get(backend).backward(
            x, y, scale, bias, row_lse, col_lse, row_weight, col_weight, positive_weight, diag_offset
        )
    return dx, dy, dscale


@block_statistics.register_fake
def _(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, diag_offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    row_lse, col_lse, positive = (
        x.new_empty(size, dtype=statistics_dtype(x.device)) for size in (x.shape[0], y.shape[0], x.shape[0])
    )
    return row_lse, col_lse, positive


@block_statistics_backward.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(())


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, scale, bias, ctx.diag_offset, ctx.backend = inputs
    row_lse, col_lse, _ = output
    ctx.save_for_backward(x, y, scale, bias, row_lse, col_lse)


def _backward(
    ctx: Any,
    row_weight: Tensor,  # [n], dloss/drow_lse
    col_weight: Tensor,  # [m], dloss/dcol_lse
    positive_weight: Tensor,  # [n], dloss/dpositive
) -> tuple[Tensor | None, ...]:
    x, y, scale, bias, row_lse, col_lse = ctx.saved_tensors
    dx, dy, dscale = block_statistics_backward(
        x,
        y,
        scale,
        bias,
        row_lse,
        col_lse,
        row_weight,
        col_weight,
        positive_weight,
        ctx.diag_offset,
        ctx.backend,
    )
    # db = sum_ij G_ij, and each exp(L_ij - lse) sums to 1 over its row or column.
    first, last = positive_rows(x.shape[0], y.shape[0], ctx.diag_offset)
    dbias = row_weight.sum() + col_weight.sum() + positive_weight[first:last].sum()
    return dx, dy, dscale, dbias.to(bias.dtype), None, None


def _refuse_double_backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "clipfast does not support double backward: its backward pass has no derivative. Use "
        "clipfast.reference.contrastive_loss where a gradient of the gradient is needed."
    )


block_statistics.register_autograd(_backward, setup_context=_save_for_backward)
block_statistics_backward.register_autograd(_refuse_double_backward)
