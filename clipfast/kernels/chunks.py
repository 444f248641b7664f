"""dx and dy of an H that a kernel makes a chunk at a time: the vendor's products and what finishes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast import tuning
from clipfast.block import Block
from clipfast.kernels.operands import FUSED, VECTOR_BLOCK, Operands, blocks
from clipfast.kernels.vectors import finish_kernel

FINISH_ELEMENTS = 2048  # per program, at d up to 1024

# Makes H [rows, cols] of a chunk's rows and columns, if gradients are wanted, and whatever sums go with it.
Fill = Callable[[slice, slice, Tensor | None], None]


@dataclass(frozen=True)
class Products:
    """H y and H^T x, and the gradients that they become."""

    block: Block
    operands: Operands
    dtype: torch.dtype  # of dx and dy
    unit: Tensor | None  # [], of H

    def empty(self) -> tuple[Tensor, Tensor]:
        x, y = self.block.x, self.block.y
        return x.new_empty(x.shape, dtype=self.dtype), y.new_empty(y.shape, dtype=self.dtype)

    def buffer(self, shape: tuple[int, int]) -> Tensor:  # [rows, padded columns]
        """For a chunk of H, in the operands' dtype."""
        return self.operands.x.new_empty((shape[0], tuning.padded(shape[1])))

    def by_chunks(self, shape: tuple[int, int], h_buffer: Tensor, fill: Fill) -> tuple[Tensor, Tensor]:
        """A chunk of H at a time, in the buffer, and the vendor's product into float32 totals."""
        (n, d), m = self.block.x.shape, self.block.m
        x, y = self.operands.x, self.operands.y
        chunk_rows, chunk_cols = shape
        dx, dy = self.empty()
        # float32 gradients are their own totals.
        dy_total = dy if dy.dtype == torch.float32 else dy.new_empty((m, d), dtype=torch.float32)
        dx_total = dx if dx.dtype == torch.float32 else dx.new_empty((chunk_rows, d), dtype=torch.float32)

        @functools.cache
        def part_of_h(height: int, width: int) -> tuple[Tensor, Tensor]:
            h = h_buffer[:height, :width]
            return h, h.T

        col_parts = [(cols, y[cols], dy_total[cols]) for cols in slices(m, chunk_cols)]
        for rows in slices(n, chunk_rows):
            rows_total = dx_total[rows] if dx_total is dx else dx_total[: rows.stop - rows.start]
            x_rows = x[rows]
            for cols, y_rows, cols_total in col_parts:
                h, h_transposed = part_of_h(rows.stop - rows.start, cols.stop - cols.start)
                fill(rows, cols, h)
                _add_product(rows_total, h, y_rows, first=cols.start == 0)
                _add_product(cols_total, h_transposed, x_rows, first=rows.start == 0)
            self.finish_rows(rows_total, dx, rows.start)
        self.finish_cols(dy_total, dy)
        return dx, dy

    def finish_rows(self, total: Tensor, dx: Tensor, row_begin: int) -> None:
        _finish(total, self.block.x, dx, self.block.x_factor, self.block.scale, self.unit, row_begin)

    def finish_cols(self, total: Tensor, dy: Tensor) -> None:
        _finish(total, self.block.y, dy, self.block.y_factor, self.block.scale, self.unit, 0)


def without_products(n: int, m: int, shape: tuple[int, int], fill: Fill) -> None:
    """The same chunks for their sums alone."""
    for rows in slices(n, shape[0]):
        for cols in slices(m, shape[1]):
            fill(rows, cols, None)


def slices(length: int, step: int) -> Iterator[slice]:
    for begin in range(0, length, step):
        yield slice(begin, min(begin + step, length))


def _finish(
    total: Tensor,  # [rows, d]
    x: Tensor,  # [n, d]
    dx: Tensor,  # [n, d]
    factor: Tensor | None,  # [n]
    scale: Tensor,  # []
    unit: Tensor | None,  # []
    row_begin: int,
) -> None:
    count, d = total.shape
    block_d = min(1024, 1 << (d - 1).bit_length())
    block_m = VECTOR_BLOCK if tuning.describe(x.device).interpreted else FINISH_ELEMENTS // block_d
    finish_kernel[(blocks(count, block_m),)](
        *(total, x, dx, factor, scale, unit, count, row_begin, d, *x.stride()),
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        HAS_FACTORS=factor is not None,
        HAS_UNIT=unit is not None,
        **FUSED,
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b, accumulated in float32."""
    if not a.is_cuda:
        # PyTorch multiplies halves into float32 on GPUs alone; this is for the interpreter.
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif first:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
