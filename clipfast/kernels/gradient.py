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
    NO_IDS,
    STRIP,
    are_distinct,
    diagonal_distance,
    halves,
    inner_product,
    is_plain,
    is_positive,
    load_part,
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
def load_products(kept, row, col, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of what the forward pass stored (statistics.py); what lies beyond n and m is arbitrary."""
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    inside = (offs_m < n)[:, None] & (offs_n < kept[1])[None, :]
    return tl.load(kept[0] + offs_m.to(tl.int64)[:, None] * kept[1] + offs_n[None, :], mask=inside, other=0.0)


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
def is_narrow(shares, row_block, col_block):
    """Whether one shift serves all negatives of a tile, and the factors that bring both sides' shares to it."""
    row_shift, col_shift = tl.load(shares[1] + 2 * row_block), tl.load(shares[3] + 2 * col_block)
    shift = tl.minimum(row_shift, col_shift)
    least = tl.maximum(tl.load(shares[1] + 2 * row_block + 1), tl.load(shares[3] + 2 * col_block + 1))
    return shift >= least, shift, tl.exp2(shift - row_shift), tl.exp2(shift - col_shift)


@triton.jit
def thread_sums(h, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROW_WARPS: tl.constexpr):  # [ROW_WARPS, 8, 4]
    """Sums over what one thread of NVIDIA's matrix instructions holds; as one sum without ROW_WARPS."""
    if ROW_WARPS == 0:
        sums = tl.reshape(tl.sum(tl.sum(h, 1, keep_dims=True), 0, keep_dims=True), (1, 1, 1))
    else:
        parts = tl.reshape(h, (BLOCK_M // (16 * ROW_WARPS), ROW_WARPS, 2, 8, BLOCK_N // 8, 4, 2))
        sums = tl.sum(tl.sum(tl.sum(tl.sum(parts, 4), 5), 2), 0)
    return sums


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
    z,  # [BLOCK_M, BLOCK_N], without factors and the scale's sign
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
    negated,
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
    for begin in tl.range(0, BLOCK_M, STRIP, num_stages=1):
        offs = begin + tl.arange(0, STRIP)
        strip = tl.load(scratch + offs[:, None] * BLOCK_N + offs_n[None, :])
        if HAS_FACTORS:
            strip = with_factors(strip, rows, cols, row + begin, col, n, m, STRIP, BLOCK_N, SAME)
        if negated:
            strip = -strip
        h = general_gradient(
            strip, rows, cols, row + begin, col, distance + begin, n, m, abs_scale2, STRIP, BLOCK_N, SAME
        )
        dscale += inner_product(h, strip, row + begin, col, n, m, STRIP, BLOCK_N)
        if HAS_FACTORS:
            h = with_factors(h, rows, cols, row + begin, col, n, m, STRIP, BLOCK_N, SAME)
        store_tile(h_ptr, h, row + begin, col, n, m, stride_hm, STRIP, BLOCK_N)
    tl.debug_barrier()
    if negated:
        dscale = -dscale
    return dscale


@triton.jit(do_not_specialize=["n", "m", "diag_offset", "row_begin", "col_begin"])
def gradient_kernel(
    x,  # [n, d]: a pointer, or a tensor descriptor with USE_TMA
    y,  # [m, d]
    scale_ptr,  # []
    rows,  # [n, 4 or 6]
    cols,  # [m, 4 or 6]
    shares,  # (of rows [n], their blocks' [blocks, 2], of columns [m], their blocks'), see vectors.py
    factors,  # ([n], [m]), or None
    h,  # of the chunk, [chunk rows, chunk columns], rows stride_hm apart: a pointer, or a descriptor with USE_TMA
    h_ptr,
    dscale_ptr,  # [programs], float64: each program adds its part
    scratch,  # [programs, BLOCK_M * BLOCK_N]
    kept,  # ([n, at least m], stride): the products of the forward pass, which are not formed again; or None
    n,  # of the chunk's end
    m,
    d,
    diag_offset,
    row_begin,  # multiples of the blocks
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
    SAME: tl.constexpr,
    ROW_WARPS: tl.constexpr,  # see thread_sums
    PRECISION: tl.constexpr,
):
    """H of a chunk of x and y, so small that H and its operands stay in L2 whatever the order of its tiles is."""
    abs_scale2, negated = signed_scale(tl.load(scale_ptr))
    signed_scale2 = tl.where(negated, -abs_scale2, abs_scale2)
    scratch += tl.program_id(0).to(tl.int64) * BLOCK_M * BLOCK_N
    first_m, first_n = row_begin // BLOCK_M, col_begin // BLOCK_N
    row_begin, col_begin = first_m * BLOCK_M, first_n * BLOCK_N
    h_ptr -= row_begin.to(tl.int64) * stride_hm + col_begin
    blocks_m = tl.cdiv(n - row_begin, BLOCK_M)
    dscale = tl.zeros((), tl.float64)
    sums = tl.zeros((ROW_WARPS if ROW_WARPS else 1, 8 if ROW_WARPS else 1, 4 if ROW_WARPS else 1), tl.float64)
    for tile in range(tl.program_id(0), blocks_m * tl.cdiv(m - col_begin, BLOCK_N), tl.num_programs(0)):
        block_m, block_n = first_m + tile % blocks_m, first_n + tile // blocks_m
        row, col = block_m * BLOCK_M, block_n * BLOCK_N
        if SAME != NO_IDS:
            distinct = has_distinct_ids(rows, cols, row, col, n, m, BLOCK_M, BLOCK_N, SAME)
        if kept is None:
            z = product(
                x, y, row, col, n, m, d, stride_xm, stride_xd, stride_yn, stride_yd,
                BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
            )  # fmt: skip
        else:
            z = load_products(kept, row, col, n, BLOCK_M, BLOCK_N)
        distance = diagonal_distance(row, col, diag_offset, BLOCK_M, BLOCK_N)
        plain = is_plain(row, col, distance, n, m, BLOCK_M, BLOCK_N)
        if SAME != NO_IDS:
            plain = plain & distinct
        narrow, shift, to_rows, to_cols = is_narrow(shares, block_m, block_n)
        if plain & narrow:
            row_share = tl.load(shares[0] + row + tl.arange(0, BLOCK_M)) * to_rows
            col_share = tl.load(shares[2] + col + tl.arange(0, BLOCK_N)) * to_cols
            if factors is None:
                g = tl.exp2(z * signed_scale2 - shift) * (row_share[:, None] + col_share[None, :])
            else:
                row_factor = tl.load(factors[0] + row + tl.arange(0, BLOCK_M)) * signed_scale2
                col_factor = tl.load(factors[1] + col + tl.arange(0, BLOCK_N))[None, :]
                e = tl.exp2(z * row_factor[:, None] * col_factor - shift)
                g = e * col_factor * ((row_share * row_factor)[:, None] + row_factor[:, None] * col_share[None, :])
            sums += thread_sums(g * z, BLOCK_M, BLOCK_N, ROW_WARPS).to(tl.float64)
            if USE_TMA:
                # In halves, which take half the shared memory.
                left, right = halves(g, BLOCK_M, BLOCK_N)
                h.store([row - row_begin, col - col_begin], left.to(h.dtype))
                h.store([row - row_begin, col - col_begin + BLOCK_N // 2], right.to(h.dtype))
            else:
                h_ptrs = h_ptr + row.to(tl.int64) * stride_hm + col + tl.arange(0, BLOCK_M)[:, None] * stride_hm
                tl.store(h_ptrs + tl.arange(0, BLOCK_N)[None, :], g.to(h_ptr.dtype.element_ty))
        else:
            part = store_general_tile(
                z, scratch, rows, cols, h_ptr, row, col, distance, n, m, stride_hm, abs_scale2, negated,
                BLOCK_M, BLOCK_N, factors is not None, SAME,
            )  # fmt: skip
            dscale += part.to(tl.float64)
    dscale_ptr += tl.program_id(0)
    tl.store(dscale_ptr, tl.load(dscale_ptr) + dscale + tl.sum(tl.sum(tl.sum(sums, 2), 1), 0))


@triton.jit(do_not_specialize=["n", "m", "diag_offset"])
def accumulate_kernel(
    x,  # [n, d]
    y,  # [m, d]
    scale_ptr,  # []
    rows,  # [n, 4 or 6]
    cols,  # [m, 4 or 6]
    shares,  # as gradient_kernel has them
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
        plain = is_plain(row, col, distance, n, m, BLOCK_M, BLOCK_N)
        if SAME != NO_IDS:
            plain = plain & distinct
        narrow, shift, to_rows, to_cols = is_narrow(shares, tl.program_id(0), col // BLOCK_N)
        if plain & narrow:
            row_share = load_part(shares[0], row, n, BLOCK_M) * to_rows
            col_share = load_part(shares[2], col, m, BLOCK_N) * to_cols
            h = tl.exp2(z * abs_scale2 - shift) * (row_share[:, None] + col_share[None, :])
            if HAS_FACTORS:
                h *= tl.where(negated, -abs_scale2, abs_scale2)
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
