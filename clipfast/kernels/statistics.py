"""Forward: logsumexps of every row's and every column's negatives, and the positives."""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.tiles import (
    INFINITY,
    LARGEST,
    LN_2,
    MAX_SPREAD,
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
def tile_sums(z, plain, abs_scale2):
    """(shift, sum) over every row and every column of a tile whose masked products are -inf."""
    low, high = least_and_largest(z, plain)
    if (high - low) * abs_scale2 < MAX_SPREAD:
        # One exponential for both directions.
        shift = finite(high)
        e = tl.exp2((z - shift) * abs_scale2)
        row_sum, col_sum = tl.sum(e, 1), tl.sum(e, 0)
        row_shift, col_shift = tl.zeros_like(row_sum) + shift, tl.zeros_like(col_sum) + shift
    else:
        row_shift, col_shift = finite(tl.max(z, 1)), finite(tl.max(z, 0))
        row_sum = tl.sum(tl.exp2((z - row_shift[:, None]) * abs_scale2), 1)
        col_sum = tl.sum(tl.exp2((z - col_shift[None, :]) * abs_scale2), 0)
    return row_shift, row_sum, col_shift, col_sum


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
    col_partial,  # [2, programs_m, m]
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
    col_sums = col_partial + program_m.to(tl.int64) * m
    row_sums = row_partial + program_n.to(tl.int64) * n
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
            tile_row_shift, tile_row_sum, col_shift, col_sum = tile_sums(z, plain, abs_scale2)
            row_shift, row_sum = merge(row_shift, row_sum, tile_row_shift, tile_row_sum, abs_scale2)
            col_ptrs = col_sums + col + offs_n
            col_sum_ptrs = col_ptrs + tl.num_programs(0).to(tl.int64) // programs_n * m
            # The program's first block of rows finds nothing there yet.
            seen = col + offs_n < tl.where(block_m > program_m, m, 0)
            old_shift = tl.load(col_ptrs, mask=seen, other=-LARGEST)
            old_sum = tl.load(col_sum_ptrs, mask=seen, other=0.0)
            col_shift, col_sum = merge(old_shift, old_sum, col_shift, col_sum, abs_scale2)
            tl.store(col_ptrs, col_shift, mask=in_m)
            tl.store(col_sum_ptrs, col_sum, mask=in_m)
            # Other threads of this program may read what these have written.
            tl.debug_barrier()
        in_n = row + offs_m < n
        row_ptrs = row_sums + row + offs_m
        tl.store(row_ptrs, row_shift, mask=in_n)
        tl.store(row_ptrs + programs_n.to(tl.int64) * n, row_sum, mask=in_n)


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
        tl.abs(scale).to(tl.float64) * shift.to(tl.float64)
        + bias.to(tl.float64)
        + tl.log2(total.to(tl.float64)) * LN_2
    )


@triton.jit(do_not_specialize=["n", "m", "diag_offset", "programs_m", "programs_n"])
def merge_kernel(
    row_partial,  # [2, programs_n, n]
    col_partial,  # [2, programs_m, m]
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
        lse = merged_lse(col_partial, offs, programs_m, m, scale, bias, BLOCK)
        tl.store(col_lse + offs, lse, mask=offs < m)
