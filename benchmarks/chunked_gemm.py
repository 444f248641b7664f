"""A peer that nobody ships and must be beaten: row chunks by the vendor's GEMM, with one Triton pass over each.

4 P: the logits of a chunk by torch.mm in the forward pass and again in the backward pass, and two products with G. The
one pass over a chunk of logits in the forward reads each logit once for both directions; in the backward it turns
logits into G. Chunks are sized to stay in the L2 cache. Statistics are float32; G is scaled to stay near 1, so that
float16 does not underflow.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_BYTES = 32 << 20
BLOCK_M, BLOCK_N = 32, 128


@triton.jit
def _statistics(
    logits_ptr,  # [rows, n]
    row_max_ptr,  # [blocks of columns, rows]
    row_sum_ptr,
    col_max_ptr,  # [blocks of rows, n]
    col_sum_ptr,
    diagonal_ptr,  # [rows]
    scale_ptr,
    first_row,
    rows,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Maximum and sum of exponentials of one tile, by row and by column, and the positives it holds."""
    block_m, block_n = tl.program_id(0), tl.program_id(1)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < rows)[:, None] & (offs_n < n)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
    scale = tl.load(scale_ptr)
    logits = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    logits = tl.where(mask, logits, float("-inf"))
    is_positive = (first_row + offs_m)[:, None] == offs_n[None, :]
    positive = tl.sum(tl.where(is_positive & mask, logits, 0.0), axis=1)
    tl.store(diagonal_ptr + offs_m, positive, mask=(offs_m < rows) & (tl.sum(is_positive.to(tl.int32), axis=1) > 0))
    row_max, col_max = tl.max(logits, axis=1), tl.max(logits, axis=0)
    row_sum = tl.sum(tl.exp(logits - tl.where(offs_m < rows, row_max, 0.0)[:, None]), axis=1)
    col_sum = tl.sum(tl.exp(logits - tl.where(offs_n < n, col_max, 0.0)[None, :]), axis=0)
    tl.store(row_max_ptr + block_n * rows + offs_m, row_max, mask=offs_m < rows)
    tl.store(row_sum_ptr + block_n * rows + offs_m, row_sum, mask=offs_m < rows)
    tl.store(col_max_ptr + block_m * n + offs_n, col_max, mask=offs_n < n)
    tl.store(col_sum_ptr + block_m * n + offs_n, col_sum, mask=offs_n < n)


@triton.jit
def _gradient(
    logits_ptr,  # [rows, n]
    gradient_ptr,  # [rows, n], may be the logits
    row_lse_ptr,  # [rows]
    col_lse_ptr,  # [n]
    scale_ptr,
    first_row,
    rows,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """P + Q - 2 I of one tile, formed in float32."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < rows)[:, None] & (offs_n < n)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
    logits = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    row_lse = tl.load(row_lse_ptr + offs_m, mask=offs_m < rows, other=0.0)
    col_lse = tl.load(col_lse_ptr + offs_n, mask=offs_n < n, other=0.0)
    gradient = tl.exp(logits - row_lse[:, None]) + tl.exp(logits - col_lse[None, :])
    gradient -= tl.where((first_row + offs_m)[:, None] == offs_n[None, :], 2.0, 0.0)
    tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _merge(maximum: Tensor, total: Tensor) -> Tensor:  # [blocks, k], [blocks, k] -> [k]
    return (maximum + total.log()).logsumexp(dim=0)


def _grid(rows: int, n: int) -> tuple[int, int]:
    return triton.cdiv(rows, BLOCK_M), triton.cdiv(n, BLOCK_N)


def _chunks(n: int) -> list[slice]:
    step = max(BLOCK_M, CHUNK_BYTES // (4 * n) // BLOCK_M * BLOCK_M)
    return [slice(begin, min(begin + step, n)) for begin in range(0, n, step)]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        n = len(x)
        row_lse, diagonal = (torch.empty(n, device=x.device) for _ in range(2))
        col_lse = torch.full((n,), -torch.inf, device=x.device)
        for chunk in _chunks(n):
            logits = _product(x[chunk], y.T)
            rows = len(logits)
            blocks_m, blocks_n = _grid(rows, n)
            row_max, row_sum = torch.empty(2, blocks_n, rows, device=x.device)
            col_max, col_sum = torch.empty(2, blocks_m, n, device=x.device)
            _statistics[blocks_m, blocks_n](
                logits,
                row_max,
                row_sum,
                col_max,
                col_sum,
                diagonal[chunk],
                s,
                chunk.start,
                rows,
                n,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
            )
            row_lse[chunk] = _merge(row_max, row_sum)
            col_lse = torch.logaddexp(col_lse, _merge(col_max, col_sum))
        ctx.save_for_backward(x, y, s, row_lse, col_lse)
        return ((row_lse + col_lse) / 2 - diagonal).mean()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, s, row_lse, col_lse = ctx.saved_tensors
        n = len(x)
        gradient_y = torch.empty(x.shape, device=x.device)
        dy = torch.zeros(y.shape, device=x.device)
        for chunk in _chunks(n):
            logits = _product(x[chunk], y.T)
            gradient = logits if x.dtype == torch.float32 else logits.new_empty(logits.shape, dtype=x.dtype)
            _gradient[_grid(len(logits), n)](
                logits,
                gradient,
                row_lse[chunk],
                col_lse,
                s,
                chunk.start,
                len(logits),
                n,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
            )
            gradient_y[chunk] = _product(gradient, y)
            dy += _product(gradient.T, x[chunk])
        weight = upstream / (2 * n)
        ds = (gradient_y * x).sum() * weight
        return (gradient_y * (weight * s)).to(x.dtype), (dy * (weight * s)).to(y.dtype), ds


def loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The symmetric loss of normalized x [n, d], y [n, d] at the scale s."""
    result: Tensor = _ChunkedLoss.apply(x, y, s)  # type: ignore[no-untyped-call]
    return result
