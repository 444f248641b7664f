"""Backward: G per tile, either stored for the vendor's matrix product or multiplied on while it is in registers.

Weights and logsumexps come as four vectors per side, packed as [4, n] and [4, m] in float32 (see vectors.py):

    centre      c_i, a product: exp(L_ij - lse_i) is exp2((z_ij - c_i) scale2) up to a factor that `weight` holds;
                times the scale's sign, as z is
    weight      of exp(L_ij - lse_i) in G_ij
    positive    G_ip, at the row's or the column's positive
    factor      f_i, by which the row of x or y counts; 1 without factors

H_ij = f_i g_j G_ij is what is stored, so that both products need one matrix: dL/dx_i = scale (H y)_i.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.tiles import (
    INFINITY,
    MAX_SPREAD,
    diagonal_distance,
    finite,
    is_negative,
    is_plain,
    is_positive,
    least_and_largest,
    multiply_add,
    product,
    signed_scale,
)

CENTRE = tl.constexpr(0)
WEIGHT = tl.constexpr(1)
POSITIVE = tl.constexpr(2)
FACTOR = tl.constexpr(3)


@triton.jit
def side(vectors, which: tl.constexpr, offs, length):  # [BLOCK]
    """One of the four vectors at `offs`; 0 beyond its end."""
    return tl.load(vectors + which * length.to(tl.int64) + offs, mask=offs < length, other=0.0)


@triton.jit
def tile_gradient(
    z,  # [BLOCK_M, BLOCK_N], the raw product
    rows,  # [4, n]
    cols,  # [4, m]
    row,
    col,
    n,
    m,
    diag_offset,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
):
    """H on one tile, [BLOCK_M, BLOCK_N], arbitrary beyond n and m; and sum_ij G_ij z_ij, the tile's part of dscale.

    The sum is taken here, in float32, and not as <(H y)_i, x_i>, because H may be rounded to half precision.
    """
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_n = col + tl.arange(0, BLOCK_N)
    row_centre, row_weight = side(rows, CENTRE, offs_m, n), side(rows, WEIGHT, offs_m, n)
    col_centre, col_weight = side(cols, CENTRE, offs_n, m), side(cols, WEIGHT, offs_n, m)
    if HAS_FACTORS:
        row_factor, col_factor = side(rows, FACTOR, offs_m, n), side(cols, FACTOR, offs_n, m)
        z = z * row_factor[:, None] * col_factor[None, :]
    abs_scale2, negated = signed_scale(scale)
    distance = diagonal_distance(row, col, diag_offset, BLOCK_M, BLOCK_N)
    plain = is_plain(row, col, distance, n, m, BLOCK_M, BLOCK_N)
    positive = side(rows, POSITIVE, offs_m, n)
    dscale = tl.zeros((), tl.float32)
    if negated:
        z = -z
    if not plain:
        own = is_positive(distance, BLOCK_M, BLOCK_N)
        dscale += tl.sum(positive * tl.sum(tl.where(own, z, 0.0), 1))
        z = tl.where(is_negative(row, col, distance, n, m, BLOCK_M, BLOCK_N), z, -INFINITY)
    low, high = least_and_largest(z, plain)
    if (high - low) * abs_scale2 < MAX_SPREAD:
        shift = finite(high)
        from_row = row_weight * tl.exp2((shift - row_centre) * abs_scale2)
        from_col = col_weight * tl.exp2((shift - col_centre) * abs_scale2)
        g = tl.exp2((z - shift) * abs_scale2) * (from_row[:, None] + from_col[None, :])
    else:
        g = row_weight[:, None] * tl.exp2((z - row_centre[:, None]) * abs_scale2)
        g += col_weight[None, :] * tl.exp2((z - col_centre[None, :]) * abs_scale2)
    if plain:
        dscale += tl.sum(g * z)
    else:
        negative = is_negative(row, col, distance, n, m, BLOCK_M, BLOCK_N)
        dscale += tl.sum(tl.where(negative, g * z, 0.0))
        g = tl.where(is_positive(distance, BLOCK_M, BLOCK_N), positive[:, None], g)
    if negated:
        dscale = -dscale
    if HAS_FACTORS:
        g = g * row_factor[:, None] * col_factor[None, :]
    return g, dscale


@triton.jit(do_not_specialize=["n", "m", "diag_offset", "row_begin", "col_begin"])
def gradient_kernel(
    x,  # [n, d]: a pointer, or a tensor descriptor with USE_TMA
    y,  # [m, d]
    scale_ptr,  # []
    rows,  # [4, n]
    cols,  # [4, m]
    h_ptr,  # the block of H from (row_begin, col_begin) on
    dscale_ptr,  # [programs of the first block], float64
    n,
    m,
    d,
    diag_offset,
    row_begin,
    col_begin,
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
    HAS_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of H, one tile a program. The block, and the rows of x and y that it needs, stay in L2 by its size.

    Blocks come one after the other, the first one at (0, 0) and none larger: each program adds its part of dscale to
    that of the program of the same number before it.
    """
    local_row = tl.program_id(0) * BLOCK_M
    local_col = tl.program_id(1) * BLOCK_N
    row, col = row_begin + local_row, col_begin + local_col
    z = product(
        x, y, row, col, n, m, d, stride_xm, stride_xd, stride_yn, stride_yd,
        BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    h, dscale = tile_gradient(z, rows, cols, row, col, n, m, diag_offset, scale, BLOCK_M, BLOCK_N, HAS_FACTORS)
    dscale_ptr += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    before = tl.load(dscale_ptr, mask=row_begin + col_begin > 0, other=0.0)
    tl.store(dscale_ptr, before + dscale.to(tl.float64))
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    h_ptrs = h_ptr + (local_row + offs_m).to(tl.int64)[:, None] * stride_hm + (local_col + offs_n)[None, :]
    inside = (row + offs_m < n)[:, None] & (col + offs_n < m)[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "m", "diag_offset"])
def accumulate_kernel(
    x,  # [n, d]
    y,  # [m, d]
    scale_ptr,  # []
    rows,  # [4, n]
    cols,  # [4, m]
    total_ptr,  # H y [n, d], float32
    dscale_ptr,  # [blocks of rows], float64, with HAS_DSCALE
    n,
    m,
    d,
    diag_offset,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_DSCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """H y for a block of rows and BLOCK_OUT of its d columns, accumulated in registers over all of y."""
    row = tl.program_id(0) * BLOCK_M
    offs_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    scale = tl.load(scale_ptr)
    total = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    dscale = tl.zeros((), tl.float64)
    for col in range(0, m, BLOCK_N):
        z = product(
            x, y, row, col, n, m, d, stride_xm, stride_xd, stride_yn, stride_yd,
            BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, False, PRECISION,
        )  # fmt: skip
        h, part = tile_gradient(z, rows, cols, row, col, n, m, diag_offset, scale, BLOCK_M, BLOCK_N, HAS_FACTORS)
        dscale += part.to(tl.float64)
        offs_n = col + tl.arange(0, BLOCK_N)
        h = tl.where((offs_n < m)[None, :], h, 0.0)
        y_ptrs = y + offs_n.to(tl.int64)[:, None] * stride_yn + offs_out.to(tl.int64)[None, :] * stride_yd
        y_tile = tl.load(y_ptrs, mask=(offs_n < m)[:, None] & (offs_out < d)[None, :], other=0.0)
        total = multiply_add(h.to(y_tile.dtype), y_tile, total, PRECISION)
    offs_m = row + tl.arange(0, BLOCK_M)
    total_ptrs = total_ptr + offs_m.to(tl.int64)[:, None] * d + offs_out[None, :]
    tl.store(total_ptrs, total, mask=(offs_m < n)[:, None] & (offs_out < d)[None, :])
    if HAS_DSCALE:
        tl.store(dscale_ptr + tl.program_id(0), dscale, mask=tl.program_id(1) == 0)
