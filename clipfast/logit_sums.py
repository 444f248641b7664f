"""Sums of logits over rows, columns and groups of ids: they need sums of features alone, O((n + m) d).

What is linear in the logits comes from here: the mean logit of smoothed labels, and the positives that share an id.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clipfast.block import Block, Gradients
from clipfast.problem import accumulation_dtype, positive_rows, statistics_dtype


class Sums(NamedTuple):
    """Counts and sums of one side's logits, per row; float64 where the device has it. Blocks merge by adding."""

    same_count: Tensor  # [n], pairs that are `same`
    same_sum: Tensor  # [n]
    all_count: Tensor  # [n], pairs of which the mean logit is taken: all, or all but the ignored ones
    all_sum: Tensor  # [n]


def logit_sums(block: Block) -> tuple[Sums, Sums]:
    """Of the block's rows and of its columns. The block has no factors."""
    side = _Side.of(block)
    return side.sums(block), side.swapped().sums(block)


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
        n, m = self.x.shape[0], self.y.shape[0]
        if self.row_ids is None or self.col_ids is None:
            return values.new_zeros((n, *values.shape[1:]))
        groups = values.new_zeros((n + m, *values.shape[1:]))
        if values.is_cuda:
            groups.index_put_(
                (self.col_ids.long(),), values, accumulate=True
            )  # sorts; index_add_ would be in any order
        else:
            groups.index_add_(0, self.col_ids, values)
        total = groups[self.row_ids]
        first, last = positive_rows(n, m, self.diag_offset)
        own_values = values[first + self.diag_offset : last + self.diag_offset]
        own_ids = self.col_ids[first + self.diag_offset : last + self.diag_offset] == self.row_ids[first:last]
        shape = (-1, *[1] * (values.ndim - 1))
        total[first:last] -= torch.where(own_ids.reshape(shape), own_values, 0)
        return total

    def same_count(self) -> Tensor:  # [n]
        return self.same(self.y.new_ones(self.y.shape[0], dtype=statistics_dtype(self.y.device)))

    def sums(self, block: Block) -> Sums:
        same_count = self.same_count()
        same_y, all_y = self.same(self.y), self.y.sum(dim=0)
        same_sum = self._logits(block, same_y, same_count)
        all_count = torch.full_like(same_count, self.y.shape[0])
        if self.ignores:
            all_count, all_y = all_count - same_count, all_y - same_y
        return Sums(same_count, same_sum, all_count, self._logits(block, all_y, all_count))

    def _logits(self, block: Block, y: Tensor, count: Tensor) -> Tensor:  # [n, d] or [d], [n] -> [n]
        return (
            block.scale.to(count.dtype) * (self.x * y).sum(dim=1, dtype=count.dtype)
            + block.bias.to(count.dtype) * count
        )

    def constant_gradient(self, row_constant: Tensor, col_constant: Tensor) -> Tensor:  # [n], [m] -> [n, d]
        row_constant, col_constant = (c.to(self.x.dtype)[:, None] for c in (row_constant, col_constant))
        weighted = col_constant * self.y
        all_y, all_weighted = self.y.sum(dim=0), weighted.sum(dim=0)
        if self.ignores:
            return row_constant * (all_y - self.same(self.y)) + (all_weighted - self.same(weighted))
        return row_constant * all_y + all_weighted
