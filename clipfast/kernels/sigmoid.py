"""The sigmoid loss: each row's sum of softplus, and H = f_i g_j G_ij for the products of the gradients, in one pass.

With t the logit, its sign changed at positives, and e = exp(-|t|), which is at most 1:

    softplus(t) = max(t, 0) + log1p(e),   sigmoid(t) = (1 or e) / (1 + e)
    log1p(e) = 2 atanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...),   s = e / (2 + e) <= 1/3

so both keep their relative precision however small they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.tiles import (
    LOG2_E,
    NO_IDS,
    POSITIVES,
    STRIP,
    are_distinct,
    diagonal_distance,
    inner_product,
    is_plain,
    is_positive,
    load_part,
    product,
    store_tile,
)
from clipfast.kernels.vectors import AMPLIFIER


@triton.jit
def softplus_and_sigmoid(t):
    e = tl.exp2(-tl.abs(t) * LOG2_E)
    share = 1.0 / ((1.0 + e) * (2.0 + e))
    s = e * (1.0 + e) * share
    square = s * s
    # The first term that is left out is below a rounding: (1/9)^7 / 15.
    series = 1 / 11 + square * (1 / 13)
    series = 1 / 7 + square * (1 / 9 + square * series)
    series = 1.0 + square * (1 / 3 + square * (1 / 5 + square * series))
    sigmoid = tl.where(t < 0, e, 1.0) * (2.0 + e) * share
    return tl.where(t < 0, 0.0, t) + 2.0 * s * series, sigmoid


@triton.jit
def with_tile_factors(z, factors, row, col, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    if factors is not None:
        z *= load_part(factors[0], row, n, BLOCK_M)[:, None]
        z *= load_part(factors[1], col, m, BLOCK_N)[None, :]
    return z


@triton.jit
def store_gradient(h_ptr, g, factors, row, col, n, m, stride_hm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store H of a tile; float16, which has no range to spare, gets it times AMPLIFIER."""
    h = with_tile_factors(g, factors, row, col, n, m, BLOCK_M, BLOCK_N)
    if h_ptr.dtype.element_ty == tl.float16:
        h *= AMPLIFIER
    store_tile(h_ptr, h, row, col, n, m, stride_hm, BLOCK_M, BLOCK_N)


@triton.jit
def plain_tile(
    z, logits, factors, h_ptr, loss_ptr, row, col, n, m, stride_hm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GRADIENTS: tl.constexpr,
):  # fmt: skip
    """A tile of negatives. Returns its sums of G and of G z."""
    loss, g = softplus_and_sigmoid(logits)
    tl.store(loss_ptr + row + tl.arange(0, BLOCK_M), tl.sum(loss, 1))
    dbias, dscale = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    if GRADIENTS:
        dbias, dscale = tl.sum(g), tl.sum(g * z)
        store_gradient(h_ptr, g, factors, row, col, n, m, stride_hm, BLOCK_M, BLOCK_N)
    return dbias, dscale


@triton.jit
def general_tile(
    z,  # [BLOCK_M, BLOCK_N], with factors
    scratch,  # [BLOCK_M, BLOCK_N]
    factors,
    ids,
    h_ptr,
    loss_ptr,
    row,
    col,
    distance,
    n,
    m,
    stride_hm,
    scale,
    bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SAME: tl.constexpr,
    GRADIENTS: tl.constexpr,
):
    """A tile that has positives, an edge or equal ids. Few are such: they go through memory, as in gradient.py."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tl.store(scratch + offs_m[:, None] * BLOCK_N + offs_n[None, :], z)
    tl.debug_barrier()
    dbias, dscale = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for begin in tl.range(0, BLOCK_M, STRIP, num_stages=1):
        offs = begin + tl.arange(0, STRIP)
        strip = tl.load(scratch + offs[:, None] * BLOCK_N + offs_n[None, :])
        positive = is_positive(distance + begin, STRIP, BLOCK_N)
        counts = (row + offs < n)[:, None] & (col + offs_n < m)[None, :]
        if SAME != NO_IDS:
            row_ids, col_ids = load_part(ids[0], row + begin, n, STRIP), load_part(ids[1], col, m, BLOCK_N)
            equal = row_ids[:, None] == col_ids[None, :]
            if SAME == POSITIVES:
                positive = positive | equal
            else:
                counts = counts & (positive | (equal == 0))
        logits = strip * scale + bias
        loss, g = softplus_and_sigmoid(tl.where(positive, -logits, logits))
        tl.store(loss_ptr + row + offs, tl.sum(tl.where(counts, loss, 0.0), 1), mask=row + offs < n)
        if GRADIENTS:
            g = tl.where(counts, tl.where(positive, -g, g), 0.0)
            dbias += tl.sum(g)
            dscale += inner_product(g, strip, row + begin, col, n, m, STRIP, BLOCK_N)
            store_gradient(h_ptr, g, factors, row + begin, col, n, m, stride_hm, STRIP, BLOCK_N)
    tl.debug_barrier()
    return dbias, dscale


@triton.jit(do_not_specialize=["n", "m", "diag_offset"])
def sigmoid_kernel(
    x,  # [n, d]: a pointer, or a tensor descriptor with USE_TMA
    y,  # [m, d]
    scale_ptr,  # []
    bias_ptr,  # []
    factors,  # ([n], [m]), or None
    ids,  # ([n], [m]), int32, with SAME
    h_ptr,  # [n, m], with GRADIENTS
    loss_ptr,  # [blocks of columns, n]
    sums_ptr,  # [programs, 2], float64: each program adds its parts of dbias and dscale, with GRADIENTS
    scratch,  # [programs, BLOCK_M * BLOCK_N]
    n,
    m,
    d,
    diag_offset,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_hm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    SAME: tl.constexpr,
    GRADIENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk of x and y, as in gradient_kernel."""
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    scratch += tl.program_id(0).to(tl.int64) * BLOCK_M * BLOCK_N
    blocks_m = tl.cdiv(n, BLOCK_M)
    dbias, dscale = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for tile in range(tl.program_id(0), blocks_m * tl.cdiv(m, BLOCK_N), tl.num_programs(0)):
        row, col = tile % blocks_m * BLOCK_M, tile // blocks_m * BLOCK_N
        if SAME != NO_IDS:
            distinct = are_distinct(load_part(ids[0], row, n, BLOCK_M), load_part(ids[1], col, m, BLOCK_N))
        z = product(
            x, y, row, col, n, m, d, stride_xm, stride_xd, stride_yn, stride_yd,
            BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
        )  # fmt: skip
        z = with_tile_factors(z, factors, row, col, n, m, BLOCK_M, BLOCK_N)
        distance = diagonal_distance(row, col, diag_offset, BLOCK_M, BLOCK_N)
        plain = is_plain(row, col, distance, n, m, BLOCK_M, BLOCK_N)
        if SAME != NO_IDS:
            plain = plain & distinct
        tile_loss = loss_ptr + (tile // blocks_m).to(tl.int64) * n
        if plain:
            tile_dbias, tile_dscale = plain_tile(
                z, z * scale + bias, factors, h_ptr, tile_loss, row, col, n, m, stride_hm, BLOCK_M, BLOCK_N, GRADIENTS
            )
        else:
            tile_dbias, tile_dscale = general_tile(
                z, scratch, factors, ids, h_ptr, tile_loss, row, col, distance, n, m, stride_hm, scale, bias,
                BLOCK_M, BLOCK_N, SAME, GRADIENTS,
            )  # fmt: skip
        dbias += tile_dbias.to(tl.float64)
        dscale += tile_dscale.to(tl.float64)
    if GRADIENTS:
        sums_ptr += 2 * tl.program_id(0)
        tl.store(sums_ptr, tl.load(sums_ptr) + dbias)
        tl.store(sums_ptr + 1, tl.load(sums_ptr + 1) + dscale)
