"""Ranks of matches among the candidates of all ranks of a group: each similarity is counted once in the whole job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clipfast import dispatch, retrieval
from clipfast.block import Matches
from clipfast.distributed.job import Images, added, agreed
from clipfast.distributed.softmax import all_matches
from clipfast.schemes import GroupOptions


def ranks_of_matches(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d], without ids m = n
    image_ids: Tensor | None,  # [n], int64, as they are on all ranks
    text_ids: Tensor | None,  # [m], int64
    backend: str,
    alike: Mapping[str, object],
    group_options: GroupOptions,
) -> tuple[Tensor, Tensor]:  # [N], [M], int64
    """Of all ranks' images among all texts, and of all texts among all images; 0 where a row has no match.

    Raises:
        ValueError: the ranks disagree; the same on every rank.
    """
    job = agreed("retrieval_metrics", x, y, (), {**alike, "backend": backend}, group_options)
    if image_ids is not None and text_ids is not None:
        # As in one process: rows of one id lie together, and so do the tiles that have matches.
        (image_ids, rows), (text_ids, cols) = image_ids.sort(), text_ids.sort()
        x, y = x[rows], y[cols]
    images, module = Images(x, *retrieval.factors(x), image_ids), dispatch.get(backend)
    bar, by_ids = job.ranks.rank == 0, image_ids is not None
    held = job.spread(y, text_ids)
    rows_best, cols_best = all_matches(
        lambda block: retrieval.matches(module, block, bar), images, held, job, matched=not by_ids
    )
    above = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def visit(offset: int, texts: Sequence[Tensor]) -> Tensor:  # [m'], int64
        block = images.block(len(texts[0]) if by_ids else offset, texts)
        if block is None:
            return above.new_zeros(len(texts[0]))
        of_rows, of_cols = retrieval.count_above(module, block, Matches(rows_best, texts[-1]), bar)
        above.add_(of_rows)
        return of_cols

    of_cols = job.columns([*held, *job.spread(cols_best)], visit, added)
    shards = job.shards
    return (
        job.ranks.gather_rows(retrieval.ranks(above, rows_best), shards.images),
        job.ranks.gather_rows(retrieval.ranks(of_cols, cols_best), shards.texts),
    )
