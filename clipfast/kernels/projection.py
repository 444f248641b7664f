"""A projection and the norms of its rows, in one launch: rows = features weight + bias, factor = 1 / |row|.

A program takes a block of rows over all columns, so that the norms are its own sums and need no second pass: the tile
order that allows it. The features' block comes from the L2 cache again for each block of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast import tuning
from clipfast.kernels.operands import FUSED, blocks, on
from clipfast.norms import MIN_NORM, norm_factors
from clipfast.tuning import Config


@triton.jit
def projection_kernel(
    features,  # [n, width]
    weight,  # [width, d]
    bias,  # [d] or None
    rows,  # [n, d], contiguous
    factors,  # [n]
    n,
    width,
    d,
    stride_fn,
    stride_fk,
    stride_wk,
    stride_wd,
    min_norm,
    HAS_BIAS: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,  # BLOCK_D divides the width
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of the width
    PRECISION: tl.constexpr,  # what tl.dot knows, or "widened" for the interpreter, whose dot takes no bfloat16
):
    # Offsets are 64-bit: n times a stride may exceed 2^31. What lies beyond n and d reads the last row and column.
    first = tl.program_id(0) * BLOCK_M
    offs_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    features_rows = features + tl.minimum(offs_m, n - 1) * stride_fn
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for col in range(0, d, BLOCK_N):
        offs_n = (col + tl.arange(0, BLOCK_N)).to(tl.int64)
        weight_cols = weight + tl.minimum(offs_n, d - 1) * stride_wd
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, width, BLOCK_D):
            offs_k = k + tl.arange(0, BLOCK_D).to(tl.int64)
            f_ptrs = features_rows[:, None] + offs_k[None, :] * stride_fk
            w_ptrs = weight_cols[None, :] + offs_k[:, None] * stride_wk
            if EVEN_WIDTH:
                f_tile = tl.load(f_ptrs)
                w_tile = tl.load(w_ptrs)
            else:
                f_tile = tl.load(f_ptrs, mask=offs_k[None, :] < width, other=0.0)
                w_tile = tl.load(w_ptrs, mask=offs_k[:, None] < width, other=0.0)
            if PRECISION == "widened":
                acc = tl.dot(f_tile.to(tl.float32), w_tile.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(f_tile, w_tile, acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias + offs_n, mask=offs_n < d, other=0.0).to(tl.float32)[None, :]
        # The norm is that of the row as it is stored.
        row = acc.to(rows.dtype.element_ty)
        inside = (offs_m < n)[:, None] & (offs_n < d)[None, :]
        tl.store(rows + offs_m[:, None] * d + offs_n[None, :], row, mask=inside)
        row = tl.where(inside, row.to(tl.float32), 0.0)
        squares += tl.sum(row * row, 1)
    norm = tl.sqrt_rn(squares)
    norm = tl.where(norm < min_norm, min_norm, norm)  # a NaN stays
    tl.store(factors + offs_m, tl.div_rn(1.0, norm), mask=offs_m < n)


def project(
    features: Tensor,  # [n, width]
    weight: Tensor,  # [width, d], of the same dtype
    bias: Tensor | None,  # [d]
    *,
    config: Config | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows [n, d] in the features' dtype, and their factors [n] in float32."""
    device, dtype = tuning.describe(features.device), features.dtype
    if dtype == torch.float32:
        precision = precision or tuning.float32_product(device)
        if precision == "ieee" and not device.interpreted and config is None:
            # Without matrix instructions the vendor's product is the better one.
            rows = features @ weight if bias is None else torch.addmm(bias, features, weight)
            return rows, norm_factors(rows)
        if precision == "bf16":
            features, weight, precision = features.bfloat16(), weight.bfloat16(), "ieee"
    elif device.interpreted:
        precision = "widened"
    (n, width), d = features.shape, weight.shape[1]
    config = config or tuning.choose("projection", device, features.itemsize, width).config
    rows = features.new_empty((n, d), dtype=dtype)
    factors = features.new_empty(n, dtype=torch.float32)
    with on(features.device):
        projection_kernel[(blocks(n, config.block_m),)](
            *(features, weight, None if bias is None else bias.contiguous(), rows, factors, n, width, d),
            *(*features.stride(), *weight.stride(), MIN_NORM),
            HAS_BIAS=bias is not None,
            EVEN_WIDTH=width % config.block_d == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            PRECISION=precision or "ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **FUSED,
        )
    return rows, factors
