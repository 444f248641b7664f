"""Backward: G per tile, either stored for the vendor's matrix product or multiplied on while it is in registers.

Weights and logsumexps come as four numbers per row and per column, with ids as six, in float32 (see vectors.py):

    centre      c_i, a product: exp(L_ij - lse_i) is exp2((z_ij - c_i) scale2) up to a factor that `weight` holds;
                times the scale's sign, as z is
    weight      of exp(L_ij - lse_i) in G_ij
    positive    G_ip, at the row's or the column's positive
    factor      f_i, by which the row of x or y counts; 1 without factors
    target      what the row or column adds to G_ij at further positives
    id          the bits of an int32

H_ij = f_i g_j G_ij is what is stored, so that both products need one matrix: dL/dx_i = scale (H y)_i.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.tiles import (
    IGNORED,
    MAX_SPREAD,
    NO_IDS,
    STRIP,
    are_distinct,
    diagonal_distance,
    finite,
    inner_product,
    is_plain,
    is_positive,
    multiply_add,
    product,
    signed_scale,
    store_tile,
)

CENTRE = tl.constexpr(0)
WEIGHT = tl.constexpr(1)
POSITIVE = tl.constexpr(2)
FACTOR = tl.constexpr(3)
TARGET = tl.constexpr(4)
ID = tl.constexpr(5)
VECTORS = tl.constexpr(4)
VECTORS_WITH_IDS = tl.constexpr(6)


@triton.jit
def side(vectors, which: tl.constexpr, offs, length, SAME: tl.constexpr):  # [BLOCK]
    """One of the vectors at `offs`; 0 beyond its end."""
    WIDTH: tl.constexpr = VECTORS if SAME == NO_IDS else VECTORS_WITH_IDS
    return tl.load(vectors + offs.to(tl.int64) * WIDTH + which, mask=offs < length, other=0.0)


@triton.jit
def side_ids(vectors, offs, length, SAME: tl.constexpr):  # [BLOCK], int32
    return side(vectors, ID, offs, length, SAME).to(tl.int32, bitcast=True)


@triton.jit
def has_distinct_ids(
    rows, cols, row, col, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SAME: tl.constexpr
):  # fmt: skip
    row_ids = side_ids(rows, row + tl.arange(0, BLOCK_M), n, SAME)
    return are_distinct(row_ids, side_ids(cols, col + tl.arange(0, BLOCK_N), m, SAME))


@triton.jit
def with_factors(z, rows, cols, row, col, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SAME: tl.constexpr):
    row_factor = side(rows, FACTOR, row + tl.arange(0, BLOCK_M), n, SAME)
    col_factor = side(cols, FACTOR, col + tl.arange(0, BLOCK_N), m, SAME)
    return z * row_factor[:, None] * col_factor[None, :]


@triton.jit
def narrow_gradient(
    z, shift, rows, cols, row, col, n, m, abs_scale2, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SAME: tl.constexpr
):  # [BLOCK_M, BLOCK_N]
    """G of a tile of negatives of a narrow range: one exponential for both directions."""
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    from_row = side(rows, WEIGHT, offs_m, n, SAME) * tl.exp2((shift - side(rows, CENTRE, offs_m, n, SAME)) * abs_scale2)
    from_col = side(cols, WEIGHT, offs_n, m, SAME) * tl.exp2((shift - side(cols, CENTRE, offs_n, m, SAME)) * abs_scale2)
    return tl.exp2((z - shift) * abs_scale2) * (from_row[:, None] + from_col[None, :])


@triton.jit
def general_gradient(
    z, rows, cols, row, col, distance, n, m, abs_scale2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """G of any tile, [BLOCK_M, BLOCK_N]: an exponential for each direction; positives have their weights, and what is
    ignored or lies outside is 0."""
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    g = side(rows, WEIGHT, offs_m, n, SAME)[:, None] * tl.exp2(
        (z - side(rows, CENTRE, offs_m, n, SAME)[:, None]) * abs_scale2
    )
    g += side(cols, WEIGHT, offs_n, m, SAME)[None, :] * tl.exp2(
        (z - side(cols, CENTRE, offs_n, m, SAME)[None, :]) * abs_scale2
    )
    if SAME != NO_IDS:
        equal = side_ids(rows, offs_m, n, SAME)[:, None] == side_ids(cols, offs_n, m, SAME)[None, :]
        if SAME == IGNORED:
            g = tl.where(equal, 0.0, g)
        else:
            target = side(rows, TARGET, offs_m, n, SAME)[:, None] + side(cols, TARGET, offs_n, m, SAME)[None, :]
            g = tl.where(equal, g + target, g)
    g = tl.where(is_positive(distance, BLOCK_M, BLOCK_N), side(rows, POSITIVE, offs_m, n, SAME)[:, None], g)
    return tl.where((offs_m < n)[:, None] & (offs_n < m)[None, :], g, 0.0)


@triton.jit
def store_general_tile(
    z,  # [BLOCK_M, BLOCK_N], with factors and the scale's sign
    scratch,  # [BLOCK_M, BLOCK_N]
    rows,  # [n, 4 or 6]
    cols,  # [m, 4 or 6]
    h_ptr,
    row,
    col,
    distance,
    n,
    m,
    stride_hm,
    abs_scale2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    SAME: tl.constexpr,
):
    """Store H of a tile that has positives, an edge, equal ids or a wide range, and return its part of dscale.

    Few tiles are such: they go through memory, so that their registers do not add to those of the common path.
    """
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tl.store(scratch + offs_m[:, None] * BLOCK_N + offs_n[None, :], z)
    tl.debug_barrier()
    dscale = tl.zeros((), tl.float32)
    for begin in range(0, BLOCK_M, STRIP):
        offs = begin + tl.arange(0, STRIP)
        strip = tl.load(scratch + offs[:, None] * BLOCK_N + offs_n[None, :])
        h = general_gradient(
            strip, rows, cols, row + begin, col, distance + begin, n, m, abs_scale2, STRIP, BLOCK_N, SAME
        )
        dscale += inner_product(h, strip, row + begin, col, n, m, STRIP, BLOCK_N)
        if HAS_FACTORS:
            h = with_factors(h, rows, cols, row + begin, col, n, m, STRIP, BLOCK_N, SAME)
        store_tile(h_ptr, h, row + begin, col, n, m, stride_hm, STRIP, BLOCK_N)
    tl.debug_barrier()
    return dscale


@triton.jit(do_not_specialize=["n", "m", "diag_offset"])
def gradient_kernel(
    x,  # [n, d]: a pointer, or a tensor descriptor with USE_TMA
    y,  # [m, d]
    scale_ptr,  # []
    rows,  # [n, 4 or 6]
    cols,  # [m, 4 or 6]
    h_ptr,  # [n, m]
    dscale_ptr,  # [programs], float64: each program adds its part
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
    HAS_FACTORS: tl.constexpr,
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """H of a chunk of x and y, so small that H and its operands stay in L2 whatever the order of its tiles is."""
    abs_scale2, negated = signed_scale(tl.load(scale_ptr))
    scratch += tl.program_id(0).to(tl.int64) * BLOCK_M * BLOCK_N
    blocks_m = tl.cdiv(n, BLOCK_M)
    dscale = tl.zeros((), tl.float64)
    for tile in range(tl.program_id(0), blocks_m * tl.cdiv(m, BLOCK_N), tl.num_programs(0)):
        row, col = tile % blocks_m * BLOCK_M, tile // blocks_m * BLOCK_N
        if SAME != NO_IDS:
            distinct = has_distinct_ids(rows, cols, row, col, n, m, BLOCK_M, BLOCK_N, SAME)
        z = product(
            x, y, row, col, n, m, d, stride_xm, stride_xd, stride_yn, stride_yd,
            BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
        )  # fmt: skip
        distance = diagonal_distance(row, col, diag_offset, BLOCK_M, BLOCK_N)
        if HAS_FACTORS:
            z = with_factors(z, rows, cols, row, col, n, m, BLOCK_M, BLOCK_N, SAME)
        if negated:
            z = -z
        low, high = tl.min(z), tl.max(z)
        plain = is_plain(row, col, distance, n, m, BLOCK_M, BLOCK_N)
        if SAME != NO_IDS:
            plain = plain & distinct
        if plain & ((high - low) * abs_scale2 < MAX_SPREAD):
            h = narrow_gradient(z, finite(high), rows, cols, row, col, n, m, abs_scale2, BLOCK_M, BLOCK_N, SAME)
            dscale += tl.sum(h * z).to(tl.float64)
            if HAS_FACTORS:
                h = with_factors(h, rows, cols, row, col, n, m, BLOCK_M, BLOCK_N, SAME)
            store_tile(h_ptr, h, row, col, n, m, stride_hm, BLOCK_M, BLOCK_N)
        else:
            part = store_general_tile(
                z, scratch, rows, cols, h_ptr, row, col, distance, n, m, stride_hm, abs_scale2,
                BLOCK_M, BLOCK_N, HAS_FACTORS, SAME,
            )  # fmt: skip
            dscale += part.to(tl.float64)
    if negated:
        dscale = -dscale
    dscale_ptr += tl.program_id(0)
    tl.store(dscale_ptr, tl.load(dscale_ptr) + dscale)


@triton.jit(do_not_specialize=["n", "m", "diag_offset"])
def accumulate_kernel(
    x,  # [n, d]
    y,  # [m, d]
    scale_ptr,  # []
    rows,  # [n, 4 or 6]
    cols,  # [m, 4 or 6]
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
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """H y for a block of rows and BLOCK_OUT of its d columns, accumulated in registers over all of y."""
    row = tl.program_id(0) * BLOCK_M
    offs_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    abs_scale2, negated = signed_scale(tl.load(scale_ptr))
    total = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    dscale = tl.zeros((), tl.float64)
    for col in range(0, m, BLOCK_N):
        if SAME != NO_IDS:
            distinct = has_distinct_ids(rows, cols, row, col, n, m, BLOCK_M, BLOCK_N, SAME)
        z = product(
            x, y, row, col, n, m, d, stride_xm, stride_xd, stride_yn, stride_yd,
            BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, False, PRECISION,
        )  # fmt: skip
        distance = diagonal_distance(row, col, diag_offset, BLOCK_M, BLOCK_N)
        if HAS_FACTORS:
            z = with_factors(z, rows, cols, row, col, n, m, BLOCK_M, BLOCK_N, SAME)
        if negated:
            z = -z
        low, high = tl.min(z), tl.max(z)
        plain = is_plain(row, col, distance, n, m, BLOCK_M, BLOCK_N)
        if SAME != NO_IDS:
            plain = plain & distinct
        if plain & ((high - low) * abs_scale2 < MAX_SPREAD):
            h = narrow_gradient(z, finite(high), rows, cols, row, col, n, m, abs_scale2, BLOCK_M, BLOCK_N, SAME)
        else:
            h = general_gradient(z, rows, cols, row, col, distance, n, m, abs_scale2, BLOCK_M, BLOCK_N, SAME)
        dscale += inner_product(h, z, row, col, n, m, BLOCK_M, BLOCK_N).to(tl.float64)
        if HAS_FACTORS:
            h = with_factors(h, rows, cols, row, col, n, m, BLOCK_M, BLOCK_N, SAME)
        offs_n = col + tl.arange(0, BLOCK_N)
        y_ptrs = y + offs_n.to(tl.int64)[:, None] * stride_yn + offs_out.to(tl.int64)[None, :] * stride_yd
        y_tile = tl.load(y_ptrs, mask=(offs_n < m)[:, None] & (offs_out < d)[None, :], other=0.0)
        total = multiply_add(h.to(y_tile.dtype), y_tile, total, PRECISION)
    offs_m = row + tl.arange(0, BLOCK_M)
    total_ptrs = total_ptr + offs_m.to(tl.int64)[:, None] * d + offs_out[None, :]
    tl.store(total_ptrs, total, mask=(offs_m < n)[:, None] & (offs_out < d)[None, :])
    if HAS_DSCALE:
        if negated:
            dscale = -dscale
        tl.store(dscale_ptr + tl.program_id(0), dscale, mask=tl.program_id(1) == 0)
