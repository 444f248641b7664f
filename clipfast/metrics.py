"""Retrieval metrics without the n*m similarity matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clipfast import arguments, dispatch
from clipfast.block import Block, Matches
from clipfast.norms import l2_normalize
from clipfast.problem import IDS, RANKS, Problem, accumulation_dtype
from clipfast.softmax import without_autocast

CHUNK_LOGITS = 1 << 28  # at a time, between looks at the progress bar


@torch.no_grad()
def retrieval_metrics(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [m, d]
    ks: Sequence[int] = (1, 5, 10),
    *,
    normalize: bool = True,
    image_ids: Tensor | None = None,  # [n]
    text_ids: Tensor | None = None,  # [m]
    group: Any = None,
    backend: str = "auto",
) -> dict[str, float]:
    """Recall@k, median and mean rank in both directions.

    Image i belongs to text i, or, with ids, to every text with its id: COCO's five captions of an image have its id.
    A row's rank is 1 plus the number of candidates of other ids that are at least as similar as its best match, so ties
    count against the model and features that collapsed to one point get no recall; a NaN counts as more similar. A
    row whose id the other side does not have is a candidate and no query.

    It costs one product of n*m*d and O((n + m) d) memory. What takes long has a progress bar, if tqdm is installed.

    Args:
        image_features: [n, d], one of the dtypes of `clipfast.contrastive_loss`.
        text_features: [m, d]; m = n without ids.
        ks: the cut-offs, from 1.
        normalize: compare by cosine (default) or by the plain dot product.
        image_ids: [n] integers.
        text_ids: [m] integers; image_ids where left out and m = n.
        group: a process group; of more than one process: not available yet.
        backend: "auto" or a name from `clipfast.backends()`.

    Returns:
        "image_to_text_R@k" and "text_to_image_R@k" as fractions for each k, and "..._median_rank", "..._mean_rank".

    Raises:
        TypeError, ValueError: an argument is not as stated, or no row has a match.
    """
    if not isinstance(ks, Iterable):
        raise TypeError(f"ks: got {arguments.type_name(ks)}; accepted is a sequence of integers from 1")
    cuts = [arguments.positive_integer("ks", k) for k in ks]
    arguments.flag("normalize", normalize)
    arguments.one_process(group, "retrieval")
    x, y = (t.detach() for t in arguments.feature_pair(image_features, text_features))
    if image_ids is None and text_ids is None and len(x) != len(y):
        raise ValueError(
            f"text_features: got {len(y)} rows; accepted without ids are the {len(x)} rows of image_features"
        )
    row_ids, col_ids = arguments.numbered_ids(image_ids, text_ids, x, y)
    needs = frozenset({RANKS} if row_ids is None else {RANKS, IDS})
    problem = Problem(len(x), len(y), x.shape[1], x.dtype, x.device, needs)
    chosen = dispatch.get(dispatch.select(problem, arguments.backend_name(backend)))
    if normalize:
        x, y = l2_normalize(x), l2_normalize(y)
    if row_ids is None or col_ids is None:
        block = _block(x, y)
    else:
        # Rows of one id lie together, and so do the tiles that have matches; means do not look at the order.
        (row_ids, rows), (col_ids, cols) = row_ids.sort(), col_ids.sort()
        block = _block(x[rows], y[cols], len(x) + len(y), row_ids, col_ids)
    metrics: dict[str, float] = {}
    with without_autocast(x.device):
        ranks = _ranks(chosen, block)
    for direction, of_direction in zip(("image_to_text", "text_to_image"), ranks, strict=True):
        if not len(of_direction):
            raise ValueError("text_ids: no text has the id of an image; there is nothing to retrieve")
        metrics |= {f"{direction}_R@{k}": (of_direction <= k).double().mean().item() for k in cuts}
        metrics[f"{direction}_median_rank"] = of_direction.double().median().item()
        metrics[f"{direction}_mean_rank"] = of_direction.double().mean().item()
    return metrics


def _block(
    x: Tensor, y: Tensor, diag_offset: int = 0, row_ids: Tensor | None = None, col_ids: Tensor | None = None
) -> Block:
    scale, bias = (torch.full((), value, dtype=accumulation_dtype(x.dtype), device=x.device) for value in (1.0, 0.0))
    return Block(x, y, scale, bias, diag_offset, row_ids=row_ids, col_ids=col_ids)


def _ranks(backend: ModuleType, block: Block) -> list[Tensor]:
    """The ranks of the rows and of the columns that have a match."""
    step = max(1, CHUNK_LOGITS // block.m)
    parts = [slice(begin, min(begin + step, block.n)) for begin in range(0, block.n, step)]
    rows, cols = zip(*(backend.matches(block.rows(part)) for part in _progress(parts, "matches")), strict=True)
    best = Matches(torch.cat(rows), torch.stack(cols).amax(dim=0))
    row_above, col_above = [], torch.zeros_like(best.cols, dtype=torch.int64)
    for part in _progress(parts, "ranks"):
        statistics = backend.forward(block.rows(part), Matches(best.rows[part], best.cols))
        row_above.append(statistics.row_above)
        col_above += statistics.col_above
    counts = torch.cat(row_above), col_above
    return [1 + above[match != -torch.inf] for above, match in zip(counts, best, strict=True)]


def _progress(parts: list[slice], what: str) -> Iterable[slice]:
    """The parts, with a bar on a terminal where they take more than a moment."""
    try:
        from tqdm import tqdm
    except ImportError:
        return parts
    return tqdm(parts, desc=what, delay=2, disable=None, leave=False)
