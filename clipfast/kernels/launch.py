"""The host side of the kernels: buffers, grids and the order of launches. Nothing here waits for the device.

Workspace is what `tuning` says: partial statistics for a fixed number of programs, and H one chunk at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from clipfast import tuning
from clipfast.block import Block, DistillationPass, Gradients, Matches, SigmoidPass, Statistics, Weights
from clipfast.kernels.chunks import Products, without_products
from clipfast.kernels.distillation import distillation_kernel
from clipfast.kernels.gradient import VECTORS, VECTORS_WITH_IDS, accumulate_kernel, gradient_kernel
from clipfast.kernels.operands import FUSED, VECTOR_BLOCK, Operands, blocks, h_tile, launches, nearest_offset, on, pair
from clipfast.kernels.ranks import NO_KEY, SIGN_BIT, matches_kernel
from clipfast.kernels.sigmoid import sigmoid_kernel
from clipfast.kernels.statistics import merge_kernel, statistics_kernel
from clipfast.kernels.tiles import IGNORED, NO_IDS, POSITIVES
from clipfast.kernels.vectors import AMPLIFIER, prepare_kernel, share_kernel, unit_kernel
from clipfast.tuning import Config

UNIT_BLOCK = 1024
Shares = tuple[Tensor, Tensor, Tensor, Tensor]  # of rows [n], their blocks' [blocks, 2], of columns [m], their blocks'
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def forward(
    block: Block, matches: Matches | None = None, *, config: Config | None = None, precision: str | None = None
) -> Statistics:
    """The contract's forward. `config` and `precision` override what `tuning` chooses."""
    x, scale, n, m = block.x, block.scale, block.n, block.m
    operands = Operands.of(x, block.y, precision)
    kernel = "kept" if block.keep else "ranks" if matches is not None or block.ignores else "statistics"
    config = config or operands.choose(kernel)
    programs_m, programs_n = _grid(block, config)
    row_partial = x.new_empty((2, programs_n, 2, n), dtype=torch.float32)
    col_partial = x.new_empty((2, programs_m, 2, m), dtype=torch.float32)
    scratch = x.new_empty((programs_m * programs_n, config.tile_scratch), dtype=torch.float32)
    positive_z = x.new_empty(n, dtype=torch.float32)
    kept = x.new_empty(tuning.kept_size(n, m), dtype=torch.float32) if block.keep else None
    row_lse, col_lse, positive = (x.new_empty(size, dtype=torch.float64) for size in (n, m, n))
    row_above = col_above = ranks = None
    if matches is not None:
        row_above, col_above = (x.new_zeros(size, dtype=torch.int32) for size in (n, m))
        ranks = matches.rows.contiguous(), matches.cols.contiguous(), row_above, col_above
    with on(x.device):
        statistics_kernel[(programs_m * programs_n,)](
            *operands.tiles(config),
            *(scale, block.x_factor, block.y_factor),
            _ids(block) if block.ignores or ranks is not None else None,
            ranks,
            *(row_partial, col_partial, scratch, positive_z, _kept(block, kept)),
            *(n, m, operands.d, nearest_offset(block)),
            *operands.strides,
            programs_n,
            **operands.options(config),
            USE_TMA=config.tma,
            HAS_FACTORS=block.x_factor is not None,
            IGNORES=block.ignores,
            ROW_WARPS=config.row_warps,
        )
        merge_kernel[(blocks(n, VECTOR_BLOCK) + blocks(m, VECTOR_BLOCK),)](
            *(row_partial, col_partial, positive_z, scale, block.bias, row_lse, col_lse, positive),
            *(n, m, nearest_offset(block), programs_m, programs_n),
            BLOCK=VECTOR_BLOCK,
            **FUSED,
        )
    return Statistics(row_lse, col_lse, positive, row_above, col_above, kept)


def matches(block: Block, *, config: Config | None = None, precision: str | None = None) -> Matches:
    """The contract's matches: products with the scale's sign, formed in the tiles of `forward`."""
    x = block.x
    operands = Operands.of(x, block.y, precision)
    config = config or operands.choose("ranks")
    programs_m, programs_n = _grid(block, config)
    scratch = x.new_empty((programs_m * programs_n, config.tile_scratch), dtype=torch.float32)
    keys = [x.new_full((size,), NO_KEY.value, dtype=torch.int32) for size in (block.n, block.m)]
    with on(x.device):
        matches_kernel[(programs_m * programs_n,)](
            *operands.tiles(config),
            *(block.scale, block.x_factor, block.y_factor, _ids(block), *keys, scratch),
            *(block.n, block.m, operands.d, nearest_offset(block)),
            *operands.strides,
            programs_n,
            **operands.options(config),
            USE_TMA=config.tma,
        )
    return Matches(*(torch.where(k < 0, k ^ SIGN_BIT.value, k).view(torch.float32).double() for k in keys))


def backward(
    block: Block,
    weights: Weights,
    dtype: torch.dtype | None = None,
    *,
    config: Config | None = None,
    precision: str | None = None,
    strategy: str = tuning.STRATEGY,
    workspace: int = tuning.WORKSPACE_BYTES,
) -> Gradients:
    """The contract's backward, by one of tuning.STRATEGIES; dx and dy are in the block's dtype where none is given.

    H takes at most `workspace` bytes or its smallest chunk. "registers" takes up no kept products.
    """
    if strategy not in tuning.STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}; accepted are {', '.join(map(repr, tuning.STRATEGIES))}")
    # What compiles for a GPU that is not there may compile it.
    if block.x.is_cuda and (
        reason := tuning.reason_against_strategy(strategy, tuning.describe(block.x.device), TRITON_VERSION)
    ):
        raise ValueError(f"strategy: {strategy!r} {reason}")
    with on(block.x.device):
        unit = _unit(weights, pair(weights.row_target, weights.col_target)) if _needs_unit(block) else None
        rows, cols = _vectors(block, weights, unit)
        operands = Operands.of(block.x, block.y, precision)
        pass_ = Pass(block, weights, rows, cols, Products(block, operands, dtype or block.x.dtype, unit))
        dx, dy, dscale = pass_.by_chunks(config, workspace) if strategy == "chunks" else pass_.in_registers(config)
        return Gradients(dx, dy, (dscale if unit is None else dscale * unit).to(block.scale.dtype))


@dataclass(frozen=True)
class Pass:
    """One backward pass of the softmaxes: what both strategies need."""

    block: Block
    weights: Weights
    rows: Tensor  # [n, 4 or 6]
    cols: Tensor  # [m, 4 or 6]
    products: Products

    @property
    def operands(self) -> Operands:
        return self.products.operands

    def by_chunks(self, config: Config | None, workspace: int) -> tuple[Tensor, Tensor, Tensor]:
        """H a chunk at a time, which the vendor's product uses."""
        x, block = self.operands.x, self.block
        config = config or self.operands.choose("gradient")
        if self.weights.kept is not None:
            config = tuning.without_products(config)
        shape = tuning.chunk_shape(block.n, block.m, x.dtype.itemsize, workspace)
        programs = tuning.persistent_programs(*shape, config, tuning.describe(x.device).processors)
        dscale = x.new_zeros(programs, dtype=torch.float64)
        scratch = x.new_empty((programs, config.tile_scratch), dtype=torch.float32)
        h_buffer = self.products.buffer(shape)
        # What all launches have in common is made once: a chunk takes little longer on the device than on the host.
        fixed = (
            *(*self.operands.tiles(config), block.scale, self.rows, self.cols, self._shares(config)),
            *(pair(block.x_factor, block.y_factor), h_tile(h_buffer, config), h_buffer, dscale, scratch),
            _kept(block, self.weights.kept),
        )
        numbers = self.operands.d, nearest_offset(block)
        strides = *self.operands.strides, h_buffer.stride(0)
        options = self.operands.options(config)
        options |= {"USE_TMA": config.tma, "SAME": _same(block)}
        # What is loaded does not lie as the products of matrix instructions do.
        options["ROW_WARPS"] = config.row_warps if self.weights.kept is None else 0
        launch = launches(gradient_kernel, programs, options)

        def fill(rows: slice, cols: slice, h: Tensor | None) -> None:
            launch(*fixed, rows.stop, cols.stop, *numbers, rows.start, cols.start, *strides)

        return *self.products.by_chunks(shape, h_buffer, fill), dscale.sum()

    def in_registers(self, config: Config | None) -> tuple[Tensor, Tensor, Tensor]:
        """Each tower's H y by one kernel; the totals pass through memory once, H never."""
        dx, dy = self.products.empty()
        config = config or self.operands.choose("accumulate")
        offset = nearest_offset(self.block)
        dscale = dx.new_empty(blocks(len(dx), config.block_m), dtype=torch.float64)
        shares = self._shares(config)
        total = self._accumulate(config, self.operands, self.rows, self.cols, shares, offset, dx, dscale)
        self.products.finish_rows(total, dx, 0)
        shares = self._shares(config, swapped=True)
        total = self._accumulate(config, self.operands.swapped(), self.cols, self.rows, shares, -offset, dy, None)
        self.products.finish_cols(total, dy)
        return dx, dy, dscale.sum()

    def _shares(self, config: Config, swapped: bool = False) -> Shares:
        """In units of 1 / scale2 with factors; of the columns first if `swapped`."""
        block, with_factors = self.block, self.block.x_factor is not None
        return _shares(block, self.weights, self.products.unit, config, swapped, with_factors)

    def _accumulate(
        self,
        config: Config,
        operands: Operands,
        rows: Tensor,  # [n, 4 or 6]
        cols: Tensor,  # [m, 4 or 6]
        shares: Shares,
        diag_offset: int,
        out: Tensor,  # [n, d], only for its dtype if that is not float32
        dscale: Tensor | None,  # [blocks of rows]
    ) -> Tensor:  # [n, d], float32
        n, d = out.shape
        total = out if out.dtype == torch.float32 else out.new_empty((n, d), dtype=torch.float32)
        accumulate_kernel[(blocks(n, config.block_m), blocks(d, config.block_out))](
            *(operands.x, operands.y, self.block.scale, rows, cols, shares, total, dscale),
            *(n, len(cols), d, diag_offset),
            *operands.strides,
            **operands.options(config),
            BLOCK_OUT=config.block_out,
            HAS_FACTORS=self.block.x_factor is not None,
            HAS_DSCALE=dscale is not None,
            SAME=_same(self.block),
        )
        return total


def sigmoid(
    block: Block,
    unit: float,
    gradients: bool,
    dtype: torch.dtype,
    *,
    config: Config | None = None,
    precision: str | None = None,
    workspace: int = tuning.WORKSPACE_BYTES,
) -> SigmoidPass:
    """The contract's sigmoid, by chunks: in registers every tower would form every logit again."""
    x, n, m = block.x, block.n, block.m
    operands = Operands.of(x, block.y, precision)
    config = config or operands.choose("sigmoid")
    shape = tuning.chunk_shape(n, m, operands.x.dtype.itemsize, workspace)
    programs = tuning.persistent_programs(*shape, config, tuning.describe(x.device).processors)
    sums = x.new_zeros((programs, 2), dtype=torch.float64) if gradients else None
    scratch = x.new_empty((programs, config.tile_scratch), dtype=torch.float32)
    loss_partial = x.new_empty(blocks(shape[1], config.block_n) * shape[0], dtype=torch.float32)
    row_loss = x.new_zeros(n, dtype=torch.float64)
    h_buffer = operands.x.new_empty((shape[0], tuning.padded(shape[1]))) if gradients else None
    fixed = (
        *(*operands.tiles(config), block.scale, block.bias),
        *(pair(block.x_factor, block.y_factor), _ids(block)),
        *(h_tile(h_buffer, config) if h_buffer is not None else None, h_buffer, loss_partial, sums, scratch),
    )
    numbers = operands.d, nearest_offset(block)
    strides = *operands.strides, 0 if h_buffer is None else h_buffer.stride(0)
    options = operands.options(config)
    options |= {"USE_TMA": config.tma, "SAME": _same(block), "GRADIENTS": gradients, "ROW_WARPS": config.row_warps}
    launch = launches(sigmoid_kernel, programs, options)

    def fill(rows: slice, cols: slice, h: Tensor | None) -> None:
        launch(*fixed, rows.stop, cols.stop, *numbers, rows.start, cols.start, *strides)
        count = rows.stop - rows.start
        loss = loss_partial[: blocks(cols.stop - cols.start, config.block_n) * count].view(-1, count)
        row_loss[rows] += loss.sum(dim=0, dtype=row_loss.dtype)

    with on(x.device):
        if sums is None or h_buffer is None:
            without_products(n, m, shape, fill)
            return SigmoidPass(row_loss, None, None)
        of_h = x.new_full(
            (), unit / AMPLIFIER.value if operands.x.dtype == torch.float16 else unit, dtype=torch.float32
        )
        products = Products(block, operands, dtype, of_h)
        dx, dy = products.by_chunks(shape, h_buffer, fill)
        dbias, dscale = (sums.sum(dim=0) * unit).unbind()
        return SigmoidPass(row_loss, Gradients(dx, dy, dscale.to(block.scale.dtype)), dbias)


def distillation(
    block: Block,
    weights: Weights,
    teacher: Block,
    teacher_weights: Weights,
    gradients: bool,
    dtype: torch.dtype,
    *,
    config: Config | None = None,
    precision: str | None = None,
    workspace: int = tuning.WORKSPACE_BYTES,
) -> DistillationPass:
    """The contract's distillation, by chunks."""
    n, m, new = block.n, block.m, block.scale.new_empty
    operands, of_teacher = (Operands.of(b.x, b.y, precision) for b in (block, teacher))
    config = config or operands.choose("distillation", of_teacher)
    shape = tuning.chunk_shape(n, m, operands.x.dtype.itemsize, workspace)
    programs_m, programs_n = tuning.program_grid(*shape, config, tuning.describe(block.x.device).processors)
    programs = programs_m * programs_n
    row_partial, col_partial = new(blocks(shape[1], config.block_n) * shape[0]), new(programs_m * shape[1])
    scratch = new((programs, config.tile_scratch))
    row_cross, col_cross, dscale = (block.x.new_zeros(k, dtype=torch.float64) for k in (n, m, programs))
    with on(block.x.device):
        unit = None
        if _needs_unit(block):
            unit = _unit(weights, (teacher_weights.row_weight, teacher_weights.col_weight))
        products = Products(block, operands, dtype, unit)
        h_buffer = products.buffer(shape) if gradients else None
        fixed = (
            *(*operands.tiles(config), *of_teacher.tiles(config)),
            *(
                (b.scale, b.bias, *_vectors(b, w, unit), _shares(b, w, unit, config), o.d, *o.strides)
                for b, w, o in ((block, weights, operands), (teacher, teacher_weights, of_teacher))
            ),
            *(pair(b.x_factor, b.y_factor) for b in (block, teacher)),
            *(None if h_buffer is None else h_tile(h_buffer, config), h_buffer),
            *(row_partial, col_partial, dscale, scratch),
        )
        options = operands.options(config) | {"GRADIENTS": gradients, "TEACHER_PRECISION": of_teacher.precision}
        options |= {"USE_TMA": config.tma, "ROW_WARPS": config.row_warps}
        options["EVEN_D"] &= of_teacher.options(config)["EVEN_D"]
        launch = launches(distillation_kernel, programs, options)
        stride = 0 if h_buffer is None else h_buffer.stride(0)

        def fill(rows: slice, cols: slice, h: Tensor | None) -> None:
            launch(*fixed, rows.stop, cols.stop, rows.start, cols.start, stride, programs_m, programs_n)
            n, m = rows.stop - rows.start, cols.stop - cols.start
            row_part = row_partial[: blocks(m, config.block_n) * n].view(-1, n)
            row_cross[rows] += row_part.sum(dim=0, dtype=row_cross.dtype)
            col_cross[cols] += col_partial[: programs_m * m].view(-1, m).sum(dim=0, dtype=col_cross.dtype)

        got = None
        if h_buffer is not None:
            dx, dy = products.by_chunks(shape, h_buffer, fill)
            total = dscale.sum() if unit is None else dscale.sum() * unit
            got = Gradients(dx, dy, total.to(block.scale.dtype))
        else:
            without_products(n, m, shape, fill)
        for cross, weight in ((row_cross, teacher_weights.row_weight), (col_cross, teacher_weights.col_weight)):
            cross.div_(weight if unit is None else weight / unit)
        return DistillationPass(row_cross, col_cross, got)


def _grid(block: Block, config: Config) -> tuple[int, int]:
    return tuning.program_grid(block.n, block.m, config, tuning.describe(block.x.device).processors)


def _kept(block: Block, kept: Tensor | None) -> tuple[Tensor, int] | None:
    """The products that stay between the passes, as the kernels take them."""
    return None if kept is None else (kept, tuning.padded(block.m))


def _ids(block: Block) -> tuple[Tensor, Tensor] | None:
    return pair(block.row_ids, block.col_ids)


def _same(block: Block) -> int:
    """What the kernels do with pairs of equal ids."""
    return int((IGNORED if block.ignores else POSITIVES if block.adds_positives else NO_IDS).value)


def _vectors(block: Block, weights: Weights, unit: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows' and the columns' vectors for G, [n, 4] and [m, 4]; with ids [n, 6] and [m, 6]."""
    width = (VECTORS if block.row_ids is None else VECTORS_WITH_IDS).value
    rows, cols = (block.scale.new_empty((length, width)) for length in (block.n, block.m))
    row_lse, row_weight, col_lse, col_weight, positive_weight, *_ = weights
    prepare_kernel[(blocks(block.n, VECTOR_BLOCK) + blocks(block.m, VECTOR_BLOCK),)](
        *(v.contiguous() for v in (row_lse, col_lse, row_weight, col_weight, positive_weight)),
        *(block.x_factor, block.y_factor, _ids(block), pair(weights.row_target, weights.col_target)),
        *(block.scale, block.bias, unit, rows, cols, block.n, block.m, nearest_offset(block)),
        HAS_FACTORS=block.x_factor is not None,
        HAS_UNIT=unit is not None,
        WIDTH=width,
        BLOCK=VECTOR_BLOCK,
        **FUSED,
    )
    return rows, cols


def _shares(
    block: Block, weights: Weights, unit: Tensor | None, config: Config, swapped: bool = False, of_factors: bool = False
) -> Shares:
    """What tiles of the config take for both sides; see share_kernel."""
    n, m, new = block.n, block.m, block.scale.new_empty
    sides = [(weights.row_lse, weights.row_weight, n), (weights.col_lse, weights.col_weight, m)]
    (lse, weight, length), (other_lse, other_weight, other_length) = sides[::-1] if swapped else sides
    counts = blocks(length, config.block_m), blocks(other_length, config.block_n)
    shares = new(length), new((counts[0], 2)), new(other_length), new((counts[1], 2))
    share_kernel[(sum(counts),)](
        *((lse.contiguous(), other_lse.contiguous()), (weight.contiguous(), other_weight.contiguous())),
        *(shares, block.scale, block.bias, unit, length, other_length),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        HAS_FACTORS=of_factors,
        HAS_UNIT=unit is not None,
        **FUSED,
    )
    return shares


def _needs_unit(block: Block) -> bool:
    return block.x.dtype == torch.float16


def _unit(weights: Weights, others: tuple[Tensor, Tensor] | None) -> Tensor:  # ([n], [m]) -> []
    """The unit of H for the largest of the weights and of two further vectors."""
    unit = weights.row_weight.new_empty((), dtype=torch.float32)
    unit_kernel[(1,)](
        *(v.contiguous() for v in (weights.row_weight, weights.col_weight, weights.positive_weight)),
        *(others, unit, len(weights.row_weight), len(weights.col_weight)),
        BLOCK=UNIT_BLOCK,
        **FUSED,
    )
    return unit
