"""The contract of clipfast/backends/__init__.py: blocks merge to the whole, wherever their positives lie."""

from __future__ import annotations

import pytest
import torch
from oracle import error, features, truth
from torch import Tensor

from clipfast import cross_entropy, dispatch
from clipfast.block import Block, Statistics, Weights
from clipfast.problem import positive_rows, statistics_dtype

N, M, D = 130, 157, 24
ROWS = (slice(0, 1), slice(1, 53), slice(53, N))
COLS = (slice(0, 50), slice(50, 149), slice(149, M))


def scalars(scale: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(scale), torch.tensor(0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [14.3, 112.0])
def test_blocks_merge_to_the_whole(backend: str, scale: float, dtype: torch.dtype) -> None:
    x, y = features("unnormalized", N, M, D, dtype)
    s, b = scalars(scale)
    chosen = dispatch.get(backend)
    blocks = [(rows, cols, rows.start - cols.start) for rows in ROWS for cols in COLS]

    row_lse, col_lse = (torch.full((size,), -torch.inf, dtype=torch.float64) for size in (N, M))
    positive = torch.zeros(N, dtype=torch.float64)
    for rows, cols, diag_offset in blocks:
        row, col, own, *_ = chosen.forward(Block(x[rows], y[cols], s, b, diag_offset))
        row_lse[rows] = row_lse[rows].logaddexp(row)
        col_lse[cols] = col_lse[cols].logaddexp(col)
        positive[rows] += own

    statistics = Statistics(row_lse, col_lse, positive)
    weights = cross_entropy.symmetric_cross_entropy_weights(statistics, torch.ones(()))
    dx, dy = torch.zeros(N, D), torch.zeros(M, D)
    dscale = torch.zeros(())
    for rows, cols, diag_offset in blocks:
        of_rows, of_cols = (weights.row_lse, weights.row_weight), (weights.col_lse, weights.col_weight)
        of_block = Weights(*(t[rows] for t in of_rows), *(t[cols] for t in of_cols), weights.positive_weight[rows])
        gradients = chosen.backward(Block(x[rows], y[cols], s, b, diag_offset), of_block, torch.float32)
        dx[rows] += gradients.dx
        dy[cols] += gradients.dy
        dscale += gradients.dscale

    exact = truth(x, y, scale, bias=0.25)
    largest_logit = scale * x.double().norm(dim=1).max() * y.double().norm(dim=1).max()
    tolerance = torch.finfo(torch.float32).eps * (largest_logit + N**0.5) + 2 * torch.finfo(dtype).eps
    assert error(cross_entropy.symmetric_cross_entropy(statistics, torch.float64), exact.loss) <= 1e-5 * exact.loss
    for got, expected in ((dx, exact.dx), (dy, exact.dy), (dscale, exact.dscale)):
        assert error(got, expected) <= tolerance * expected.abs().max()


@pytest.mark.parametrize("diag_offset", [-200, -5, 0, 3, 26, 27, 300])
def test_statistics_of_a_block(backend: str, diag_offset: int) -> None:
    """Positives inside, partly inside and outside the block; what has no term is -inf, what has no positive 0."""
    n, m = 30, 27
    y, x = features("unnormalized", m, n, D)
    s, b = scalars(14.3)
    row_lse, col_lse, positive, *_ = dispatch.get(backend).forward(Block(x, y, s, b, diag_offset))
    logits = s.double() * x.double() @ y.double().T + b
    is_positive = torch.arange(m) == torch.arange(n)[:, None] + diag_offset
    first, last = positive_rows(n, m, diag_offset)
    assert is_positive.any(dim=1).nonzero().flatten().tolist() == list(range(first, last))
    negatives = logits.masked_fill(is_positive, -torch.inf)
    for got, expected in (
        (row_lse, negatives.logsumexp(dim=1)),
        (col_lse, negatives.logsumexp(dim=0)),
        (positive, (logits * is_positive).sum(dim=1)),
    ):
        assert got.dtype == statistics_dtype(x.device)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)


def test_a_block_of_positives_only_has_no_negatives(backend: str) -> None:
    x, y = features("random", 1, 1, D)
    row_lse, col_lse, positive, *_ = dispatch.get(backend).forward(Block(x, y, *scalars(14.3)))
    assert (row_lse.item(), col_lse.item()) == (-torch.inf, -torch.inf)
    assert positive.isfinite()


def test_chunked_and_whole_statistics_agree(backend: str) -> None:
    """More logits than any backend takes at a time, which are four million."""
    x, y = features("trained", 2200, 2200, 4)
    s, b = scalars(100.0)
    row_lse, col_lse, *_ = dispatch.get(backend).forward(Block(x, y, s, b))
    logits = s.double() * x.double() @ y.double().T + b
    logits.fill_diagonal_(-torch.inf)
    torch.testing.assert_close(row_lse, logits.logsumexp(dim=1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(col_lse, logits.logsumexp(dim=0), rtol=1e-6, atol=1e-5)
