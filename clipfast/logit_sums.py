"""Sums of logits over rows, columns and groups of ids: they need sums of features alone, O((n + m) d).

What is linear in the logits comes from here: the mean logit of smoothed labels, and the positives that share an id.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipfast.block import Block, Gradients
from clipfast.problem import accumulation_dtype, positive_rows, statistics_dtype

ROWS = 512  # of one step


class Sums(NamedTuple):
    """Counts and sums of one side's logits, per row; float64 where the device has it. Blocks merge by adding."""

    same_count: Tensor  # [n], pairs that are `same`
    same_sum: Tensor  # [n]
    all_count: Tensor  # [n], pairs of which the mean logit is taken: all, or all but the ignored ones
    all_sum: Tensor  # [n]


def logit_sums(block: Block, smoothed: bool) -> tuple[Sums, Sums]:
    """Of the block's rows and of its columns. The block has no factors. Sums that the loss does not take are 0."""
    side = _Side.of(block)
    return side.sums(block, smoothed), side.swapped().sums(block, smoothed)


def same_counts(block: Block) -> tuple[Tensor, Tensor]:  # [n], [m]
    """How many pairs of each row and column are `same`."""
    side = _Side.of(block)
    return side.same_count(), side.swapped().same_count()


def add_constants(
    block: Block,
    row_constant: Tensor,  # [n]
    col_constant: Tensor,  # [m]
    gradients: Gradients,  # in the accumulation dtype
) -> Gradients:
    """Add what G gets from G_ij += row_constant_i + col_constant_j at all pairs that are not ignored."""
    side = _Side.of(block)
    by_rows = side.constant_gradient(row_constant, col_constant)
    by_cols = side.swapped().constant_gradient(col_constant, row_constant)
    dscale = (by_rows * side.x).sum()
    return Gradients(
        gradients.dx.add_(block.scale * by_rows), gradients.dy.add_(block.scale * by_cols), gradients.dscale + dscale
    )


class _Side(NamedTuple):
    """Rows against columns; swapped, columns against rows."""

    x: Tensor  # [n, d], accumulation dtype
    y: Tensor  # [m, d]
    row_ids: Tensor | None  # [n]
    col_ids: Tensor | None  # [m]
    diag_offset: int
    ignores: bool

    @classmethod
    def of(cls, block: Block) -> _Side:
        dtype = accumulation_dtype(block.x.dtype)
        ids = block.row_ids, block.col_ids
        return cls(block.x.to(dtype), block.y.to(dtype), *ids, block.diag_offset, block.ignores)

    def swapped(self) -> _Side:
        return _Side(self.y, self.x, self.col_ids, self.row_ids, -self.diag_offset, self.ignores)

    def same(self, values: Tensor) -> Tensor:  # [m, ...] -> [n, ...]
        """The sum of the values of the columns that are `same` as each row."""
        return self._of_rows(self._groups(values), values, slice(0, self.x.shape[0]))

    def _groups(self, values: Tensor) -> Tensor:  # [m, ...] -> [number of ids, ...]
        """The sum of the values of all columns of an id."""
        if self.row_ids is None or self.col_ids is None:
            return values[:0]
        groups = values.new_zeros((self.x.shape[0] + self.y.shape[0], *values.shape[1:]))
        if values.is_cuda:
            # It sorts; index_add_ would be in any order.
            groups.index_put_((self.col_ids.long(),), values, accumulate=True)
        else:
            groups.index_add_(0, self.col_ids, values)
        return groups

    def _of_rows(self, groups: Tensor, values: Tensor, part: slice) -> Tensor:  # [rows, ...]
        """Some rows of `same`: their id's sum without what their positive has in it."""
        if self.row_ids is None or self.col_ids is None:
            return values.new_zeros((part.stop - part.start, *values.shape[1:]))
        total = groups[self.row_ids[part]]
        first, last = positive_rows(self.x.shape[0], self.y.shape[0], self.diag_offset)
        first = max(first, part.start)
        last = max(first, min(last, part.stop))
        own = slice(first + self.diag_offset, last + self.diag_offset)
        own_ids = self.col_ids[own] == self.row_ids[first:last]
        shape = (-1, *[1] * (values.ndim - 1))
        total[first - part.start : last - part.start] -= torch.where(own_ids.reshape(shape), values[own], 0)
        return total

    def same_count(self) -> Tensor:  # [n]
        return self.same(self.y.new_ones(self.y.shape[0], dtype=statistics_dtype(self.y.device)))

    def sums(self, block: Block, smoothed: bool) -> Sums:
        n, m = self.x.shape[0], self.y.shape[0]
        same_count = self.same_count()
        all_count = torch.full_like(same_count, m)
        all_count = all_count - same_count if self.ignores else all_count
        same_sum, all_sum = torch.zeros_like(same_count), torch.zeros_like(same_count)
        groups, every_y = self._groups(self.y), self.y.sum(dim=0)
        for begin in range(0, n, ROWS):  # their temporaries stay in the cache
            part = slice(begin, min(begin + ROWS, n))
            x, same_y = self.x[part], self._of_rows(groups, self.y, part)
            if block.adds_positives:
                same_sum[part] = self._logits(block, x, same_y, same_count[part])
            if smoothed:
                all_y = every_y - same_y if self.ignores else every_y
                all_sum[part] = self._logits(block, x, all_y, all_count[part])
        return Sums(same_count, same_sum, all_count, all_sum)

    def _logits(self, block: Block, x: Tensor, y: Tensor, count: Tensor) -> Tensor:  # [n, d], [n, d] or [d], [n] -> [n]
        sums = block.scale.to(count.dtype) * (x * y).sum(dim=1, dtype=count.dtype)
        return sums if block.bias is None else sums + block.bias.to(count.dtype) * count

    def constant_gradient(self, row_constant: Tensor, col_constant: Tensor) -> Tensor:  # [n], [m] -> [n, d]
        row_constant, col_constant = (c.to(self.x.dtype)[:, None] for c in (row_constant, col_constant))
        weighted = col_constant * self.y
        all_y, all_weighted = self.y.sum(dim=0), weighted.sum(dim=0)
        if self.ignores:
            return row_constant * (all_y - self.same(self.y)) + (all_weighted - self.same(weighted))
        return row_constant * all_y + all_weighted
