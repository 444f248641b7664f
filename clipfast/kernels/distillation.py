"""Distillation: the student's logits under the teacher's softmaxes, and H = f_i g_j G_ij, in one pass over both.

Weights and logsumexps come as in gradient.py, once of the student and once of the teacher. With e the teacher's
weighted exponentials, a row's cross is sum_j e_ij L_ij, up to its weight; G_ij is the student's weighted exponentials
without the teacher's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.gradient import CENTRE, WEIGHT, side, with_factors
from clipfast.kernels.tiles import NO_IDS, inner_product, product, signed_scale, store_tile


@triton.jit
def signed_product(
    of,  # see distillation_kernel
    row,
    col,
    n,
    m,
    negated,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # [BLOCK_M, BLOCK_N]
    """The student's or the teacher's products, with factors and the scale's sign."""
    z = product(
        of[0], of[1], row, col, n, m, of[6], of[7], of[8], of[9], of[10],
        BLOCK_M, BLOCK_N, BLOCK_D, False, False, PRECISION,
    )  # fmt: skip
    z = with_factors(z, of[4], of[5], row, col, n, m, BLOCK_M, BLOCK_N, NO_IDS)
    if negated:
        z = -z
    return z


@triton.jit
def by_row(z, of, row, n, abs_scale2, BLOCK_M: tl.constexpr):
    """weight_i exp(L_ij - lse_i)."""
    offs_m = row + tl.arange(0, BLOCK_M)
    centre = side(of[4], CENTRE, offs_m, n, NO_IDS)
    return side(of[4], WEIGHT, offs_m, n, NO_IDS)[:, None] * tl.exp2((z - centre[:, None]) * abs_scale2)


@triton.jit
def by_col(z, of, col, m, abs_scale2, BLOCK_N: tl.constexpr):
    offs_n = col + tl.arange(0, BLOCK_N)
    centre = side(of[5], CENTRE, offs_n, m, NO_IDS)
    return side(of[5], WEIGHT, offs_n, m, NO_IDS)[None, :] * tl.exp2((z - centre[None, :]) * abs_scale2)


@triton.jit(do_not_specialize=["n", "m"])
def distillation_kernel(
    student,  # (x [n, d], y [m, d], scale [], bias [], rows [n, 4], cols [m, 4], d, four strides)
    teacher,  # the same
    h_ptr,  # [n, m], with GRADIENTS
    row_cross,  # [blocks of columns, n]
    col_cross,  # [blocks of rows, m]
    dscale_ptr,  # [programs], float64: each program adds its part, with GRADIENTS
    n,
    m,
    stride_hm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GRADIENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
):
    """A chunk of rows and columns, as in gradient_kernel."""
    scale = tl.load(student[2])
    abs_scale2, negated = signed_scale(scale)
    teacher_scale2, teacher_negated = signed_scale(tl.load(teacher[2]))
    bias = tl.load(student[3])
    blocks_m = tl.cdiv(n, BLOCK_M)
    dscale = tl.zeros((), tl.float64)
    for tile in range(tl.program_id(0), blocks_m * tl.cdiv(m, BLOCK_N), tl.num_programs(0)):
        block_m, block_n = tile % blocks_m, tile // blocks_m
        row, col = block_m * BLOCK_M, block_n * BLOCK_N
        offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        inside = (offs_m < n)[:, None] & (offs_n < m)[None, :]
        t = signed_product(teacher, row, col, n, m, teacher_negated, BLOCK_M, BLOCK_N, BLOCK_D, TEACHER_PRECISION)
        z = signed_product(student, row, col, n, m, negated, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
        logits = z * tl.abs(scale) + bias
        e = tl.where(inside, by_row(t, teacher, row, n, teacher_scale2, BLOCK_M), 0.0)
        row_part = tl.sum(tl.where(inside, e * logits, 0.0), 1)
        tl.store(row_cross + block_n.to(tl.int64) * n + offs_m, row_part, mask=offs_m < n)
        g = -e
        e = tl.where(inside, by_col(t, teacher, col, m, teacher_scale2, BLOCK_N), 0.0)
        col_part = tl.sum(tl.where(inside, e * logits, 0.0), 0)
        tl.store(col_cross + block_m.to(tl.int64) * m + offs_n, col_part, mask=offs_n < m)
        if GRADIENTS:
            g = by_row(z, student, row, n, abs_scale2, BLOCK_M) + (g - e)
            g = tl.where(inside, g + by_col(z, student, col, m, abs_scale2, BLOCK_N), 0.0)
            dscale += inner_product(g, z, row, col, n, m, BLOCK_M, BLOCK_N).to(tl.float64)
            h = with_factors(g, student[4], student[5], row, col, n, m, BLOCK_M, BLOCK_N, NO_IDS)
            store_tile(h_ptr, h, row, col, n, m, stride_hm, BLOCK_M, BLOCK_N)
    if GRADIENTS:
        if negated:
            dscale = -dscale
        dscale_ptr += tl.program_id(0)
        tl.store(dscale_ptr, tl.load(dscale_ptr) + dscale)
