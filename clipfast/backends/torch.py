"""Plain PyTorch on any device: row chunks of logits under a byte budget, recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from clipfast.block import Block, DistillationPass, Gradients, Matches, SigmoidPass, Statistics, Weights
from clipfast.problem import (
    DISTILLATION,
    HALF_DTYPES,
    IDS,
    SIGMOID,
    Problem,
    accumulation_dtype,
    kept_dtype,
    positive_rows,
    round_statistics,
    statistics_dtype,
)
from clipfast.products import returns_sums, summed

NAME = "torch"

CHUNK_BYTES = 16 << 20  # of logits; about two such chunks are alive at a time

SOFTPLUS_THRESHOLD = 40.0  # beyond it log(1 + e^z) is z in float64, too

FLOAT16_UNIT = 2.0**-14  # a sigmoid in this unit stays clear of float16's subnormal numbers


def unsupported_reasons(problem: Problem) -> tuple[str, ...]:
    return ()


def reasons_against_auto(problem: Problem) -> tuple[str, ...]:
    return ()


def folds_norms(dtype: torch.dtype) -> bool:
    return False


def workspace_bytes(problem: Problem) -> int:
    itemsize = accumulation_dtype(problem.dtype).itemsize
    rows = min(problem.n, _chunk_rows(problem.m, itemsize))
    copies = 4 if DISTILLATION in problem.needs else 2
    masks = 2 * (IDS in problem.needs)  # bytes for a logit
    converted = itemsize if _operand_dtype(problem) != problem.dtype else 0
    # The columns' totals of a half-precision gradient, and what a chunk adds to its rows, twice.
    formed = {SIGMOID, DISTILLATION} & problem.needs
    totals = problem.m if (kept_dtype(problem.dtype) if formed else problem.dtype) in HALF_DTYPES else 0
    gradients = (totals + 2 * rows) * problem.d * itemsize
    towers = 2 if DISTILLATION in problem.needs else 1
    operands = towers * (problem.m + rows) * problem.d * converted
    return rows * problem.m * (copies * itemsize + masks) + operands + gradients + 24 * (problem.n + problem.m)


def kept_size(n: int, m: int) -> int:
    """How many numbers of the accumulation dtype the kept logits of an [n, m] block take."""
    return n * m


def forward(block: Block, matches: Matches | None = None) -> Statistics:
    block = _with_operands(block)
    space = _Space(block, block.scale.new_empty(kept_size(block.n, block.m)) if block.keep else None)
    statistics = statistics_dtype(block.x.device)
    row_lse = block.scale.new_empty(block.n, dtype=statistics)
    positive = block.scale.new_zeros(block.n, dtype=statistics)
    # The columns' running sum of exp(L - shift).
    col_shift = block.scale.new_full((block.m,), torch.finfo(block.scale.dtype).min)
    col_sum = block.scale.new_zeros(block.m)
    row_above, col_above = (block.x.new_zeros(size, dtype=torch.int32) for size in (block.n, block.m))
    for part, rows in _chunks(block):
        logits, same, other = space.logits(part, rows), _same(rows), space.second[: rows.n]
        own, diagonal = _positives(logits, rows.diag_offset)
        positive[part][own] = diagonal.to(statistics)
        if matches is not None:
            _count_above(logits, same, rows.diag_offset, matches, part, row_above, col_above)
        diagonal.fill_(-torch.inf)
        if same is not None and block.ignores:
            logits.masked_fill_(same, -torch.inf)
        row_shift = _finite(logits.amax(dim=1))
        row_sum = torch.sub(logits, row_shift[:, None], out=other).exp_().sum(dim=1)
        row_lse[part] = row_shift.to(statistics) + row_sum.to(statistics).log()
        shift = torch.maximum(col_shift, _finite(logits.amax(dim=0)))
        col_sum = col_sum * (col_shift - shift).exp_() + torch.sub(logits, shift, out=other).exp_().sum(dim=0)
        col_shift = shift
    col_lse = col_shift.to(statistics) + col_sum.to(statistics).log()
    if matches is None:
        return Statistics(row_lse, col_lse, positive, kept=space.kept)
    return Statistics(row_lse, col_lse, positive, row_above, col_above, space.kept)


def matches(block: Block) -> Matches:
    """In the logits' own unit, by the products of `forward`: one of another shape may round otherwise."""
    block = _with_operands(block)
    rows_best = block.scale.new_full((block.n,), -torch.inf)
    cols_best = block.scale.new_full((block.m,), -torch.inf)
    for part, rows in _chunks(block):
        logits, same = _logits(rows), _same(rows)
        others = torch.ones_like(logits, dtype=torch.bool) if same is None else ~same
        _, diagonal = _positives(others, rows.diag_offset)
        diagonal.fill_(False)
        logits.masked_fill_(others, -torch.inf)
        rows_best[part] = logits.amax(dim=1)
        cols_best = torch.maximum(cols_best, logits.amax(dim=0))
    dtype = statistics_dtype(block.x.device)
    return Matches(rows_best.to(dtype), cols_best.to(dtype))


def backward(block: Block, weights: Weights, dtype: torch.dtype) -> Gradients:
    block, accumulator = _with_operands(block), block.scale.dtype
    space = _Space(block, weights.kept)
    # G is kept near 1 by taking its largest weight out: in half precision P/n would underflow (design: float16).
    unit = _largest(
        accumulator,
        weights.row_weight,
        weights.col_weight,
        weights.positive_weight,
        weights.row_target,
        weights.col_target,
    )
    row_lse, row_weight = round_statistics(weights.row_lse, weights.row_weight / unit, accumulator)
    col_lse, col_weight = round_statistics(weights.col_lse, weights.col_weight / unit, accumulator)
    positive_weight = (weights.positive_weight / unit).to(accumulator)
    row_target, col_target = (
        None if w is None else (w / unit).to(accumulator) for w in (weights.row_target, weights.col_target)
    )
    sums = _GradientSums(block, dtype, unit)
    for part, rows in _chunks(block):
        logits, same = space.taken_up(part, rows), _same(rows)
        other, g = space.first[: rows.n], space.second[: rows.n]
        torch.sub(logits, row_lse[part, None], out=g).exp_().mul_(row_weight[part, None])
        g.addcmul_(torch.sub(logits, col_lse, out=other).exp_(), col_weight)
        if same is not None and block.ignores:
            g.masked_fill_(same, 0)
        elif same is not None and row_target is not None and col_target is not None:
            torch.add(row_target[part, None], col_target, out=other)
            g += other.masked_fill_(same.logical_not_(), 0)
        own, diagonal = _positives(g, rows.diag_offset)
        diagonal.copy_(positive_weight[part][own])
        sums.add(part, g)
        del same  # or the next chunk's would stand beside it
    del space, logits, other, g, diagonal  # before dy is rounded
    return sums.gradients()


def sigmoid(block: Block, unit: float, gradients: bool, dtype: torch.dtype) -> SigmoidPass:
    block = _with_operands(block)
    # Without gradients nothing is multiplied; in float16 a small sigmoid keeps its digits in a small unit.
    in_unit = FLOAT16_UNIT if block.y.dtype == torch.float16 else 1.0
    row_loss = block.scale.new_empty(block.n, dtype=statistics_dtype(block.x.device))
    dbias = block.scale.new_zeros((), dtype=row_loss.dtype)
    sums = _GradientSums(block, dtype, block.scale.new_full((), unit * in_unit)) if gradients else None
    for part, rows in _chunks(block):
        logits, same = _logits(rows), _same(rows)
        # As if every pair were a negative: the positives' logits change their sign, and their part of G after that.
        sign = None if same is None or block.ignores else same.to(torch.int8).mul_(-2).add_(1)
        _positives(logits, rows.diag_offset)[1].neg_()
        if sign is not None:
            logits.mul_(sign)
        elif same is not None:
            logits.masked_fill_(same, -torch.inf)
        row_loss[part] = softplus(logits, threshold=SOFTPLUS_THRESHOLD).sum(dim=1)
        if sums is None:
            continue
        g = logits.sigmoid_()
        _positives(g, rows.diag_offset)[1].neg_()
        if sign is not None:
            g.mul_(sign)
        dbias += g.sum()
        sums.add(part, g.div_(in_unit))
        del logits, same, sign, g  # as in backward
    if sums is None:
        return SigmoidPass(row_loss, None, None)
    return SigmoidPass(row_loss, sums.gradients(), dbias * unit)


def distillation(
    block: Block, weights: Weights, teacher: Block, teacher_weights: Weights, gradients: bool, dtype: torch.dtype
) -> DistillationPass:
    block, teacher = _with_operands(block), _with_operands(teacher)
    statistics = statistics_dtype(block.x.device)
    row_cross = block.scale.new_empty(block.n, dtype=statistics)
    col_cross = block.scale.new_zeros(block.m, dtype=statistics)
    unit = _largest(block.scale.dtype, weights.row_weight, weights.col_weight)
    (row_lse, row_weight), (col_lse, col_weight), (t_row_lse, t_row_weight), (t_col_lse, t_col_weight) = (
        round_statistics(lse, weight / unit, block.scale.dtype)
        for of in (weights, teacher_weights)
        for lse, weight in ((of.row_lse, of.row_weight), (of.col_lse, of.col_weight))
    )
    sums = _GradientSums(block, dtype, unit) if gradients else None
    for part, rows in _chunks(block):
        logits, of_teacher = _logits(rows), _logits(teacher.rows(part))
        by_teacher = _exponentials(of_teacher, t_row_lse[part, None], t_row_weight[part, None])
        row_cross[part] = (by_teacher * logits).sum(dim=1)
        if sums is not None:
            g = _exponentials(logits, row_lse[part, None], row_weight[part, None]).sub_(by_teacher)
        by_teacher = of_teacher.sub_(t_col_lse).exp_().mul_(t_col_weight)
        col_cross += (by_teacher * logits).sum(dim=0)
        if sums is not None:
            sums.add(part, g.sub_(by_teacher).add_(logits.sub_(col_lse).exp_().mul_(col_weight)))
            del g
        del logits, of_teacher, by_teacher
    row_cross, col_cross = (
        torch.where(weight == 0, 0, cross * unit / weight)
        for cross, weight in ((row_cross, teacher_weights.row_weight), (col_cross, teacher_weights.col_weight))
    )
    return DistillationPass(
        row_cross,
        col_cross,
        None if sums is None else sums.gradients(),
    )


def _largest(dtype: torch.dtype, *weights: Tensor | None) -> Tensor:  # []
    """The largest finite |weight|, or the smallest normal number of `dtype` where all are below it."""
    largest = torch.cat([w.abs() for w in weights if w is not None])
    largest = torch.where(largest.isfinite(), largest, 0).amax()
    return largest.clamp(min=torch.finfo(dtype).tiny).to(dtype)


class _GradientSums:
    """dx, dy and dscale of the chunks of G, in units of `unit`, that are added one after the other."""

    def __init__(self, block: Block, dtype: torch.dtype, unit: Tensor) -> None:
        self.block, self.dtype, self.unit = block, dtype, unit
        self.dx = block.x.new_empty(block.x.shape, dtype=dtype)
        self.dy = block.scale.new_zeros(block.y.shape)
        self.row_dot = block.scale.new_empty(block.n)

    def add(self, part: slice, g: Tensor) -> None:  # [rows, m]
        x, y, scale = self.block.x[part], self.block.y, self.block.scale
        g = g.to(y.dtype)
        g_y = summed(g, y)
        self.row_dot[part] = (g_y * x).sum(dim=1)
        self.dx[part] = g_y.mul_(scale * self.unit)
        del g_y
        if y.dtype == self.dy.dtype:
            self.dy.addmm_(g.T, x.to(y.dtype))
        else:
            self.dy += summed(g.T, x)

    def gradients(self) -> Gradients:
        dy = self.dy.mul_(self.block.scale * self.unit).to(self.dtype)
        return Gradients(self.dx, dy, self.row_dot.sum() * self.unit)


class _Space:
    """Memory for a chunk's logits and for what is made of them, which all chunks share; kept logits have their own."""

    def __init__(self, block: Block, kept: Tensor | None) -> None:
        self.kept, self.all = kept, None if kept is None else kept.view(block.n, block.m)
        shape = min(block.n, _chunk_rows(block.m, block.scale.dtype.itemsize)), block.m
        # Where the logits are being kept, the first is theirs.
        self.first, self.second = block.scale.new_empty(0 if block.keep else shape), block.scale.new_empty(shape)

    def logits(self, part: slice, rows: Block) -> Tensor:  # [rows, m]
        """The logits of these rows, to be kept if any are."""
        return _logits(rows, self.first[: rows.n] if self.all is None else self.all[part])

    def taken_up(self, part: slice, rows: Block) -> Tensor:  # [rows, m]
        """The logits of these rows, which may have been kept."""
        return self.logits(part, rows) if self.all is None else self.all[part]


def _with_operands(block: Block) -> Block:
    """The block with y as the products take it; the rows of x follow a chunk at a time."""
    return block._replace(y=block.y.to(_operand_dtype(block.y)))


def _chunks(block: Block) -> Iterator[tuple[slice, Block]]:
    """Rows, and the block of them."""
    step = _chunk_rows(block.m, block.scale.dtype.itemsize)
    for begin in range(0, block.n, step):
        part = slice(begin, min(begin + step, block.n))
        yield part, block.rows(part)


def _logits(rows: Block, out: Tensor | None = None) -> Tensor:  # [rows, m]
    x = rows.x.to(rows.y.dtype)
    product = torch.mm(x, rows.y.T, out=out) if x.dtype == rows.scale.dtype else summed(x, rows.y.T)
    logits = torch.mul(product, rows.scale, out=product if out is None else out)
    return logits if rows.bias is None else logits.add_(rows.bias)


def _same(rows: Block) -> Tensor | None:  # [rows, m]
    """Pairs off the diagonal with equal ids."""
    if rows.row_ids is None or rows.col_ids is None:
        return None
    same = rows.row_ids[:, None] == rows.col_ids
    _, diagonal = _positives(same, rows.diag_offset)
    diagonal.fill_(False)
    return same


def _count_above(
    logits: Tensor,  # [rows, m]
    same: Tensor | None,  # [rows, m]
    diag_offset: int,
    matches: Matches,
    part: slice,
    row_above: Tensor,  # [n], int32
    col_above: Tensor,  # [m], int32
) -> None:
    """Count the negatives that are not below their row's and their column's match."""
    for match, dim in ((matches.rows[part, None], 1), (matches.cols, 0)):
        above = (logits < match.to(logits.dtype)).logical_not_()
        _, diagonal = _positives(above, diag_offset)
        diagonal.fill_(False)
        if same is not None:
            above &= ~same
        count = above.sum(dim=dim, dtype=torch.int32)
        if dim == 1:
            row_above[part] = count
        else:
            col_above += count


def _exponentials(logits: Tensor, lse: Tensor, weight: Tensor) -> Tensor:
    return torch.sub(logits, lse).exp_().mul_(weight)


def _operand_dtype(inputs: Tensor | Problem) -> torch.dtype:
    """Of the products: half as it is where a product of halves can return float32.

    Rounded to half, the logits would be wrong, and a gradient's product would cost dscale its digits.
    """
    return inputs.dtype if returns_sums(inputs.device) else accumulation_dtype(inputs.dtype)


def _finite(shift: Tensor) -> Tensor:
    """A shift that makes no inf - inf of its own: the infinity stays in the sum that is shifted."""
    largest = torch.finfo(shift.dtype).max
    return shift.clamp(-largest, largest)


def _positives(block: Tensor, diag_offset: int) -> tuple[slice, Tensor]:
    """The rows of the block that hold their positive, and a view of those positives."""
    rows, cols = block.shape
    first, last = positive_rows(rows, cols, diag_offset)
    return slice(first, last), block[first:last, first + diag_offset :].diagonal()


def _chunk_rows(m: int, itemsize: int) -> int:
    return max(1, CHUNK_BYTES // (m * itemsize))
