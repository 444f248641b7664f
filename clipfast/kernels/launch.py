"""The host side of the kernels: buffers, grids and the order of launches. Nothing here waits for the device.

Workspace is what `tuning` says: partial statistics for a fixed number of programs, and H one chunk at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast import tuning
from clipfast.block import Block, Gradients, Statistics, Weights
from clipfast.kernels.gradient import accumulate_kernel, gradient_kernel
from clipfast.kernels.statistics import merge_kernel, statistics_kernel
from clipfast.kernels.vectors import finish_kernel, prepare_kernel, unit_kernel
from clipfast.tuning import Config

VECTOR_BLOCK = 256  # rows per program of the O(n) kernels
UNIT_BLOCK = 1024
FINISH_ELEMENTS = 2048  # per program, at d up to 1024


def forward(block: Block, *, config: Config | None = None, precision: str | None = None) -> Statistics:
    """The contract's forward. `config` and `precision` override what `tuning` chooses."""
    x, y, scale, bias, x_factor, y_factor = (
        block.x, block.y, block.scale, block.bias, block.x_factor, block.y_factor
    )  # fmt: skip
    n, m = len(x), len(y)
    diag_offset = min(max(block.diag_offset, -n), m)
    operands = Operands.of(x, y, precision)
    device = tuning.describe(x.device)
    config = config or operands.choose("statistics")
    programs_m, programs_n = tuning.program_grid(n, m, config, device.processors)
    row_partial = x.new_empty((2, programs_n, n), dtype=torch.float32)
    col_partial = x.new_empty((2, programs_m, 2, m), dtype=torch.float32)
    scratch = x.new_empty((programs_m * programs_n, config.tile_scratch), dtype=torch.float32)
    positive_z = x.new_empty(n, dtype=torch.float32)
    row_lse, col_lse, positive = (x.new_empty(k, dtype=torch.float64) for k in (n, m, n))
    with _on(x.device):
        statistics_kernel[(programs_m * programs_n,)](
            *operands.tiles(config),
            scale,
            x_factor,
            y_factor,
            row_partial,
            col_partial,
            scratch,
            positive_z,
            n,
            m,
            x.shape[1],
            diag_offset,
            *operands.strides,
            programs_n,
            **operands.options(config),
            USE_TMA=config.tma,
            HAS_FACTORS=x_factor is not None,
        )
        merge_kernel[(_blocks(n, VECTOR_BLOCK) + _blocks(m, VECTOR_BLOCK),)](
            *(row_partial, col_partial, positive_z, scale, bias, row_lse, col_lse, positive),
            *(n, m, diag_offset, programs_m, programs_n),
            BLOCK=VECTOR_BLOCK,
        )
    return Statistics(row_lse, col_lse, positive)


def backward(
    block: Block,
    weights: Weights,
    *,
    config: Config | None = None,
    precision: str | None = None,
    strategy: str = tuning.STRATEGY,
    workspace: int = tuning.WORKSPACE_BYTES,
) -> Gradients:
    """The contract's backward, in the block's dtype, by one of tuning.STRATEGIES.

    H takes at most `workspace` bytes or its smallest chunk.
    """
    if strategy not in tuning.STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}; accepted are {', '.join(map(repr, tuning.STRATEGIES))}")
    x, y, scale, bias, x_factor, y_factor = (
        block.x, block.y, block.scale, block.bias, block.x_factor, block.y_factor
    )  # fmt: skip
    row_lse, row_weight, col_lse, col_weight, positive_weight, *_ = weights
    n, m = len(x), len(y)
    diag_offset = min(max(block.diag_offset, -n), m)
    with _on(x.device):
        unit = _unit(row_weight, col_weight, positive_weight) if x.dtype == torch.float16 else None
        rows, cols = (scale.new_empty((length, 4)) for length in (n, m))
        prepare_kernel[(_blocks(n, VECTOR_BLOCK) + _blocks(m, VECTOR_BLOCK),)](
            *(v.contiguous() for v in (row_lse, col_lse, row_weight, col_weight, positive_weight)),
            *(x_factor, y_factor, scale, bias, unit, rows, cols, n, m, diag_offset),
            HAS_FACTORS=x_factor is not None,
            HAS_UNIT=unit is not None,
            BLOCK=VECTOR_BLOCK,
        )
        pass_ = Pass(x, y, scale, rows, cols, diag_offset, x_factor, y_factor, unit, Operands.of(x, y, precision))
        if strategy == "chunks":
            dx, dy, dscale = pass_.by_chunks(config, workspace)
        else:
            dx, dy, dscale = pass_.in_registers(config)
        return Gradients(dx, dy, (dscale if unit is None else dscale * unit).to(scale.dtype))


@dataclass(frozen=True)
class Operands:
    """x and y as the product takes them."""

    x: Tensor  # [n, d]
    y: Tensor  # [m, d]
    precision: str

    @classmethod
    def of(cls, x: Tensor, y: Tensor, precision: str | None) -> Operands:
        if x.dtype == torch.float32:
            precision = precision or tuning.float32_product(tuning.describe(x.device))
            if precision == "bf16":
                return cls(x.bfloat16(), y.bfloat16(), "ieee")
        elif tuning.describe(x.device).interpreted:
            precision = "widened"
        return cls(x, y, precision or "ieee")

    @property
    def strides(self) -> tuple[int, ...]:
        return *self.x.stride(), *self.y.stride()

    def choose(self, kernel: str) -> Config:
        aligned_rows = all(_has_aligned_rows(t) for t in (self.x, self.y))
        device, itemsize, d = tuning.describe(self.x.device), self.x.dtype.itemsize, self.x.shape[1]
        return tuning.choose(kernel, device, itemsize, d, aligned_rows).config

    def tiles(self, config: Config) -> tuple[Any, Any]:
        if not config.tma:
            return self.x, self.y
        return tuple(
            TensorDescriptor(t, list(t.shape), list(t.stride()), [block, config.block_d])
            for t, block in ((self.x, config.block_m), (self.y, config.block_n))
        )

    def options(self, config: Config) -> dict[str, Any]:
        return {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "EVEN_D": self.x.shape[1] % config.block_d == 0,
            "PRECISION": self.precision,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def swapped(self) -> Operands:
        return Operands(self.y, self.x, self.precision)


@dataclass(frozen=True)
class Pass:
    """One backward pass: what both strategies need."""

    x: Tensor  # [n, d]
    y: Tensor  # [m, d]
    scale: Tensor  # []
    rows: Tensor  # [n, 4]
    cols: Tensor  # [m, 4]
    diag_offset: int
    x_factor: Tensor | None
    y_factor: Tensor | None
    unit: Tensor | None  # []
    operands: Operands

    def by_chunks(self, config: Config | None, workspace: int) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk of H at a time in the operands' dtype, and the vendor's product into float32 totals."""
        n, m, d = len(self.x), len(self.y), self.x.shape[1]
        x, y = self.operands.x, self.operands.y
        config = config or self.operands.choose("gradient")
        chunk_rows, chunk_cols = tuning.chunk_shape(n, m, x.dtype.itemsize, workspace)
        h_buffer = x.new_empty((chunk_rows, tuning.padded(chunk_cols)))
        dx, dy = self.x.new_empty((n, d)), self.y.new_empty((m, d))
        programs = tuning.persistent_programs(chunk_rows, chunk_cols, config, tuning.describe(x.device).processors)
        dscale = x.new_zeros(programs, dtype=torch.float64)
        scratch = x.new_empty((programs, config.tile_scratch), dtype=torch.float32)
        # float32 gradients are their own totals.
        dy_total = dy if dy.dtype == torch.float32 else dy.new_empty((m, d), dtype=torch.float32)
        dx_total = dx if dx.dtype == torch.float32 else dx.new_empty((chunk_rows, d), dtype=torch.float32)
        for rows in _chunks(n, chunk_rows):
            rows_total = dx_total[rows] if dx_total is dx else dx_total[: rows.stop - rows.start]
            for cols in _chunks(m, chunk_cols):
                h = h_buffer[: rows.stop - rows.start, : cols.stop - cols.start]
                self._gradient(config, rows, cols, h, dscale, scratch)
                _add_product(rows_total, h, y[cols], first=cols.start == 0)
                _add_product(dy_total[cols], h.T, x[rows], first=rows.start == 0)
            self._finish_rows(rows_total, dx, rows.start)
        self._finish_cols(dy_total, dy)
        return dx, dy, dscale.sum()

    def in_registers(self, config: Config | None) -> tuple[Tensor, Tensor, Tensor]:
        """Each tower's H y by one kernel; the totals pass through memory once, H never."""
        dx, dy = self.x.new_empty(self.x.shape), self.y.new_empty(self.y.shape)
        config = config or self.operands.choose("accumulate")
        dscale = self.x.new_empty(_blocks(len(self.x), config.block_m), dtype=torch.float64)
        total = self._accumulate(config, self.operands, self.rows, self.cols, self.diag_offset, dx, dscale)
        self._finish_rows(total, dx, 0)
        total = self._accumulate(config, self.operands.swapped(), self.cols, self.rows, -self.diag_offset, dy, None)
        self._finish_cols(total, dy)
        return dx, dy, dscale.sum()

    def _gradient(
        self,
        config: Config,
        rows: slice,
        cols: slice,
        h: Tensor,  # [rows, cols]
        dscale: Tensor,  # [programs]
        scratch: Tensor,  # [programs, tile_scratch]
    ) -> None:
        chunk = Operands(self.operands.x[rows], self.operands.y[cols], self.operands.precision)
        gradient_kernel[(len(dscale),)](
            *chunk.tiles(config),
            *(self.scale, self.rows[rows], self.cols[cols], h, dscale, scratch),
            *(*h.shape, self.x.shape[1], self.diag_offset + rows.start - cols.start),
            *chunk.strides,
            h.stride(0),
            **chunk.options(config),
            USE_TMA=config.tma,
            HAS_FACTORS=self.x_factor is not None,
        )

    def _accumulate(
        self,
        config: Config,
        operands: Operands,
        rows: Tensor,  # [n, 4]
        cols: Tensor,  # [m, 4]
        diag_offset: int,
        out: Tensor,  # [n, d], only for its dtype if that is not float32
        dscale: Tensor | None,  # [blocks of rows]
    ) -> Tensor:  # [n, d], float32
        n, d = out.shape
        total = out if out.dtype == torch.float32 else out.new_empty((n, d), dtype=torch.float32)
        accumulate_kernel[(_blocks(n, config.block_m), _blocks(d, config.block_out))](
            *(operands.x, operands.y, self.scale, rows, cols, total, dscale),
            *(n, len(cols), d, diag_offset),
            *operands.strides,
            **operands.options(config),
            BLOCK_OUT=config.block_out,
            HAS_FACTORS=self.x_factor is not None,
            HAS_DSCALE=dscale is not None,
        )
        return total

    def _finish_rows(self, total: Tensor, dx: Tensor, row_begin: int) -> None:
        _finish(total, self.x, dx, self.x_factor, self.scale, self.unit, row_begin)

    def _finish_cols(self, total: Tensor, dy: Tensor) -> None:
        _finish(total, self.y, dy, self.y_factor, self.scale, self.unit, 0)


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
    finish_kernel[(_blocks(count, block_m),)](
        *(total, x, dx, factor, scale, unit, count, row_begin, d, *x.stride()),
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        HAS_FACTORS=factor is not None,
        HAS_UNIT=unit is not None,
    )


def _unit(row_weight: Tensor, col_weight: Tensor, positive_weight: Tensor) -> Tensor:  # []
    unit = row_weight.new_empty((), dtype=torch.float32)
    unit_kernel[(1,)](
        *(v.contiguous() for v in (row_weight, col_weight, positive_weight)),
        *(unit, len(row_weight), len(col_weight)),
        BLOCK=UNIT_BLOCK,
    )
    return unit


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


def _has_aligned_rows(t: Tensor) -> bool:
    """Whether t's rows are contiguous, and each aligned to 16 bytes, as a tensor descriptor needs them."""
    return t.stride(1) == 1 and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 and t.stride(0) > 0


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'.

    NumPy, which the interpreter computes with, would warn of infinities that a GPU takes as they come.
    """
    return torch.cuda.device(device) if device.type == "cuda" else numpy.errstate(all="ignore")


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _chunks(length: int, step: int) -> Iterator[slice]:
    for begin in range(0, length, step):
        yield slice(begin, min(begin + step, length))
