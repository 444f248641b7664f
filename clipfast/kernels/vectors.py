"""What surrounds the products in the backward pass, in O((n + m) d): the vectors that G needs, and dx from H y."""

from __future__ import annotations

import triton
import triton.language as tl

from clipfast.kernels.tiles import INFINITY, LARGEST, SMALLEST_SCALE, signed_scale

# float16 has no range to spare: G, at most 2 in units of its largest weight, is stored times this. See unit_kernel.
AMPLIFIER = tl.constexpr(16384.0)

SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)  # float32

# In log2 units: from a tile's shift to the largest of its exponentials and to the smallest of its shares.
NARROW_RANGE = tl.constexpr(120.0)
LARGEST_SHARE = tl.constexpr(2.0**100)

# The factor of a row whose norm was raised to 1e-12; it does not depend on the row.
CLAMPED_FACTOR = tl.constexpr(0.999999e12)


@triton.jit
def largest_weight(weights, length, BLOCK: tl.constexpr):
    """The largest finite |weight|."""
    largest = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, length, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        weight = tl.abs(tl.load(weights + offs, mask=offs < length, other=0.0))
        largest = tl.maximum(largest, tl.where(weight < INFINITY, weight, 0.0))
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["n", "m"])
def unit_kernel(
    row_weight,  # [n], float64
    col_weight,  # [m], float64
    positive_weight,  # [n], float64
    targets,  # ([n], [m]), float64, or None
    unit_ptr,  # [], float32
    n,
    m,
    BLOCK: tl.constexpr,
):
    """The unit that G is kept in for float16: in units of its largest weight, a uniform softmax over 65536 columns is
    1.5e-5 instead of 1e-10, and times AMPLIFIER it is far from float16's subnormal numbers. One program."""
    largest = tl.maximum(largest_weight(row_weight, n, BLOCK), largest_weight(positive_weight, n, BLOCK))
    largest = tl.maximum(largest, largest_weight(col_weight, m, BLOCK))
    if targets is not None:
        largest = tl.maximum(largest, largest_weight(targets[0], n, BLOCK))
        largest = tl.maximum(largest, largest_weight(targets[1], m, BLOCK))
    tl.store(unit_ptr, tl.maximum(largest / AMPLIFIER, SMALLEST_NORMAL).to(tl.float32))


@triton.jit
def centre_and_weight(lse, weight, scale, bias):
    """c and w' with w' exp2((z - c) scale2) = w exp(L - lse), up to one rounding of c; everything is float64 here.

    c may be any number near (lse - bias) / scale: w' makes up for what is missing. It has the scale's sign, as z has.
    """
    # What signed_scale takes for 0 is 0 here, too: a centre of (lse - bias) / scale would overflow.
    no_scale = tl.abs(scale) < SMALLEST_SCALE
    centre = tl.where(no_scale, 0.0, (lse - bias) / scale)
    centre = tl.minimum(tl.maximum(centre, -LARGEST), LARGEST).to(tl.float32)
    # NaN for an infinite lse, as the softmaxes of an infinite logit are.
    gap = centre.to(tl.float64) * scale + bias - lse + (lse - lse)
    # Beyond any rounding of a meaningful logit it is float64's own rounding of a huge one.
    limit = tl.where(no_scale, INFINITY, 64.0)
    gap = tl.where((tl.abs(gap) > limit) & (tl.abs(centre) < LARGEST), 0.0, gap)
    return tl.where(scale < 0, -centre, centre), tl.where(weight == 0, 0.0, weight * tl.exp(gap))


@triton.jit
def prepare_side(
    lse_ptr, weight_ptr, positive_ptr, factor_ptr, out, offs, length, own, scale, bias, unit,
    HAS_FACTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    inside = offs < length
    lse = tl.load(lse_ptr + offs, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0)
    # Where the weight is 0 an infinite centre makes every exponential 0, so that an infinite logit does no harm.
    zero = weight == 0
    centre, weight = centre_and_weight(lse, weight / unit, scale, bias)
    centre, weight = tl.where(zero, INFINITY, centre), weight.to(tl.float32)
    positive = tl.load(positive_ptr, mask=own, other=0.0) / unit
    factor = tl.full(offs.shape, 1.0, tl.float32)
    if HAS_FACTORS:
        factor = tl.load(factor_ptr + offs, mask=inside, other=0.0)
    out += offs * WIDTH
    tl.store(out, centre, mask=inside)
    tl.store(out + 1, weight, mask=inside)
    tl.store(out + 2, positive.to(tl.float32), mask=inside)
    tl.store(out + 3, factor, mask=inside)


@triton.jit
def prepare_ids(ids, targets, out, offs, length, unit, WHICH: tl.constexpr, WIDTH: tl.constexpr):
    inside = offs < length
    target = tl.full(offs.shape, 0.0, tl.float64)
    if targets is not None:
        target = tl.load(targets[WHICH] + offs, mask=inside, other=0.0) / unit
    out += offs * WIDTH
    tl.store(out + 4, target.to(tl.float32), mask=inside)
    tl.store(out + 5, tl.load(ids[WHICH] + offs, mask=inside, other=0).to(tl.float32, bitcast=True), mask=inside)


@triton.jit(do_not_specialize=["n", "m", "diag_offset"])
def prepare_kernel(
    row_lse,  # [n], float64
    col_lse,  # [m], float64
    row_weight,  # [n], float64
    col_weight,  # [m], float64
    positive_weight,  # [n], float64
    x_factor,  # [n], float32, with HAS_FACTORS
    y_factor,  # [m], float32
    ids,  # ([n], [m]), int32, or None
    targets,  # ([n], [m]), float64, or None
    scale_ptr,  # []
    bias_ptr,  # []
    unit_ptr,  # [], with HAS_UNIT
    rows,  # [n, WIDTH]
    cols,  # [m, WIDTH]
    n,
    m,
    diag_offset,
    HAS_FACTORS: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    WIDTH: tl.constexpr,  # 4; 6 with ids
    BLOCK: tl.constexpr,
):
    """Both sides' vectors for G (see gradient.py). The first programs take rows, the others columns."""
    scale, bias = tl.load(scale_ptr).to(tl.float64), tl.load(bias_ptr).to(tl.float64)
    unit = tl.full((), 1.0, tl.float64)
    if HAS_UNIT:
        unit = tl.load(unit_ptr).to(tl.float64)
    n, m = n.to(tl.int64), m.to(tl.int64)
    row_blocks = tl.cdiv(n, BLOCK)
    block = tl.program_id(0).to(tl.int64)
    if block < row_blocks:
        offs = block * BLOCK + tl.arange(0, BLOCK)
        own = (offs < n) & (offs + diag_offset >= 0) & (offs + diag_offset < m)
        positive_ptr = positive_weight + offs
        prepare_side(
            row_lse, row_weight, positive_ptr, x_factor, rows, offs, n, own, scale, bias, unit, HAS_FACTORS, WIDTH
        )
        if ids is not None:
            prepare_ids(ids, targets, rows, offs, n, unit, 0, WIDTH)
    else:
        offs = (block - row_blocks) * BLOCK + tl.arange(0, BLOCK)
        own = (offs < m) & (offs - diag_offset >= 0) & (offs - diag_offset < n)
        positive_ptr = positive_weight + offs - diag_offset
        prepare_side(
            col_lse, col_weight, positive_ptr, y_factor, cols, offs, m, own, scale, bias, unit, HAS_FACTORS, WIDTH
        )
        if ids is not None:
            prepare_ids(ids, targets, cols, offs, m, unit, 1, WIDTH)


@triton.jit
def share_side(lse_ptr, weight_ptr, share_ptr, shift_ptr, block, length, scale, bias, unit, BLOCK: tl.constexpr,
               HAS_FACTORS: tl.constexpr):  # fmt: skip
    """One block of a side; see share_kernel."""
    offs = block * BLOCK + tl.arange(0, BLOCK)
    inside = offs < length
    lse = tl.load(lse_ptr + offs, mask=inside, other=0.0)
    centre, weight = centre_and_weight(lse, tl.load(weight_ptr + offs, mask=inside, other=0.0) / unit, scale, bias)
    abs_scale2, negated = signed_scale(scale.to(tl.float32))
    centre = centre.to(tl.float64) * abs_scale2.to(tl.float64)
    bound = (tl.abs(lse) < INFINITY) & (tl.abs(centre) < LARGEST)
    top = tl.max(tl.where(inside & bound, centre, -LARGEST), 0)
    bottom = tl.min(tl.where(inside & bound, centre, LARGEST), 0)
    shift = tl.minimum(tl.maximum(top - NARROW_RANGE / 2, 0.0), bottom).to(tl.float32)
    share = weight * tl.exp2(shift.to(tl.float64) - centre)
    if HAS_FACTORS:
        share /= tl.where(negated, -abs_scale2, abs_scale2).to(tl.float64)
    size = tl.abs(share)
    smallest = tl.min(tl.where(size > 0, size, 1.0), 0)
    least = tl.maximum(top, shift.to(tl.float64) - tl.log2(smallest)) - NARROW_RANGE
    # One that is not bound, or not finite, leaves the block to the tiles that take each row and column by itself.
    good = bound & (size < tl.where(tl.abs(scale) < SMALLEST_SCALE, 0.0, LARGEST_SHARE))
    least = tl.where(tl.max((inside & (good == 0)).to(tl.int32), 0) == 0, least, INFINITY)
    tl.store(share_ptr + offs, tl.where(good, share, 0.0).to(tl.float32), mask=inside)
    tl.store(shift_ptr + 2 * block, shift)
    tl.store(shift_ptr + 2 * block + 1, least.to(tl.float32))


@triton.jit(do_not_specialize=["n", "m"])
def share_kernel(
    lse,  # ([n], [m]), float64
    weight,  # ([n], [m]), float64
    shares,  # ([n], [blocks of n, 2], [m], [blocks of m, 2])
    scale_ptr,  # []
    bias_ptr,  # []
    unit_ptr,  # [], with HAS_UNIT
    n,
    m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_UNIT: tl.constexpr,
):
    """What a tile of negatives needs for both exponentials in one, decided per block before any product is formed.

    In log2 units a negative is at most its row's and its column's centre c, as a logsumexp is at least each of its
    terms. So with a shift K that lies below all centres of a block of rows and of a block of columns, but by no more
    than NARROW_RANGE, exp2(z - K) does not overflow, and where it underflows so does every exp2(z - c), to less than
    2^-126. G is exp2(z - K) (share_i + share_j) with shares w' exp2(K - c), which must be normal numbers, too.

    A block has its own K, the nearest to 0 where z itself loses least, and the least that will do, infinite if none
    does; a tile takes the smaller K of its two blocks. With factors, shares are in units of 1 / scale2: see
    gradient_kernel. The first programs take rows, the others columns.
    """
    scale, bias = tl.load(scale_ptr).to(tl.float64), tl.load(bias_ptr).to(tl.float64)
    unit = tl.full((), 1.0, tl.float64)
    if HAS_UNIT:
        unit = tl.load(unit_ptr).to(tl.float64)
    row_blocks = tl.cdiv(n, BLOCK_M)
    block = tl.program_id(0)
    if block < row_blocks:
        share_side(lse[0], weight[0], shares[0], shares[1], block, n, scale, bias, unit, BLOCK_M, HAS_FACTORS)
    else:
        share_side(
            lse[1], weight[1], shares[2], shares[3], block - row_blocks, m, scale, bias, unit, BLOCK_N, HAS_FACTORS
        )


@triton.jit(do_not_specialize=["count", "row_begin"])
def finish_kernel(
    total,  # H y of `count` rows from row_begin on, [count, d], float32
    x,  # [n, d]
    dx,  # [n, d]; may be where total is
    factor_ptr,  # [n], with HAS_FACTORS
    scale_ptr,  # []
    unit_ptr,  # [], with HAS_UNIT
    count,
    row_begin,
    d,
    stride_xm,
    stride_xd,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_UNIT: tl.constexpr,
):
    """dx = u - <u, x> f^2 x with u = scale H y: the second term, with factors f = 1 / |x|, is their derivative."""
    local = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = local < count
    rows = row_begin + local
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    total_ptrs = total + local[:, None] * d + offs_d[None, :]
    dx_ptrs = dx + rows[:, None] * d + offs_d[None, :]
    x_ptrs = x + rows[:, None] * stride_xm + offs_d[None, :] * stride_xd
    step = tl.full((), BLOCK_D, tl.int64)
    unit = tl.full((), 1.0, tl.float32)
    if HAS_UNIT:
        unit = tl.load(unit_ptr)
    along = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_FACTORS:
        for k in range(0, d, BLOCK_D):
            inside = in_m[:, None] & (offs_d < d - k)[None, :]
            x_tile = tl.load(x_ptrs + (k // BLOCK_D) * step * stride_xd, mask=inside, other=0.0).to(tl.float32)
            along += tl.sum(tl.load(total_ptrs + k, mask=inside, other=0.0) * x_tile, 1)
        factor = tl.load(factor_ptr + rows, mask=in_m, other=0.0)
        along = tl.where(factor < CLAMPED_FACTOR, along * factor * factor, 0.0)
    scale = tl.load(scale_ptr)
    for k in range(0, d, BLOCK_D):
        inside = in_m[:, None] & (offs_d < d - k)[None, :]
        value = tl.load(total_ptrs + k, mask=inside, other=0.0)
        if HAS_FACTORS:
            x_tile = tl.load(x_ptrs + (k // BLOCK_D) * step * stride_xd, mask=inside, other=0.0).to(tl.float32)
            value -= along[:, None] * x_tile
        value = value * unit * scale
        tl.store(dx_ptrs + k, value.to(dx.dtype.element_ty), mask=inside)
