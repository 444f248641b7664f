"""What every kernel does with a tile: its product, its place in the matrix, shifts that stay finite."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)  # finite float32

SMALLEST_SCALE = tl.constexpr(1e-30)

# In log2 units: below it one shift serves a whole tile, for then the smallest exponential is a normal number.
MAX_SPREAD = tl.constexpr(100.0)
HEADROOM = tl.constexpr(20.0)  # how far above its shift a tile may reach before the shift moves up

STRIP = tl.constexpr(16)  # rows at a time of a tile that goes through memory

# What pairs with equal ids are, but for each row's own positive.
NO_IDS = tl.constexpr(0)
IGNORED = tl.constexpr(1)
POSITIVES = tl.constexpr(2)


@triton.jit
def multiply_add(a, b, c, PRECISION: tl.constexpr):
    """a b + c. PRECISION is what tl.dot knows, or "widened" for the interpreter, whose dot takes no bfloat16."""
    if PRECISION == "widened":
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        c = tl.dot(a, b, c, input_precision=PRECISION)
    return c


@triton.jit
def product(
    x,  # [n, d]: a pointer, or a tensor descriptor with USE_TMA
    y,  # [m, d]
    row,  # the tile's first row and column
    col,
    n,
    m,
    d,
    stride_xm,
    stride_xd,
    stride_yn,
    stride_yd,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,  # BLOCK_D divides d
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T on one tile, [BLOCK_M, BLOCK_N] in float32. What lies beyond n and m is arbitrary."""
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if USE_TMA:
        # Else there would be zeros once more, for a loop that never begins.
        tl.assume(d > 0)
        for k in range(0, d, BLOCK_D):
            x_tile = x.load([row, k])
            y_tile = y.load([col, k])
            z = multiply_add(x_tile, y_tile.T, z, PRECISION)
    else:
        # Offsets are 64-bit: n * d, or n times a stride, may exceed 2^31. Rows beyond the end read the last row.
        # Pointers to elements are made anew for each step, as pointers that are kept would fill the registers.
        offs_m = tl.minimum(row + tl.arange(0, BLOCK_M), n - 1).to(tl.int64)
        offs_n = tl.minimum(col + tl.arange(0, BLOCK_N), m - 1).to(tl.int64)
        x_rows = x + offs_m * stride_xm
        y_rows = y + offs_n * stride_yn
        for k in range(0, d, BLOCK_D):
            offs_d = k + tl.arange(0, BLOCK_D).to(tl.int64)
            x_ptrs = x_rows[:, None] + offs_d[None, :] * stride_xd
            y_ptrs = y_rows[:, None] + offs_d[None, :] * stride_yd
            if EVEN_D:
                x_tile = tl.load(x_ptrs)
                y_tile = tl.load(y_ptrs)
            else:
                inside = offs_d[None, :] < d
                x_tile = tl.load(x_ptrs, mask=inside, other=0.0)
                y_tile = tl.load(y_ptrs, mask=inside, other=0.0)
            z = multiply_add(x_tile, y_tile.T, z, PRECISION)
    return z


@triton.jit
def diagonal_distance(row, col, diag_offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The column, within the tile, of the positive of the tile's first row; -BLOCK_M or BLOCK_N if none is near."""
    distance = row.to(tl.int64) + diag_offset - col  # the sum may exceed 2^31
    return tl.minimum(tl.maximum(distance, -BLOCK_M), BLOCK_N).to(tl.int32)


@triton.jit
def is_plain(row, col, distance, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether all of the tile lies in the matrix and none of it is a positive, so that nothing needs a mask."""
    return (row + BLOCK_M <= n) & (col + BLOCK_N <= m) & ((distance <= -BLOCK_M) | (distance >= BLOCK_N))


@triton.jit
def holds_positives(distance, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return (distance > -BLOCK_M) & (distance < BLOCK_N)


@triton.jit
def is_positive(distance, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # [BLOCK_M, BLOCK_N]
    return tl.arange(0, BLOCK_N)[None, :] == tl.arange(0, BLOCK_M)[:, None] + distance


@triton.jit
def is_negative(row, col, distance, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # [BLOCK_M, BLOCK_N]
    inside = (row + tl.arange(0, BLOCK_M) < n)[:, None] & (col + tl.arange(0, BLOCK_N) < m)[None, :]
    return inside & (tl.arange(0, BLOCK_N)[None, :] != tl.arange(0, BLOCK_M)[:, None] + distance)


@triton.jit
def load_part(vector, first, length, BLOCK: tl.constexpr):  # [BLOCK]
    """A part of a vector; 0 beyond its end."""
    offs = first + tl.arange(0, BLOCK)
    return tl.load(vector + offs, mask=offs < length, other=0)


@triton.jit
def are_distinct(row_ids, col_ids):  # [BLOCK_M], [BLOCK_N]
    """Whether no two ids of a tile are equal. Beyond the matrix there may seem to be: such a tile is not plain."""
    return tl.min((row_ids[:, None] ^ col_ids[None, :]).to(tl.uint32, bitcast=True)) != 0


@triton.jit
def signed_scale(scale):
    """|scale| in log2 units, and whether products must change their sign to grow with the logits.

    0 becomes so small a number that exponentials are 1, while a masked product of -inf still gives 0.
    """
    abs_scale2 = tl.abs(scale * LOG2_E)
    return tl.where(abs_scale2 < SMALLEST_SCALE, SMALLEST_SCALE, abs_scale2), scale < 0


@triton.jit
def finite(shift):
    """A shift that makes no inf - inf of its own: an infinite product stays in the sum that is shifted."""
    return tl.minimum(tl.maximum(shift, -LARGEST), LARGEST)


@triton.jit
def shifted(total, exponent):
    """total * exp2(exponent). By two factors: it may be a normal number where exp2(exponent) is none and would be 0."""
    half = tl.exp2(0.5 * exponent)
    return total * half * half


@triton.jit
def merge(shift, total, other_shift, other_total, abs_scale2):
    """The sum of two sums total * exp2(shift * abs_scale2), as a pair (shift, total) again."""
    largest = tl.maximum(shift, other_shift)
    return largest, (
        shifted(total, (shift - largest) * abs_scale2) + shifted(other_total, (other_shift - largest) * abs_scale2)
    )


@triton.jit
def halves(t, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """The left and the right half of the columns. A thread of matrix instructions holds the same columns of both."""
    return tl.split(tl.permute(tl.reshape(t, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def store_tile(h_ptr, h, row, col, n, m, stride_hm, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm + offs_n[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=(offs_m < n)[:, None] & (offs_n < m)[None, :])


@triton.jit
def inner_product(g, z, row, col, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """sum_ij G_ij z_ij over what lies inside: the tile's part of dscale, up to the scale's sign.

    It is taken in float32 here, and not as <(H y)_i, x_i>, because H may be rounded to half precision.
    """
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    return tl.sum(tl.where((offs_m < n)[:, None] & (offs_n < m)[None, :], g * z, 0.0))
