"""Distillation: the student's logits under the teacher's softmaxes, and H = f_i g_j G_ij, in one pass over both.

With e_ij the student's exponential and t_ij the teacher's, each for the shift of its tile, and the shares of both
sides (see share_kernel), the teacher's part of G is t_ij (share_i + share_j), the student's the same of e, and a row's
cross is sum_j t_ij share_i L_ij, up to its weight: two exponentials for a pair, where the softmaxes by themselves take
four.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.gradient import CENTRE, WEIGHT, is_narrow, side, with_factors
from clipfast.kernels.statistics import column_sums
from clipfast.kernels.tiles import LOG2_E, NO_IDS, STRIP, halves, inner_product, product, signed_scale, store_tile

# What the kernel has of either model, beside its features and its factors, ([n], [m]) or None.
SCALE = tl.constexpr(0)  # []
BIAS = tl.constexpr(1)  # []
ROWS = tl.constexpr(2)  # [n, 4], see gradient.py
COLS = tl.constexpr(3)  # [m, 4]
SHARES = tl.constexpr(4)  # as gradient_kernel has them, but never in units of 1 / scale2
D = tl.constexpr(5)
STRIDES = tl.constexpr(6)  # four, of x and y

PART = tl.constexpr(8)  # columns at a time


@triton.jit
def model_product(
    x, y, of, row, col, n, m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The student's or the teacher's products, without factors."""
    return product(
        x, y, row, col, n, m, of[D], of[STRIDES], of[STRIDES + 1], of[STRIDES + 2], of[STRIDES + 3],
        BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, PRECISION,
    )  # fmt: skip


@triton.jit
def add_by_row(sums, u, v, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, ROW_WARPS: tl.constexpr):
    """sums + sum_j u_ij v_ij over the columns that one thread holds, [BLOCK_M, 4]; over all [BLOCK_M, 1] without
    ROW_WARPS. Each product is added by itself, in one instruction."""
    if ROW_WARPS == 0:
        sums += tl.sum(u * v, 1, keep_dims=True)
    elif WIDTH > 8:
        u, right_u = halves(u, BLOCK_M, WIDTH)
        v, right_v = halves(v, BLOCK_M, WIDTH)
        sums = add_by_row(sums, u, v, BLOCK_M, WIDTH // 2, ROW_WARPS)
        sums = add_by_row(sums, right_u, right_v, BLOCK_M, WIDTH // 2, ROW_WARPS)
    else:
        u, right_u = tl.split(tl.reshape(u, (BLOCK_M, 4, 2)))
        v, right_v = tl.split(tl.reshape(v, (BLOCK_M, 4, 2)))
        sums = sums + u * v + right_u * right_v
    return sums


@triton.jit
def add_by_col(sums, u, v, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, ROW_WARPS: tl.constexpr):
    """sums + sum_i u_ij v_ij, as column_sums has them: [ROW_WARPS, 8, WIDTH], [1, 1, WIDTH] without ROW_WARPS."""
    if ROW_WARPS == 0:
        sums += tl.reshape(tl.sum(u * v, 0), (1, 1, WIDTH))
    elif BLOCK_M > 16 * ROW_WARPS:
        u, low_u = tl.split(tl.permute(tl.reshape(u, (2, BLOCK_M // 2, WIDTH)), (1, 2, 0)))
        v, low_v = tl.split(tl.permute(tl.reshape(v, (2, BLOCK_M // 2, WIDTH)), (1, 2, 0)))
        sums = add_by_col(sums, u, v, BLOCK_M // 2, WIDTH, ROW_WARPS)
        sums = add_by_col(sums, low_u, low_v, BLOCK_M // 2, WIDTH, ROW_WARPS)
    else:
        u, low_u = tl.split(tl.permute(tl.reshape(u, (ROW_WARPS, 2, 8, WIDTH)), (0, 2, 3, 1)))
        v, low_v = tl.split(tl.permute(tl.reshape(v, (ROW_WARPS, 2, 8, WIDTH)), (0, 2, 3, 1)))
        sums = sums + u * v + low_u * low_v
    return sums


@triton.jit
def plain_part(
    z, t, sums, row_shares, row_factor, teacher_row_factor, col, student, teacher, factors, teacher_factors, scalars,
    h_ptr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, ROW_WARPS: tl.constexpr,
):  # fmt: skip
    """H of a part of a plain tile's columns, and what it adds to the sums.

    Args:
        sums: of the crosses by row and by column, and of G z by row.
        row_shares: of the student and of the teacher, [BLOCK_M, 1] each, as their factors are.
        scalars: (scale, bias, the teacher's scale), and of both models (shift, what brings the columns' shares to it).
    """
    row_cross, col_cross, sum_gz = sums
    scale, bias, teacher_scale = scalars[0]
    shift, to_cols = scalars[1]
    teacher_shift, teacher_to_cols = scalars[2]
    teacher_scale2 = teacher_scale * LOG2_E
    row_share, teacher_row_share = row_shares
    offs_n = col + tl.arange(0, WIDTH)
    if teacher_factors is not None:
        t = t * (teacher_row_factor * teacher_scale2) * tl.load(teacher_factors[1] + offs_n)[None, :]
        t = tl.exp2(t - teacher_shift)
    else:
        t = tl.exp2(t * teacher_scale2 - teacher_shift)
    if factors is not None:
        col_factor = tl.load(factors[1] + offs_n)[None, :]
        z = z * row_factor * col_factor
    # Not one product of both sums' terms, which may overflow: an exponential is as large as its share is small.
    by_row = t * teacher_row_share
    by_col = t * (tl.load(teacher[SHARES][2] + offs_n) * teacher_to_cols)[None, :]
    logits = z * scale + bias
    row_cross = add_by_row(row_cross, by_row, logits, BLOCK_M, WIDTH, ROW_WARPS)
    col_cross = add_by_col(col_cross, by_col, logits, BLOCK_M, WIDTH, ROW_WARPS)
    g = t
    if h_ptr is not None:
        share = row_share + (tl.load(student[SHARES][2] + offs_n) * to_cols)[None, :]
        g = tl.exp2(z * (scale * LOG2_E) - shift) * share - (by_row + by_col)
        sum_gz = add_by_row(sum_gz, g, z, BLOCK_M, WIDTH, ROW_WARPS)
        if factors is not None:
            g = g * row_factor * col_factor
        g = g.to(h_ptr.dtype.element_ty)
    return g, (row_cross, col_cross, sum_gz)


@triton.jit
def plain_parts(
    z, t, sums, row_shares, row_factor, teacher_row_factor, col, student, teacher, factors, teacher_factors, scalars,
    h_ptr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, ROW_WARPS: tl.constexpr,
):  # fmt: skip
    """plain_part, one narrow part of the columns after the other, so that fewer registers are held."""
    if ROW_WARPS == 0 or WIDTH <= PART:
        h, sums = plain_part(
            z, t, sums, row_shares, row_factor, teacher_row_factor, col, student, teacher, factors, teacher_factors,
            scalars, h_ptr, BLOCK_M, WIDTH, ROW_WARPS,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = WIDTH // 2
        z, right_z = halves(z, BLOCK_M, WIDTH)
        t, right_t = halves(t, BLOCK_M, WIDTH)
        cols, right_cols = tl.split(tl.permute(tl.reshape(sums[1], (ROW_WARPS, 8, 2, HALF)), (0, 1, 3, 2)))
        h, sums = plain_parts(
            z, t, (sums[0], cols, sums[2]), row_shares, row_factor, teacher_row_factor, col, student, teacher,
            factors, teacher_factors, scalars, h_ptr, BLOCK_M, HALF, ROW_WARPS,
        )  # fmt: skip
        cols = sums[1]
        right_h, sums = plain_parts(
            right_z, right_t, (sums[0], right_cols, sums[2]), row_shares, row_factor, teacher_row_factor, col + HALF,
            student, teacher, factors, teacher_factors, scalars, h_ptr, BLOCK_M, HALF, ROW_WARPS,
        )  # fmt: skip
        cols = tl.reshape(tl.permute(tl.join(cols, sums[1]), (0, 1, 3, 2)), (ROW_WARPS, 8, WIDTH))
        sums = sums[0], cols, sums[2]
        if h_ptr is not None:
            h = tl.reshape(tl.permute(tl.join(h, right_h), (0, 2, 1)), (BLOCK_M, WIDTH))
    return h, sums


@triton.jit
def of_rows(vector, row, BLOCK_M: tl.constexpr):  # [BLOCK_M, 1]
    """A part of a vector, of a tile that has no edge."""
    return tl.load(vector + row + tl.arange(0, BLOCK_M))[:, None]


@triton.jit
def by_row(z, of, row, n, abs_scale2, BLOCK_M: tl.constexpr):
    """weight_i exp(L_ij - lse_i), of z with the scale's sign."""
    offs_m = row + tl.arange(0, BLOCK_M)
    centre = side(of[ROWS], CENTRE, offs_m, n, NO_IDS)
    return side(of[ROWS], WEIGHT, offs_m, n, NO_IDS)[:, None] * tl.exp2((z - centre[:, None]) * abs_scale2)


@triton.jit
def by_col(z, of, col, m, abs_scale2, BLOCK_N: tl.constexpr):
    offs_n = col + tl.arange(0, BLOCK_N)
    centre = side(of[COLS], CENTRE, offs_n, m, NO_IDS)
    return side(of[COLS], WEIGHT, offs_n, m, NO_IDS)[None, :] * tl.exp2((z - centre[None, :]) * abs_scale2)


@triton.jit
def load_strip(scratch, of, factors, row, col, begin, n, m, negated, STRIP_ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of a tile from memory, with factors and the scale's sign."""
    offs = begin + tl.arange(0, STRIP_ROWS)
    z = tl.load(scratch + offs[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :])
    if factors is not None:
        z = with_factors(z, of[ROWS], of[COLS], row + begin, col, n, m, STRIP_ROWS, BLOCK_N, NO_IDS)
    if negated:
        z = -z
    return z


@triton.jit
def general_tile(
    z,  # [BLOCK_M, BLOCK_N], without factors
    t,
    student,
    teacher,
    factors,
    teacher_factors,
    scratch,  # [2, BLOCK_M, BLOCK_N]
    h_ptr,
    row_ptr,  # the rows' crosses
    col_ptr,  # the columns', added to
    row,
    col,
    n,
    m,
    stride_hm,
    dscale_ptr,  # of this program, added to
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GRADIENTS: tl.constexpr,
):
    """A tile that has an edge or a wide range, each softmax by itself: through memory, as in gradient.py."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    scratch += tl.program_id(0).to(tl.int64) * 2 * BLOCK_M * BLOCK_N
    of_teacher = scratch + BLOCK_M * BLOCK_N
    tl.store(scratch + offs_m[:, None] * BLOCK_N + offs_n[None, :], z)
    tl.store(of_teacher + offs_m[:, None] * BLOCK_N + offs_n[None, :], t)
    tl.debug_barrier()
    scale, bias = tl.load(student[SCALE]), tl.load(student[BIAS])
    abs_scale2, negated = signed_scale(scale)
    teacher_scale2, teacher_negated = signed_scale(tl.load(teacher[SCALE]))
    col_cross = tl.zeros((BLOCK_N,), tl.float32)
    dscale = tl.zeros((), tl.float32)
    for begin in tl.range(0, BLOCK_M, STRIP, num_stages=1):
        offs = begin + tl.arange(0, STRIP)
        inside = (row + offs < n)[:, None] & (col + offs_n < m)[None, :]
        strip = load_strip(scratch, student, factors, row, col, begin, n, m, negated, STRIP, BLOCK_N)
        t_strip = load_strip(
            of_teacher, teacher, teacher_factors, row, col, begin, n, m, teacher_negated, STRIP, BLOCK_N
        )
        logits = strip * tl.abs(scale) + bias
        e = tl.where(inside, by_row(t_strip, teacher, row + begin, n, teacher_scale2, STRIP), 0.0)
        tl.store(row_ptr + offs, tl.sum(tl.where(inside, e * logits, 0.0), 1), mask=row + offs < n)
        g = -e
        e = tl.where(inside, by_col(t_strip, teacher, col, m, teacher_scale2, BLOCK_N), 0.0)
        col_cross += tl.sum(tl.where(inside, e * logits, 0.0), 0)
        if GRADIENTS:
            g = by_row(strip, student, row + begin, n, abs_scale2, STRIP) + (g - e)
            g = tl.where(inside, g + by_col(strip, student, col, m, abs_scale2, BLOCK_N), 0.0)
            dscale += inner_product(g, strip, row + begin, col, n, m, STRIP, BLOCK_N)
            if factors is not None:
                g = with_factors(g, student[ROWS], student[COLS], row + begin, col, n, m, STRIP, BLOCK_N, NO_IDS)
            store_tile(h_ptr, g, row + begin, col, n, m, stride_hm, STRIP, BLOCK_N)
    # No other program adds there.
    tl.atomic_add(col_ptr + offs_n, col_cross, mask=col + offs_n < m)
    if GRADIENTS:
        tl.atomic_add(dscale_ptr, tl.where(negated, -dscale, dscale).to(tl.float64))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "m", "row_begin", "col_begin", "programs_m", "programs_n"])
def distillation_kernel(
    x,  # [n, d]: a pointer, or a tensor descriptor with USE_TMA
    y,  # [m, d]
    teacher_x,
    teacher_y,
    student,  # (scale, bias, rows, cols, shares, d, strides), see above
    teacher,  # the same
    factors,  # ([n], [m]), or None
    teacher_factors,
    h,  # with GRADIENTS, of the chunk, as gradient_kernel has it
    h_ptr,
    row_cross,  # [blocks of the chunk's columns, chunk rows]
    col_cross,  # [programs_m, chunk columns]
    dscale_ptr,  # [programs], float64: each program adds its part, with GRADIENTS
    scratch,  # [programs, 2, BLOCK_M, BLOCK_N]
    n,  # of the chunk's end
    m,
    row_begin,  # multiples of the blocks
    col_begin,
    stride_hm,
    programs_m,
    programs_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,  # BLOCK_D divides both d
    USE_TMA: tl.constexpr,
    GRADIENTS: tl.constexpr,
    ROW_WARPS: tl.constexpr,  # see column_sums
    PRECISION: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr,
):
    """A chunk of both models' features. The programs share its tiles as those of statistics_kernel do, so that the
    columns' sums stay in registers; whoever finds a general tile adds its part of them where it writes its own."""
    program_m, program_n = tl.program_id(0) // programs_n, tl.program_id(0) % programs_n
    first_m, first_n = row_begin // BLOCK_M, col_begin // BLOCK_N
    row_begin, col_begin = first_m * BLOCK_M, first_n * BLOCK_N
    if GRADIENTS:
        dscale_ptr += tl.program_id(0)
        h_ptr -= row_begin.to(tl.int64) * stride_hm + col_begin
    SUMS: tl.constexpr = (ROW_WARPS if ROW_WARPS else 1, 8 if ROW_WARPS else 1, 4 if ROW_WARPS else 1)
    dscale_sums = tl.zeros(SUMS, tl.float64)
    for block_n in range(first_n + program_n, tl.cdiv(m, BLOCK_N), programs_n):
        col = block_n * BLOCK_N
        offs_n = col + tl.arange(0, BLOCK_N)
        col_ptr = col_cross + program_m * (m - col_begin) - col_begin
        tl.store(col_ptr + offs_n, tl.zeros((BLOCK_N,), tl.float32), mask=offs_n < m)
        tl.debug_barrier()
        col_sums = tl.zeros((ROW_WARPS if ROW_WARPS else 1, 8 if ROW_WARPS else 1, BLOCK_N), tl.float32)
        for block_m in range(first_m + program_m, tl.cdiv(n, BLOCK_M), programs_m):
            row = block_m * BLOCK_M
            t = model_product(
                teacher_x, teacher_y, teacher, row, col, n, m,
                BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, TEACHER_PRECISION,
            )  # fmt: skip
            z = model_product(
                x, y, student, row, col, n, m, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, USE_TMA, PRECISION
            )  # fmt: skip
            row_ptr = row_cross + (block_n - first_n).to(tl.int64) * (n - row_begin) + (row - row_begin)
            narrow, shift, to_rows, to_cols = is_narrow(student[SHARES], block_m, block_n)
            t_narrow, t_shift, t_to_rows, t_to_cols = is_narrow(teacher[SHARES], block_m, block_n)
            if (row + BLOCK_M <= n) & (col + BLOCK_N <= m) & narrow & t_narrow:
                row_shares = (
                    of_rows(student[SHARES][0], row, BLOCK_M) * to_rows,
                    of_rows(teacher[SHARES][0], row, BLOCK_M) * t_to_rows,
                )
                row_factor = None if factors is None else of_rows(factors[0], row, BLOCK_M)
                t_row_factor = None if teacher_factors is None else of_rows(teacher_factors[0], row, BLOCK_M)
                # Loaded for each tile: what is kept over the products takes registers from them.
                scalars = tl.load(student[SCALE]), tl.load(student[BIAS]), tl.load(teacher[SCALE])
                scalars = scalars, (shift, to_cols), (t_shift, t_to_cols)
                zeros = tl.zeros((BLOCK_M, 4 if ROW_WARPS else 1), tl.float32)
                g, sums = plain_parts(
                    z, t, (zeros, col_sums, zeros), row_shares, row_factor, t_row_factor, col, student, teacher,
                    factors, teacher_factors, scalars, h_ptr, BLOCK_M, BLOCK_N, ROW_WARPS,
                )  # fmt: skip
                tl.store(row_ptr + tl.arange(0, BLOCK_M), tl.sum(sums[0], 1))
                col_sums = sums[1]
                if GRADIENTS:
                    dscale_sums += column_sums(sums[2], BLOCK_M, zeros.shape[1], ROW_WARPS).to(tl.float64)
                    if USE_TMA:
                        # In halves, which take half the shared memory.
                        left, right = halves(g, BLOCK_M, BLOCK_N)
                        h.store([row - row_begin, col - col_begin], left)
                        h.store([row - row_begin, col - col_begin + BLOCK_N // 2], right)
                    else:
                        h_ptrs = h_ptr + row.to(tl.int64) * stride_hm + tl.arange(0, BLOCK_M)[:, None] * stride_hm
                        tl.store(h_ptrs + offs_n[None, :], g)
            else:
                general_tile(
                    z, t, student, teacher, factors, teacher_factors, scratch, h_ptr, row_ptr, col_ptr + col,
                    row, col, n, m, stride_hm, dscale_ptr, BLOCK_M, BLOCK_N, GRADIENTS,
                )  # fmt: skip
        tl.atomic_add(col_ptr + offs_n, tl.sum(tl.sum(col_sums, 1), 0), mask=offs_n < m)
    if GRADIENTS:
        tl.atomic_add(dscale_ptr, tl.sum(tl.sum(tl.sum(dscale_sums, 2), 1), 0))
