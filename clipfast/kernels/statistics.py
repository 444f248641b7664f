"""Forward: logsumexps of every row's and every column's negatives, the positives, and how many negatives are above."""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.tiles import (
    HEADROOM,
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
    load_part,
    merge,
    product,
    shifted,
    signed_scale,
)


@triton.jit
def column_sums(e, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROW_WARPS: tl.constexpr):
    """Column sums, [ROW_WARPS, 8, BLOCK_N]: each over those rows alone that one thread of NVIDIA's matrix instructions
    holds, so that no threads communicate. [1, 1, BLOCK_N] without ROW_WARPS."""
    if ROW_WARPS == 0:
        sums = tl.reshape(tl.sum(e, 0), (1, 1, BLOCK_N))
    else:
        sums = tl.sum(tl.sum(tl.reshape(e, (BLOCK_M // (16 * ROW_WARPS), ROW_WARPS, 2, 8, BLOCK_N)), 2), 0)
    return sums


@triton.jit
def store_sums(partial, stride, first, length, shift, sums):
    """A block's common shift and its sums, which lie `stride` behind the shifts."""
    offs = first + tl.arange(0, sums.shape[0])
    tl.store(partial + offs, tl.zeros_like(sums) + shift, mask=offs < length)
    tl.store(partial + stride + offs, sums, mask=offs < length)


@triton.jit
def store_products(kept, z, row, col, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a tile as far as kept's rows reach, which are padded, so that every access is of 16 bytes."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first = kept[0] + row.to(tl.int64) * kept[1] + col
    inside = (row + offs_m < n)[:, None] & (col + offs_n < kept[1])[None, :]
    tl.store(first + offs_m.to(tl.int64)[:, None] * kept[1] + offs_n[None, :], z, mask=inside)


@triton.jit
def add_general_tile(
    z,  # [BLOCK_M, BLOCK_N], with the scale's sign
    scratch,  # [BLOCK_M, BLOCK_N]
    row_ptr,  # the first row's shift; the sums lie row_stride behind the shifts
    row_stride,
    col_ptr,
    col_stride,
    positive_z,  # [n], with the scale's sign
    ids,  # ([n], [m]), with IGNORES
    row,
    col,
    distance,
    n,
    m,
    abs_scale2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IGNORES: tl.constexpr,
):
    """Merge a tile that has positives, an edge, equal ids or a wide range into the rows' and the columns' sums.

    Each row and column has a shift of its own, which is a product here. Few tiles are such: they go through memory, so
    that their registers do not add to those of the common path.
    """
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tl.store(scratch + offs_m[:, None] * BLOCK_N + offs_n[None, :], z)
    tl.debug_barrier()
    in_m = col + offs_n < m
    col_ptrs = col_ptr + offs_n
    col_shift = tl.load(col_ptrs, mask=in_m, other=-LARGEST)
    col_sum = tl.load(col_ptrs + col_stride, mask=in_m, other=0.0)
    for begin in tl.range(0, BLOCK_M, STRIP, num_stages=1):
        offs = begin + tl.arange(0, STRIP)
        in_n = row + offs < n
        strip = tl.load(scratch + offs[:, None] * BLOCK_N + offs_n[None, :])
        positive = is_positive(distance + begin, STRIP, BLOCK_N)
        local = offs + distance
        here = in_n & (local >= 0) & (local < BLOCK_N) & (col + local < m)
        tl.store(positive_z + row + offs, tl.sum(tl.where(positive, strip, 0.0), 1), mask=here)
        negative = in_n[:, None] & in_m[None, :] & (positive == 0)
        if IGNORES:
            row_ids, col_ids = load_part(ids[0], row + begin, n, STRIP), load_part(ids[1], col, m, BLOCK_N)
            negative = negative & (row_ids[:, None] != col_ids[None, :])
        strip = tl.where(negative, strip, -INFINITY)
        row_shift = tl.load(row_ptr + offs, mask=in_n, other=-LARGEST)
        row_sum = tl.load(row_ptr + offs + row_stride, mask=in_n, other=0.0)
        row_shift, row_sum = with_terms(row_shift, row_sum, strip, 1, abs_scale2)
        tl.store(row_ptr + offs, row_shift, mask=in_n)
        tl.store(row_ptr + offs + row_stride, row_sum, mask=in_n)
        col_shift, col_sum = with_terms(col_shift, col_sum, strip, 0, abs_scale2)
    tl.store(col_ptrs, col_shift, mask=in_m)
    tl.store(col_ptrs + col_stride, col_sum, mask=in_m)
    tl.debug_barrier()


@triton.jit
def with_terms(shift, total, z, axis: tl.constexpr, abs_scale2):
    """The sums with the exponentials of z along `axis`, as pairs (shift, total) again; a NaN makes no shift."""
    largest = tl.maximum(shift, finite(tl.max(tl.where(z == z, z, -INFINITY), axis)))
    e = tl.exp2((z - tl.expand_dims(largest, axis)) * abs_scale2)
    return largest, total * tl.exp2((shift - largest) * abs_scale2) + tl.sum(e, axis)


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
def count_plain_tile(
    z, ranks, col_counts, scale, row, col, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROW_WARPS: tl.constexpr
):  # fmt: skip
    """Add a tile's counts to the rows' and to the columns', which with ROW_WARPS are kept as column_sums are."""
    row_match, col_match = match_of(ranks[0], row, n, scale, BLOCK_M), match_of(ranks[1], col, m, scale, BLOCK_N)
    by_row = tl.sum(tl.where(z < row_match[:, None], 0.0, 1.0), 1)
    tl.atomic_add(ranks[2] + row + tl.arange(0, BLOCK_M), by_row.to(tl.int32))
    above = tl.where(z < col_match[None, :], 0.0, 1.0)
    if ROW_WARPS == 0:
        tl.atomic_add(ranks[3] + col + tl.arange(0, BLOCK_N), tl.sum(above, 0).to(tl.int32))
    else:
        col_counts += column_sums(above, BLOCK_M, BLOCK_N, ROW_WARPS)
    return col_counts


@triton.jit(do_not_specialize=["n", "m", "diag_offset", "programs_n"])
def statistics_kernel(
    x,  # [n, d]: a pointer, or a tensor descriptor with USE_TMA
    y,  # [m, d]
    scale_ptr,  # []
    x_factor,  # [n], with HAS_FACTORS
    y_factor,  # [m]
    ids,  # ([n], [m]), int32: of pairs that are not negatives; or None
    ranks,  # matches [n] and [m], float64, and how many are not below them, [n] and [m], int32, added to; or None
    row_partial,  # [2, programs_n, 2, n]: shift, sum; of the plain narrow tiles, then of others
    col_partial,  # [2, programs_m, 2, m]
    scratch,  # [programs, BLOCK_M * BLOCK_N]
    positive_z,  # [n], with the scale's sign
    kept,  # ([n, at least m], stride): for the products, without factors and sign; or None
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
    ROW_WARPS: tl.constexpr,  # see column_sums
    PRECISION: tl.constexpr,
):
    """Partial statistics, with a fixed number of programs, programs_m x programs_n, each walking its tiles in order.

    At any moment the programs work on adjacent tiles, a super-tile of programs_m x programs_n of them, so that each
    row of x in L2 is read by programs_n and each row of y by programs_m of them. A program adds the column sums of a
    block of columns up in registers and its row sums in its own row of row_partial: no two programs write to one place.

    All exponentials of a narrow tile lie within [2^-MAX_SPREAD, 2^HEADROOM] for the shift, in log2 units, that it has
    in common with the tiles before it: a sum that is no normal number any more when the shift moves up is below the
    rounding of the tile's own.
    """
    programs_m = tl.num_programs(0) // programs_n
    program_m = tl.program_id(0) // programs_n
    program_n = tl.program_id(0) % programs_n
    scale = tl.load(scale_ptr)
    abs_scale2, negated = signed_scale(scale)
    row_stride = 2 * programs_n.to(tl.int64) * n
    col_stride = 2 * programs_m.to(tl.int64) * m
    row_partial += 2 * program_n.to(tl.int64) * n
    col_partial += 2 * program_m.to(tl.int64) * m
    scratch += tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N)
    for block_n in range(program_n, tl.cdiv(m, BLOCK_N), programs_n):
        col = block_n * BLOCK_N
        store_sums(col_partial + m, col_stride, col, m, -LARGEST, tl.zeros((BLOCK_N,), tl.float32))
        shift = tl.full((), -LARGEST, tl.float32)
        col_sums = tl.zeros((ROW_WARPS if ROW_WARPS else 1, 8 if ROW_WARPS else 1, BLOCK_N), tl.float32)
        # Exact up to 2^24 rows of one thread, which holds one in 32 or fewer.
        col_counts = tl.zeros_like(col_sums)
        for block_m in range(program_m, tl.cdiv(n, BLOCK_M), programs_m):
            row = block_m * BLOCK_M
            if ids is not None:
                distinct = are_distinct(load_part(ids[0], row, n, BLOCK_M), load_part(ids[1], col, m, BLOCK_N))
            z = product(
                x, y, row, col, n, m, d, stride_xm, stride_xd, stride_yn, stride_yd,
                BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
            )  # fmt: skip
            if kept is not None:
                store_products(kept, z, row, col, n, BLOCK_M, BLOCK_N)
            if HAS_FACTORS:
                z *= load_part(x_factor, row, n, BLOCK_M)[:, None]
                z *= load_part(y_factor, col, m, BLOCK_N)[None, :]
            distance = diagonal_distance(row, col, diag_offset, BLOCK_M, BLOCK_N)
            plain = is_plain(row, col, distance, n, m, BLOCK_M, BLOCK_N)
            countable = plain
            if ids is not None:
                countable = plain & distinct
            if IGNORES:
                plain = countable
            if negated:
                z = -z
            if ranks is not None:
                if countable:
                    col_counts = count_plain_tile(
                        z, ranks, col_counts, scale, row, col, n, m, BLOCK_M, BLOCK_N, ROW_WARPS
                    )  # fmt: skip
                else:
                    count_general_tile(
                        z, scratch, ids, ranks, scale, row, col, distance, n, m, BLOCK_M, BLOCK_N
                    )  # fmt: skip
            # A NaN may be ignored here, it passes through every later sum by itself.
            low, high = tl.min(z) * abs_scale2, tl.max(z) * abs_scale2
            narrow = plain & (high - low < MAX_SPREAD)
            if block_n == program_n:
                row_shift = -LARGEST
                row_sum = tl.zeros((BLOCK_M,), tl.float32)
                store_sums(row_partial + n, row_stride, row, n, -LARGEST, row_sum)
            else:
                row_shift = tl.load(row_partial + row)  # the same for a block of rows
                row_sum = load_part(row_partial + row_stride, row, n, BLOCK_M)
            if narrow & (high > shift + HEADROOM):
                col_sums = shifted(col_sums, shift - high)
                shift = high
            if narrow & (low > shift - MAX_SPREAD):
                # One exponential for both directions.
                e = tl.exp2(z * abs_scale2 - shift)
                col_sums += column_sums(e, BLOCK_M, BLOCK_N, ROW_WARPS)
                row_shift, row_sum = merge(row_shift, row_sum, shift, tl.sum(e, 1), 1.0)
            else:
                add_general_tile(
                    z, scratch, row_partial + n + row, row_stride, col_partial + m + col, col_stride, positive_z, ids,
                    row, col, distance, n, m, abs_scale2, BLOCK_M, BLOCK_N, IGNORES,
                )  # fmt: skip
            store_sums(row_partial, row_stride, row, n, row_shift, row_sum)
            # Other threads of this program may read what these have written.
            tl.debug_barrier()
        store_sums(col_partial, col_stride, col, m, shift, tl.sum(tl.sum(col_sums, 1), 0))
        if ranks is not None and ROW_WARPS:
            offs_n = col + tl.arange(0, BLOCK_N)
            tl.atomic_add(ranks[3] + offs_n, tl.sum(tl.sum(col_counts, 1), 0).to(tl.int32), mask=offs_n < m)


@triton.jit
def merged_sums(partial, offs, count, length, exponent_scale, BLOCK: tl.constexpr):  # [BLOCK], [BLOCK]
    """(shift, sum) of `count` programs' tiles of one kind, merged in their order."""
    inside = offs < length
    shift = tl.full((BLOCK,), -LARGEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    ptrs = partial + offs
    for _ in range(count):
        other_shift = tl.load(ptrs, mask=inside, other=-LARGEST)
        other_total = tl.load(ptrs + 2 * count.to(tl.int64) * length, mask=inside, other=0.0)
        shift, total = merge(shift, total, other_shift, other_total, exponent_scale)
        ptrs += 2 * length.to(tl.int64)
    return shift, total


@triton.jit
def as_logsumexp(shift, total, logit_of_shift):  # float64
    """In float64: a logsumexp near 100 that is rounded to float32 is wrong by 4e-6."""
    lse = logit_of_shift * shift.to(tl.float64) + tl.log2(total.to(tl.float64)) * LN_2
    return tl.where(total == 0, -INFINITY, lse)


@triton.jit
def merged_lse(partial, offs, count, length, scale, bias, BLOCK: tl.constexpr):  # [BLOCK], float64
    """The logsumexp of `count` programs' partial sums."""
    abs_scale2, _ = signed_scale(scale)
    logit_scale = tl.abs(scale).to(tl.float64)
    shift, total = merged_sums(partial, offs, count, length, 1.0, BLOCK)
    narrow = as_logsumexp(shift, total, logit_scale / abs_scale2.to(tl.float64))
    shift, total = merged_sums(partial + length, offs, count, length, abs_scale2, BLOCK)
    wide = as_logsumexp(shift, total, logit_scale)
    largest = tl.maximum(narrow, wide)
    largest = tl.where(tl.abs(largest) < INFINITY, largest, 0.0)
    return largest + tl.log2(tl.exp(narrow - largest) + tl.exp(wide - largest)) * LN_2 + bias.to(tl.float64)


@triton.jit(do_not_specialize=["n", "m", "diag_offset", "programs_m", "programs_n"])
def merge_kernel(
    row_partial,  # [2, programs_n, 2, n]
    col_partial,  # [2, programs_m, 2, m]
    positive_z,  # [n], with the scale's sign
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
        logit = z * tl.abs(scale).to(tl.float64) + bias.to(tl.float64)
        tl.store(positive + offs, tl.where(own, logit, 0.0), mask=offs < n)
    else:
        offs = (block - row_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        lse = merged_lse(col_partial, offs, programs_m, m, scale, bias, BLOCK)
        tl.store(col_lse + offs, lse, mask=offs < m)
