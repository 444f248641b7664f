"""Forward: logsumexps of every row's and every column's negatives, the positives, and how many negatives are above."""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.tiles import (
    INFINITY,
    LARGEST,
    LN_2,
    MAX_SPREAD,
    STRIP,
    are_distinct,
    diagonal_distance,
    finite,
    is_negative,
    is_plain,
    is_positive,
    least_and_largest,
    load_part,
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
    ids,  # ([n], [m]), with IGNORES
    row,
    col,
    n,
    m,
    abs_scale2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IGNORES: tl.constexpr,
):
    """Merge a tile into the columns' sums and return its rows' (shift, sum), each with a shift of its own.

    Pairs with equal ids are masked here. A rare path: the tile goes through memory, so that its registers do not add
    to those of the common one.
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
        if IGNORES:
            row_ids, col_ids = load_part(ids[0], row + begin, n, STRIP), load_part(ids[1], col, m, BLOCK_N)
            strip = tl.where(row_ids[:, None] == col_ids[None, :], -INFINITY, strip)
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
def not_below(z, row_match, col_match, among):  # [BLOCK_M, BLOCK_N], [BLOCK_M], [BLOCK_N] -> [BLOCK_M], [BLOCK_N]
    """How many products, where `among` is 1, are not below their row's and their column's match; NaN is not."""
    return tl.sum(tl.where(z < row_match[:, None], 0, among), 1), tl.sum(tl.where(z < col_match[None, :], 0, among), 0)


@triton.jit
def match_of(matches, first, length, scale, BLOCK: tl.constexpr):  # [BLOCK]
    """The matches of some rows. Where all logits are alike, or NaN, none is below."""
    match = load_part(matches, first, length, BLOCK).to(tl.float32)
    return tl.where(tl.abs(scale) > 0, match, -INFINITY)


@triton.jit
def count_general_tile(
    z,  # [BLOCK_M, BLOCK_N], with the scale's sign
    scratch,  # [BLOCK_M, BLOCK_N]
    ids,  # ([n], [m]), or None
    ranks,  # see statistics_kernel
    scale,
    row,
    col,
    distance,
    n,
    m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Count in a tile that has positives, an edge or equal ids: through memory, as in add_wide_tile."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tl.store(scratch + offs_m[:, None] * BLOCK_N + offs_n[None, :], z)
    tl.debug_barrier()
    col_match = match_of(ranks[1], col, m, scale, BLOCK_N)
    by_col = tl.zeros((BLOCK_N,), tl.int32)
    for begin in tl.range(0, BLOCK_M, STRIP, num_stages=1):
        offs = begin + tl.arange(0, STRIP)
        strip = tl.load(scratch + offs[:, None] * BLOCK_N + offs_n[None, :])
        among = is_negative(row + begin, col, distance + begin, n, m, STRIP, BLOCK_N)
        if ids is not None:
            row_ids, col_ids = load_part(ids[0], row + begin, n, STRIP), load_part(ids[1], col, m, BLOCK_N)
            among = among & (row_ids[:, None] != col_ids[None, :])
        row_match = match_of(ranks[0], row + begin, n, scale, STRIP)
        by_row, more_by_col = not_below(strip, row_match, col_match, among.to(tl.int32))
        tl.atomic_add(ranks[2] + row + offs, by_row, mask=row + offs < n)
        by_col += more_by_col
    tl.atomic_add(ranks[3] + col + offs_n, by_col, mask=col + offs_n < m)
    tl.debug_barrier()


@triton.jit
def count_plain_tile(z, ranks, scale, row, col, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row_match, col_match = match_of(ranks[0], row, n, scale, BLOCK_M), match_of(ranks[1], col, m, scale, BLOCK_N)
    by_row, by_col = not_below(z, row_match, col_match, 1)
    tl.atomic_add(ranks[2] + row + tl.arange(0, BLOCK_M), by_row)
    tl.atomic_add(ranks[3] + col + tl.arange(0, BLOCK_N), by_col)


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
    ids,  # ([n], [m]), int32: of pairs that are not negatives; or None
    ranks,  # matches [n] and [m], float64, and how many are not below them, [n] and [m], int32, added to; or None
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
    IGNORES: tl.constexpr,  # pairs with equal ids are left out of the sums
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
    scale = tl.load(scale_ptr)
    abs_scale2, negated = signed_scale(scale)
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
            if ids is not None:
                distinct = are_distinct(load_part(ids[0], row, n, BLOCK_M), load_part(ids[1], col, m, BLOCK_N))
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
            if ids is not None:
                plain = plain & distinct
            if not plain:
                store_positives(positive_z, z, row, col, distance, n, m, BLOCK_M, BLOCK_N)
            if negated:
                z = -z
            if ranks is not None:
                if plain:
                    count_plain_tile(z, ranks, scale, row, col, n, m, BLOCK_M, BLOCK_N)
                else:
                    count_general_tile(
                        z, scratch, ids, ranks, scale, row, col, distance, n, m, BLOCK_M, BLOCK_N
                    )  # fmt: skip
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
            # So may the ignored pairs be.
            several = (row + 1 < n) & (col + 1 < m)
            if IGNORES:
                several = several & distinct
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
                    z, scratch, col_ptrs + m, col_stride, in_m, ids, row, col, n, m, abs_scale2,
                    BLOCK_M, BLOCK_N, IGNORES,
                )  # fmt: skip
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
