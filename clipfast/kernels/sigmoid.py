"""The sigmoid loss: each row's sum of softplus, and H = f_i g_j G_ij for the products of the gradients, in one pass.

With t a negative's logit and e = exp(t), softplus(t) = log(1 + e) and sigmoid(t) = e / (1 + e). By

    (1 + a)(1 + b) = 1 + q,   q = a + b + a b,   1 / (1 + a) = (1 + b) / (1 + q)

many logits of a row share one logarithm, of their product, and four share one reciprocal. As q is a sum of numbers that
are not negative, both keep their relative precision however small they are. A tile whose products grow large goes
through memory as one with positives does, and takes each logit by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.gradient import thread_sums
from clipfast.kernels.tiles import (
    LN_2,
    LOG2_E,
    NO_IDS,
    POSITIVES,
    STRIP,
    are_distinct,
    diagonal_distance,
    halves,
    inner_product,
    is_plain,
    is_positive,
    load_part,
    product,
    store_tile,
)
from clipfast.kernels.vectors import AMPLIFIER

# Of 1 + q, 2^100 as bits: below it no part of a product overflows, and its reciprocal is a normal number.
LARGE_BITS = tl.constexpr((127 + 100) << 23)
LEAST_WIDTH = tl.constexpr(32)  # quarters of it are the columns of a matrix instruction's step
NOWHERE = tl.constexpr(1 << 24)  # beyond any chunk of H


@triton.jit
def log1p(q):
    """log(1 + q) for q >= 0; up to q = 1 as 2 atanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...), s = q / (2 + q) <= 1/3."""
    s = tl.minimum(q, 1.0)
    root = tl.rsqrt(2.0 + s)
    s *= root * root
    square = s * s
    # The first term that is left out is below a rounding: (1/9)^7 / 15.
    series = 1 / 11 + square * (1 / 13)
    series = 1 / 7 + square * (1 / 9 + square * series)
    series = 1.0 + square * (1 / 3 + square * (1 / 5 + square * series))
    return tl.where(q > 1.0, tl.log2(1.0 + q) * LN_2, 2.0 * s * series)


@triton.jit
def quarters(t, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    left, right = tl.split(tl.permute(tl.reshape(t, (BLOCK_M, 2, 2, WIDTH // 4)), (0, 3, 2, 1)))
    a, b = tl.split(left)
    c, d = tl.split(right)
    return a, b, c, d


@triton.jit
def of_quarters(a, b, c, d, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):  # [BLOCK_M, WIDTH]
    return tl.reshape(tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 3, 2, 1)), (BLOCK_M, WIDTH))


@triton.jit
def both(a, b):
    return a * b + (a + b)


@triton.jit
def row_product(q, BLOCK_M: tl.constexpr, ROW_WARPS: tl.constexpr):
    """The rows' products as q: [BLOCK_M, 4], of what one thread holds, without communication; else [BLOCK_M, 1]."""
    if ROW_WARPS == 0:
        q = tl.reduce(q, 1, both, keep_dims=True)
    else:
        left, right = tl.split(tl.reshape(q, (BLOCK_M, 4, 2)))
        q = both(left, right)
    return q


@triton.jit
def four_sigmoids(a, b, c, d):
    """e / (1 + e) of four, and their product as q."""
    ab, cd = a * b, c * d
    first, second = ab + (a + b), cd + (c + d)
    q = both(first, second)
    root = tl.rsqrt(1.0 + q)
    share = root * root
    of_first, of_second = share * (1.0 + second), share * (1.0 + first)
    return (a + ab) * of_first, (b + ab) * of_first, (c + cd) * of_second, (d + cd) * of_second, q


@triton.jit
def plain_part(
    z,  # [BLOCK_M, WIDTH], without factors
    h_ptr,
    factors,
    row_factor,  # [BLOCK_M], with factors
    col,
    scale2,
    bias2,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_WARPS: tl.constexpr,
):
    """H of negatives whose products stay small, the rows' products, and the sums of G and of G z."""
    # All by quarters up to H: of factors that multiply H at once, Triton 3.6 makes a layout with every row in a thread.
    za, zb, zc, zd = quarters(z, BLOCK_M, WIDTH)
    if factors is None:
        a, b = tl.exp2(za * scale2 + bias2), tl.exp2(zb * scale2 + bias2)
        c, d = tl.exp2(zc * scale2 + bias2), tl.exp2(zd * scale2 + bias2)
    else:
        QUARTER: tl.constexpr = WIDTH // 4
        col_factors = factors[1] + col + tl.arange(0, QUARTER)
        fa, fb = tl.load(col_factors)[None, :], tl.load(col_factors + QUARTER)[None, :]
        fc, fd = tl.load(col_factors + 2 * QUARTER)[None, :], tl.load(col_factors + 3 * QUARTER)[None, :]
        row_scale2 = (row_factor * scale2)[:, None]
        a, b = tl.exp2(za * row_scale2 * fa + bias2), tl.exp2(zb * row_scale2 * fb + bias2)
        c, d = tl.exp2(zc * row_scale2 * fc + bias2), tl.exp2(zd * row_scale2 * fd + bias2)
    a, b, c, d, q = four_sigmoids(a, b, c, d)
    sum_g = thread_sums((a + b) + (c + d), BLOCK_M, WIDTH // 4, ROW_WARPS)
    if factors is not None:
        row_factor = row_factor[:, None]
        a, b, c, d = a * row_factor * fa, b * row_factor * fb, c * row_factor * fc, d * row_factor * fd
    sum_gz = thread_sums(a * za + b * zb + c * zc + d * zd, BLOCK_M, WIDTH // 4, ROW_WARPS)
    h = of_quarters(a, b, c, d, BLOCK_M, WIDTH)
    if h_ptr is not None:
        h = as_stored(h, h_ptr)
    return h, row_product(q, BLOCK_M, ROW_WARPS), sum_g, sum_gz


@triton.jit
def plain_parts(
    z, h_ptr, factors, row_factor, col, scale2, bias2, q, sum_g, sum_gz,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, ROW_WARPS: tl.constexpr,
):  # fmt: skip
    """plain_part, one narrow part of the columns after the other, so that fewer registers are held."""
    if ROW_WARPS == 0 or WIDTH <= LEAST_WIDTH:
        h, other_q, other_g, other_gz = plain_part(
            z, h_ptr, factors, row_factor, col, scale2, bias2, BLOCK_M, WIDTH, ROW_WARPS
        )  # fmt: skip
        q, sum_g, sum_gz = both(q, other_q), sum_g + other_g, sum_gz + other_gz
    else:
        HALF: tl.constexpr = WIDTH // 2
        left, right = halves(z, BLOCK_M, WIDTH)
        left, q, sum_g, sum_gz = plain_parts(
            left, h_ptr, factors, row_factor, col, scale2, bias2, q, sum_g, sum_gz, BLOCK_M, HALF, ROW_WARPS
        )  # fmt: skip
        right, q, sum_g, sum_gz = plain_parts(
            right, h_ptr, factors, row_factor, col + HALF, scale2, bias2, q, sum_g, sum_gz, BLOCK_M, HALF, ROW_WARPS
        )  # fmt: skip
        h = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_M, WIDTH))
    return h, q, sum_g, sum_gz


@triton.jit
def softplus_and_sigmoid(t):
    e = tl.exp2(-tl.abs(t) * LOG2_E)
    return tl.where(t < 0, 0.0, t) + log1p(e), tl.where(t < 0, e, 1.0) / (1.0 + e)


@triton.jit
def with_tile_factors(z, factors, row, col, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    if factors is not None:
        z *= load_part(factors[0], row, n, BLOCK_M)[:, None]
        z *= load_part(factors[1], col, m, BLOCK_N)[None, :]
    return z


@triton.jit
def as_stored(h, h_ptr):
    """H in its dtype; float16, which has no range to spare, gets it times AMPLIFIER."""
    if h_ptr.dtype.element_ty == tl.float16:
        h *= AMPLIFIER
    return h.to(h_ptr.dtype.element_ty)


@triton.jit
def general_tile(
    z,  # [BLOCK_M, BLOCK_N], without factors
    scratch,  # [BLOCK_M, BLOCK_N]
    factors,
    ids,
    h_ptr,
    loss_ptr,
    sums_ptr,
    row,
    col,
    n,
    m,
    diag_offset,
    stride_hm,
    scale_ptr,
    bias_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SAME: tl.constexpr,
    GRADIENTS: tl.constexpr,
):
    """A tile that has positives, an edge, equal ids or large logits: through memory, as in gradient.py."""
    scratch += tl.program_id(0).to(tl.int64) * BLOCK_M * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tl.store(scratch + offs_m[:, None] * BLOCK_N + offs_n[None, :], z)
    tl.debug_barrier()
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    distance = diagonal_distance(row, col, diag_offset, BLOCK_M, BLOCK_N)
    dbias, dscale = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for begin in tl.range(0, BLOCK_M, STRIP, num_stages=1):
        offs = begin + tl.arange(0, STRIP)
        strip = tl.load(scratch + offs[:, None] * BLOCK_N + offs_n[None, :])
        strip = with_tile_factors(strip, factors, row + begin, col, n, m, STRIP, BLOCK_N)
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
        tl.store(loss_ptr + offs, tl.sum(tl.where(counts, loss, 0.0), 1), mask=row + offs < n)
        if GRADIENTS:
            g = tl.where(counts, tl.where(positive, -g, g), 0.0)
            dbias += tl.sum(g)
            dscale += inner_product(g, strip, row + begin, col, n, m, STRIP, BLOCK_N)
            h = with_tile_factors(g, factors, row + begin, col, n, m, STRIP, BLOCK_N)
            store_tile(h_ptr, as_stored(h, h_ptr), row + begin, col, n, m, stride_hm, STRIP, BLOCK_N)
    if GRADIENTS:
        # No other program adds there.
        tl.atomic_add(sums_ptr + 2 * tl.program_id(0), dbias.to(tl.float64))
        tl.atomic_add(sums_ptr + 2 * tl.program_id(0) + 1, dscale.to(tl.float64))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "m", "diag_offset", "row_begin", "col_begin"])
def sigmoid_kernel(
    x,  # [n, d]: a pointer, or a tensor descriptor with USE_TMA
    y,  # [m, d]
    scale_ptr,  # []
    bias_ptr,  # []
    factors,  # ([n], [m]), or None
    ids,  # ([n], [m]), int32, with SAME
    h,  # with GRADIENTS, of the chunk, as gradient_kernel has it
    h_ptr,
    loss_ptr,  # [blocks of the chunk's columns, chunk rows]
    sums_ptr,  # [programs, 2], float64: each program adds its parts of dbias and dscale, with GRADIENTS
    scratch,  # [programs, BLOCK_M * BLOCK_N]
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
    GRADIENTS: tl.constexpr,
    ROW_WARPS: tl.constexpr,  # see thread_sums
    PRECISION: tl.constexpr,
):
    """A chunk of x and y, as in gradient_kernel. Whether a tile's products are large is known after its exponentials:
    one whose are comes a second time."""
    scale2, bias2 = tl.load(scale_ptr) * LOG2_E, tl.load(bias_ptr) * LOG2_E
    first_m, first_n = row_begin // BLOCK_M, col_begin // BLOCK_N
    row_begin, col_begin = first_m * BLOCK_M, first_n * BLOCK_N
    if GRADIENTS:
        h_ptr -= row_begin.to(tl.int64) * stride_hm + col_begin
    blocks_m = tl.cdiv(n - row_begin, BLOCK_M)
    SUMS: tl.constexpr = (ROW_WARPS if ROW_WARPS else 1, 8 if ROW_WARPS else 1, 4 if ROW_WARPS else 1)
    dbias_sums, dscale_sums = tl.zeros(SUMS, tl.float64), tl.zeros(SUMS, tl.float64)
    tiles = blocks_m * tl.cdiv(m - col_begin, BLOCK_N)
    tile = tl.program_id(0)
    large = False
    while tile < tiles:
        block_m, block_n = tile % blocks_m, tile // blocks_m
        row, col = (first_m + block_m) * BLOCK_M, (first_n + block_n) * BLOCK_N
        if SAME != NO_IDS:
            distinct = are_distinct(load_part(ids[0], row, n, BLOCK_M), load_part(ids[1], col, m, BLOCK_N))
        z = product(
            x, y, row, col, n, m, d, stride_xm, stride_xd, stride_yn, stride_yd,
            BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
        )  # fmt: skip
        distance = diagonal_distance(row, col, diag_offset, BLOCK_M, BLOCK_N)
        plain = is_plain(row, col, distance, n, m, BLOCK_M, BLOCK_N) & (large == 0)
        if SAME != NO_IDS:
            plain = plain & distinct
        tile_loss = loss_ptr + block_n.to(tl.int64) * (n - row_begin) + block_m * BLOCK_M
        large = False
        if plain:
            row_factor = None if factors is None else tl.load(factors[0] + row + tl.arange(0, BLOCK_M))
            g, q, sum_g, sum_gz = plain_parts(
                z, h_ptr, factors, row_factor, col, scale2, bias2,
                tl.zeros((BLOCK_M, 4 if ROW_WARPS else 1), tl.float32), tl.zeros(SUMS, tl.float32),
                tl.zeros(SUMS, tl.float32), BLOCK_M, BLOCK_N, ROW_WARPS,
            )  # fmt: skip
            # A NaN's bits are larger still.
            large = tl.max(q.to(tl.uint32, bitcast=True)) >= LARGE_BITS
            tl.store(tile_loss + tl.arange(0, BLOCK_M), tl.sum(log1p(q), 1))
            if GRADIENTS:
                # Without a branch on `large`: compilers would move all that only one side needs behind it, where its
                # operands still take registers. So a large tile is stored in vain, and comes once more; by a tensor
                # descriptor, whose stores are in no order with others, it is stored nowhere.
                if USE_TMA:
                    # In halves, which take half the shared memory.
                    left, right = halves(g, BLOCK_M, BLOCK_N)
                    place = row - row_begin + tl.where(large, NOWHERE, 0)
                    h.store([place, col - col_begin], left)
                    h.store([place, col - col_begin + BLOCK_N // 2], right)
                else:
                    h_ptrs = h_ptr + row.to(tl.int64) * stride_hm + col + tl.arange(0, BLOCK_M)[:, None] * stride_hm
                    tl.store(h_ptrs + tl.arange(0, BLOCK_N)[None, :], g)
                dbias_sums += tl.where(large, 0.0, sum_g).to(tl.float64)
                dscale_sums += tl.where(large, 0.0, sum_gz).to(tl.float64)
        else:
            general_tile(
                z, scratch, factors, ids, h_ptr, tile_loss, sums_ptr, row, col, n, m, diag_offset, stride_hm,
                scale_ptr, bias_ptr, BLOCK_M, BLOCK_N, SAME, GRADIENTS,
            )  # fmt: skip
        tile += tl.where(large, 0, tl.num_programs(0))
    if GRADIENTS:
        sums_ptr += 2 * tl.program_id(0)
        tl.atomic_add(sums_ptr, tl.sum(tl.sum(tl.sum(dbias_sums, 2), 1), 0))
        tl.atomic_add(sums_ptr + 1, tl.sum(tl.sum(tl.sum(dscale_sums, 2), 1), 0))
