"""The largest logit among each row's and each column's positives, of those tiles alone that hold some."""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.tiles import (
    STRIP,
    are_distinct,
    diagonal_distance,
    holds_positives,
    is_positive,
    load_part,
    product,
    signed_scale,
)

# float32 in the order of integers, where a NaN comes after +inf: the maximum of integers is the same in any order.
SIGN_BIT = tl.constexpr(0x7FFFFFFF)  # all but it
NAN_KEY = tl.constexpr(0x7FC00000)
NO_KEY = tl.constexpr(-2139095041)  # of -inf


@triton.jit
def ordered(z):
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(z == z, tl.where(bits < 0, bits ^ SIGN_BIT, bits), NAN_KEY)


@triton.jit
def keep_matches(
    z,  # [BLOCK_M, BLOCK_N], with the scale's sign
    scratch,  # [BLOCK_M, BLOCK_N]
    ids,  # ([n], [m]), or None
    row_keys,  # [n]
    col_keys,  # [m]
    row,
    col,
    distance,
    n,
    m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The tile's part of both sides' largest. It goes through memory, as in statistics.py."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tl.store(scratch + offs_m[:, None] * BLOCK_N + offs_n[None, :], z)
    tl.debug_barrier()
    in_m = col + offs_n < m
    by_col = tl.full((BLOCK_N,), NO_KEY, tl.int32)
    for begin in tl.range(0, BLOCK_M, STRIP, num_stages=1):
        offs = begin + tl.arange(0, STRIP)
        strip = tl.load(scratch + offs[:, None] * BLOCK_N + offs_n[None, :])
        own = is_positive(distance + begin, STRIP, BLOCK_N)
        if ids is not None:
            row_ids, col_ids = load_part(ids[0], row + begin, n, STRIP), load_part(ids[1], col, m, BLOCK_N)
            own = own | (row_ids[:, None] == col_ids[None, :])
        in_n = row + offs < n
        keys = tl.where(own & in_n[:, None] & in_m[None, :], ordered(strip), NO_KEY)
        tl.atomic_max(row_keys + row + offs, tl.max(keys, 1), mask=in_n)
        by_col = tl.maximum(by_col, tl.max(keys, 0))
    tl.atomic_max(col_keys + col + offs_n, by_col, mask=in_m)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "m", "diag_offset", "programs_n"])
def matches_kernel(
    x,  # [n, d]: a pointer, or a tensor descriptor with USE_TMA
    y,  # [m, d]
    scale_ptr,  # []
    x_factor,  # [n], or None
    y_factor,  # [m]
    ids,  # ([n], [m]), int32, or None
    row_keys,  # [n], int32; NO_KEY at first
    col_keys,  # [m]
    scratch,  # [programs, BLOCK_M * BLOCK_N]
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
    PRECISION: tl.constexpr,
):
    """Matches, in products that have the scale's sign, formed as statistics_kernel forms them."""
    programs_m = tl.num_programs(0) // programs_n
    _, negated = signed_scale(tl.load(scale_ptr))
    scratch += tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N)
    for block_m in range(tl.program_id(0) // programs_n, tl.cdiv(n, BLOCK_M), programs_m):
        row = block_m * BLOCK_M
        for block_n in range(tl.program_id(0) % programs_n, tl.cdiv(m, BLOCK_N), programs_n):
            col = block_n * BLOCK_N
            distance = diagonal_distance(row, col, diag_offset, BLOCK_M, BLOCK_N)
            needed = holds_positives(distance, BLOCK_M, BLOCK_N)
            if ids is not None:
                distinct = are_distinct(load_part(ids[0], row, n, BLOCK_M), load_part(ids[1], col, m, BLOCK_N))
                needed = needed | (distinct == 0)
            if needed:
                z = product(
                    x, y, row, col, n, m, d, stride_xm, stride_xd, stride_yn, stride_yd,
                    BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
                )  # fmt: skip
                if x_factor is not None:
                    z *= load_part(x_factor, row, n, BLOCK_M)[:, None]
                    z *= load_part(y_factor, col, m, BLOCK_N)[None, :]
                if negated:
                    z = -z
                keep_matches(
                    z, scratch, ids, row_keys, col_keys, row, col, distance, n, m, BLOCK_M, BLOCK_N
                )  # fmt: skip
