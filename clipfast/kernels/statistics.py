"""Forward: logsumexps of every row's and every column's negatives, and the positives."""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.tiles import (
    INFINITY,
    LARGEST,
    LN_2,
    MAX_SPREAD,
    STRIP,
    diagonal_distance,
    finite,
    is_negative,
    is_plain,
    is_positive,
    least_and_largest,
    merge,
    product,
    signed_scale,
)


@triton.jit
def add_wide_tile(
    z,  # [BLOCK_M, BLOCK_N], masked products are -inf
    scratch,  # [BLOCK_M, BLOCK_N], and [2, BLOCK_M] behind it
    col_ptrs,  # [BLOCK_N]: the columns' shifts; their sums lie col_stride behind them
    col_stride,
    in_m,
    abs_scale2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge a tile into the columns' sums and return its rows' (shift, sum), each with a shift of its own.

    A rare path: the tile goes through memory, so that its registers do not add to those of the common one.
    """
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tl.store(scratch + offs_m[:, None] * BLOCK_N + offs_n[None, :], z)
    tl.debug_barrier()
    rows = scratch + BLOCK_M * BLOCK_N
    col_shift = tl.load(col_ptrs, mask=in_m, other=-LARGEST)
    col_sum = tl.load(col_ptrs + col_stride, mask=in_m, other=0.0)
    for begin in range(0, BLOCK_M, STRIP):
        offs = begin + tl.arange(0, STRIP)
        strip = tl.load(scratch + offs[:, None] * BLOCK_N + offs_n[None, :])
        row_shift = finite(tl.max(strip, 1))
        tl.store(rows + offs, row_shift)
        tl.store(rows + BLOCK_M + offs, tl.sum(tl.exp2((strip - row_shift[:, None]) * abs_scale2), 1))
        shift = tl.maximum(col_shift, finite(tl.max(strip, 0)))
        col_sum = col_sum * tl.exp2((col_shift - shift) * abs_scale2)
        col_sum += tl.sum(tl.exp2((strip - shift[None, :]) * abs_scale2), 0)
        col_shift = shift
    tl.store(col_ptrs, col_shift, mask=in_m)
    tl.store(col_ptrs + col_stride, col_sum, mask=in_m)
    tl.debug_barrier()
    return tl.load(rows + offs_m), tl.load(rows + BLOCK_M + offs_m)


@triton.jit
def store_positives(positive_z, z, row, col, distance, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The products of the positives in this tile, which is the only one to hold them."""
    own = tl.sum(tl.where(is_positive(distance, BLOCK_M, BLOCK_N), z, 0.0), 1)
    offs_m = tl.arange(0, BLOCK_M)
    local = offs_m + distance
    here = (row + offs_m < n) & (local >= 0) & (local < BLOCK_N) & (col + local < m)
    tl.store(positive_z + row + offs_m, own, mask=here)


@triton.jit(do_not_specialize=["n", "m", "diag_offset", "programs_n"])
def statistics_kernel(
    x,  # [n, d]: a pointer, or a tensor descriptor with USE_TMA
    y,  # [m, d]
    scale_ptr,  # []
    x_factor,  # [n], with HAS_FACTORS
    y_factor,  # [m]
    row_partial,  # [2, programs_n, n]: shift, sum
    col_partial,  # [2, programs_m, 2, m]: shift, sum of narrow tiles, then of wide ones
    scratch,  # [programs, BLOCK_M * (BLOCK_N + 2)]
    positive_z,  # [n]
    n,
    m,
    d,
    diag_offset,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    programs_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial statistics, with a fixed number of programs, programs_m x programs_n, each walking its tiles in order.

    At any moment the programs work on adjacent tiles, a super-tile of programs_m x programs_n of them, so that each
    row of x in L2 is read by programs_n and each row of y by programs_m of them. A program adds its tiles' row sums up
    in registers and its column sums in its own row of col_partial: no two programs write to one place.
    """
    programs_m = tl.num_programs(0) // programs_n
    program_m = tl.program_id(0) // programs_n
    program_n = tl.program_id(0) % programs_n
    abs_scale2, negated = signed_scale(tl.load(scale_ptr))
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    row_stride = programs_n.to(tl.int64) * n
    col_stride = 2 * programs_m.to(tl.int64) * m
    row_partial += program_n.to(tl.int64) * n
    col_partial += 2 * program_m.to(tl.int64) * m
    scratch += tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N + 2 * BLOCK_M)
    for block_m in range(program_m, tl.cdiv(n, BLOCK_M), programs_m):
        row = block_m * BLOCK_M
        row_shift = tl.full((BLOCK_M,), -LARGEST, tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        for block_n in range(program_n, tl.cdiv(m, BLOCK_N), programs_n):
            col = block_n * BLOCK_N
            z = product(
                x, y, row, col, n, m, d, stride_xm, stride_xd, stride_yn, stride_yd,
                BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
            )  # fmt: skip
            in_m = col + offs_n < m
            if HAS_FACTORS:
                z *= tl.load(x_factor + row + offs_m, mask=row + offs_m < n, other=0.0)[:, None]
                z *= tl.load(y_factor + col + offs_n, mask=in_m, other=0.0)[None, :]
            distance = diagonal_distance(row, col, diag_offset, BLOCK_M, BLOCK_N)
            plain = is_plain(row, col, distance, n, m, BLOCK_M, BLOCK_N)
            if not plain:
                store_positives(positive_z, z, row, col, distance, n, m, BLOCK_M, BLOCK_N)
            if negated:
                z = -z
            if not plain:
                z = tl.where(is_negative(row, col, distance, n, m, BLOCK_M, BLOCK_N), z, -INFINITY)
            low, high = least_and_largest(z, plain)
            shift = finite(high)
            col_ptrs = col_partial + col + offs_n
            if block_m == program_m:
                old_shift = -LARGEST
                old_sum = tl.zeros((BLOCK_N,), tl.float32)
                tl.store(col_ptrs + m, old_sum - LARGEST, mask=in_m)
                tl.store(col_ptrs + m + col_stride, old_sum, mask=in_m)
            else:
                old_shift = tl.load(col_partial + col)
                old_sum = tl.load(col_ptrs + col_stride, mask=in_m, other=0.0)
            # With one row or one column the positive may be all that a column or row has, and any shift too large.
            several = (row + 1 < n) & (col + 1 < m)
            if several & ((high - low) * abs_scale2 < MAX_SPREAD):
                # One exponential for both directions.
                e = tl.exp2((z - shift) * abs_scale2)
                tile_row_sum = tl.sum(e, 1)
                tile_row_shift = tl.zeros_like(tile_row_sum) + shift
                new_shift = tl.maximum(old_shift, shift)
                old_sum = old_sum * tl.exp2((old_shift - new_shift) * abs_scale2)
                old_sum += tl.sum(e, 0) * tl.exp2((shift - new_shift) * abs_scale2)
            else:
                tile_row_shift, tile_row_sum = add_wide_tile(
                    z, scratch, col_ptrs + m, col_stride, in_m, abs_scale2, BLOCK_M, BLOCK_N
                )
                new_shift = old_shift
            row_shift, row_sum = merge(row_shift, row_sum, tile_row_shift, tile_row_sum, abs_scale2)
            tl.store(col_ptrs, tl.zeros_like(old_sum) + new_shift, mask=in_m)
            tl.store(col_ptrs + col_stride, old_sum, mask=in_m)
            # Other threads of this program may read what these have written.
            tl.debug_barrier()
        in_n = row + offs_m < n
        tl.store(row_partial + row + offs_m, row_shift, mask=in_n)
        tl.store(row_partial + row_stride + row + offs_m, row_sum, mask=in_n)


@triton.jit
def merged_lse(partial, offs, count, length, scale, bias, BLOCK: tl.constexpr):  # [BLOCK], float64
    """The logsumexp of `count` partial sums, merged in their order."""
    abs_scale2, _ = signed_scale(scale)
    inside = offs < length
    shift = tl.full((BLOCK,), -LARGEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    ptrs = partial + offs
    for _ in range(count):
        other_shift = tl.load(ptrs, mask=inside, other=-LARGEST)
        other_total = tl.load(ptrs + count.to(tl.int64) * length, mask=inside, other=0.0)
        shift, total = merge(shift, total, other_shift, other_total, abs_scale2)
        ptrs += length
    # In float64: a logsumexp near 100 that is rounded to float32 is wrong by 4e-6.
    return (
        tl.abs(scale).to(tl.float64) * shift.to(tl.float64) + bias.to(tl.float64) + tl.log2(total.to(tl.float64)) * LN_2
    )


@triton.jit(do_not_specialize=["n", "m", "diag_offset", "programs_m", "programs_n"])
def merge_kernel(
    row_partial,  # [2, programs_n, n]
    col_partial,  # [2, programs_m, 2, m]
    positive_z,  # [n]
    scale_ptr,  # []
    bias_ptr,  # []
    row_lse,  # [n], float64
    col_lse,  # [m], float64
    positive,  # [n], float64
    n,
    m,
    diag_offset,
    programs_m,
    programs_n,
    BLOCK: tl.constexpr,
):
    """Merge the partial statistics in a fixed order. The first programs take rows, the others columns."""
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    row_blocks = tl.cdiv(n, BLOCK)
    block = tl.program_id(0)
    if block < row_blocks:
        offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        lse = merged_lse(row_partial, offs, programs_n, n, scale, bias, BLOCK)
        tl.store(row_lse + offs, lse, mask=offs < n)
        own = (offs < n) & (offs + diag_offset >= 0) & (offs + diag_offset < m)
        z = tl.load(positive_z + offs, mask=own, other=0.0).to(tl.float64)
        logit = z * scale.to(tl.float64) + bias.to(tl.float64)
        tl.store(positive + offs, tl.where(own, logit, 0.0), mask=offs < n)
    else:
        offs = (block - row_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        lse = merged_lse(col_partial, offs, 2 * programs_m, m, scale, bias, BLOCK)
        tl.store(col_lse + offs, lse, mask=offs < m)
