"""Plain PyTorch on any device: row chunks of logits under a byte budget, recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clipfast.problem import (
    HALF_DTYPES,
    Problem,
    accumulation_dtype,
    positive_rows,
    round_statistics,
    statistics_dtype,
)

NAME = "torch"

CHUNK_BYTES = 16 << 20  # of logits; about two such chunks are alive at a time


def unsupported_reasons(problem: Problem) -> tuple[str, ...]:
    return ()


def reasons_against_auto(problem: Problem) -> tuple[str, ...]:
    return ()


def folds_norms(dtype: torch.dtype) -> bool:
    return False


def workspace_bytes(problem: Problem) -> int:
    itemsize = accumulation_dtype(problem.dtype).itemsize
    chunks = 2 * min(problem.n, _chunk_rows(problem.m, itemsize)) * problem.m * itemsize
    converted = problem.m * problem.d * itemsize if _operand_dtype(problem) != problem.dtype else 0
    gradients = (problem.n + problem.m) * problem.d * itemsize if problem.dtype in HALF_DTYPES else 0
    return chunks + converted + gradients


def forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    diag_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    n, m = len(x), len(y)
    statistics = statistics_dtype(x.device)
    row_lse = scale.new_empty(n, dtype=statistics)
    positive = scale.new_zeros(n, dtype=statistics)
    # The columns' running sum of exp(L - shift).
    col_shift = scale.new_full((m,), torch.finfo(scale.dtype).min)
    col_sum = scale.new_zeros(m)
    y = y.to(_operand_dtype(x))
    for rows in _chunks(n, m, scale.dtype.itemsize):
        logits = _product(x[rows].to(y.dtype), y.T).mul_(scale).add_(bias)
        own, diagonal = _positives(logits, diag_offset + rows.start)
        positive[rows][own] = diagonal.to(statistics)
        diagonal.fill_(-torch.inf)
        row_shift = _finite(logits.amax(dim=1))
        row_sum = torch.sub(logits, row_shift[:, None]).exp_().sum(dim=1)
        row_lse[rows] = row_shift.to(statistics) + row_sum.to(statistics).log()
        shift = torch.maximum(col_shift, _finite(logits.amax(dim=0)))
        col_sum = col_sum * (col_shift - shift).exp_() + logits.sub_(shift).exp_().sum(dim=0)
        col_shift = shift
    return row_lse, col_shift.to(statistics) + col_sum.to(statistics).log(), positive


def backward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    row_lse: Tensor,  # [n]
    col_lse: Tensor,  # [m]
    row_weight: Tensor,  # [n]
    col_weight: Tensor,  # [m]
    positive_weight: Tensor,  # [n]
    diag_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    n, m = len(x), len(y)
    row_lse, row_weight = round_statistics(row_lse, row_weight, scale.dtype)
    col_lse, col_weight = round_statistics(col_lse, col_weight, scale.dtype)
    positive_weight = positive_weight.to(scale.dtype)
    # G is kept near 1 by taking its largest weight out: in half precision P/n would underflow (design: float16).
    weights = torch.cat([row_weight, col_weight, positive_weight]).abs()
    unit = torch.where(weights.isfinite(), weights, 0).amax()
    unit = torch.where(unit == 0, 1, unit)
    row_weight, col_weight, positive_weight = (w / unit for w in (row_weight, col_weight, positive_weight))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dy = scale.new_zeros(y.shape)
    row_dot = scale.new_empty(n)
    y = y.to(_operand_dtype(x))
    for rows in _chunks(n, m, scale.dtype.itemsize):
        x_rows = x[rows].to(y.dtype)
        logits = _product(x_rows, y.T).mul_(scale).add_(bias)
        gradient = torch.sub(logits, row_lse[rows, None]).exp_().mul_(row_weight[rows, None])
        gradient += logits.sub_(col_lse).exp_().mul_(col_weight)
        own, diagonal = _positives(gradient, diag_offset + rows.start)
        diagonal.copy_(positive_weight[rows][own])
        gradient = gradient.to(y.dtype)
        gradient_y = _product(gradient, y)
        row_dot[rows] = (gradient_y * x_rows).sum(dim=1)
        dx[rows] = gradient_y.mul_(scale * unit)
        _accumulate_product(dy, gradient.T, x_rows)
        del logits, gradient, diagonal  # or the next two chunks would stand beside one of these
    return dx, dy.mul_(scale * unit).to(x.dtype), row_dot.sum() * unit


def _operand_dtype(inputs: Tensor | Problem) -> torch.dtype:
    """The dtype handed to the matrix product: half as it is where a product of halves can return float32."""
    return inputs.dtype if inputs.device.type == "cuda" else accumulation_dtype(inputs.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b, accumulated and returned in the accumulation dtype."""
    if a.dtype in HALF_DTYPES:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total."""
    if a.dtype in HALF_DTYPES:
        total += _product(a, b)
    else:
        total.addmm_(a, b)


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


def _chunks(n: int, m: int, itemsize: int) -> Iterator[slice]:
    step = _chunk_rows(m, itemsize)
    for begin in range(0, n, step):
        yield slice(begin, min(begin + step, n))
