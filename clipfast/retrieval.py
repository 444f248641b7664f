"""The ranks of matches among all candidates, a few rows of a block at a time, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from clipfast.block import Block, Matches
from clipfast.problem import accumulation_dtype

CHUNK_LOGITS = 1 << 28  # at a time, between looks at the progress bar


def similarities(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    diag_offset: int = 0,
    row_ids: Tensor | None = None,  # [n], int32
    col_ids: Tensor | None = None,  # [m], int32
) -> Block:
    """The block whose logits are the rows' dot products."""
    return Block(x, y, *factors(x), diag_offset, row_ids=row_ids, col_ids=col_ids)


def factors(x: Tensor) -> tuple[Tensor, Tensor]:  # [], []
    """Scale and bias of similarities."""
    scale, bias = (torch.full((), value, dtype=accumulation_dtype(x.dtype), device=x.device) for value in (1.0, 0.0))
    return scale, bias


def matches(backend: ModuleType, block: Block, bar: bool = True) -> Matches:
    """The largest logit of each row's and column's positives."""
    found = (backend.matches(block.rows(part)) for part in _parts(block, "matches", bar))
    rows, cols = zip(*found, strict=True)
    return Matches(torch.cat(rows), torch.stack(cols).amax(dim=0))


def count_above(
    backend: ModuleType, block: Block, best: Matches, bar: bool = True
) -> tuple[Tensor, Tensor]:  # [n], [m], int64
    """How many negatives are not below each row's and column's match."""
    row_above, col_above = [], torch.zeros_like(best.cols, dtype=torch.int64)
    for part in _parts(block, "ranks", bar):
        statistics = backend.forward(block.rows(part), Matches(best.rows[part], best.cols))
        row_above.append(statistics.row_above)
        col_above += statistics.col_above
    return torch.cat(row_above).long(), col_above


def ranks(above: Tensor, match: Tensor) -> Tensor:  # [n], [n] -> [n], int64
    """From 1; 0 of a row without a match, which is no query."""
    return torch.where(match != -torch.inf, 1 + above, 0)


def _parts(block: Block, what: str, bar: bool) -> Iterable[slice]:
    """Slices of the rows, with a bar on a terminal where they take more than a moment."""
    step = max(1, CHUNK_LOGITS // block.m)
    parts = [slice(begin, min(begin + step, block.n)) for begin in range(0, block.n, step)]
    try:
        from tqdm import tqdm
    except ImportError:
        return parts
    return tqdm(parts, desc=what, delay=2, disable=None if bar else True, leave=False)
