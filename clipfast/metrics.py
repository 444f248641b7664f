"""Retrieval metrics without the n*m similarity matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from clipfast import arguments, dispatch, retrieval
from clipfast.block import number_ids
from clipfast.calls import telling
from clipfast.norms import l2_normalize
from clipfast.problem import IDS, RANKS, Problem
from clipfast.schemes import SCHEMES, GroupOptions
from clipfast.softmax import without_autocast


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
    scheme: str = "auto",
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
        group: a process group, among all of whose ranks' rows is searched; each rank passes its own, any number of
            images and texts, without ids a text for each image. Every similarity is counted once in the whole job, and
            all ranks get the same metrics.
        scheme: see `clipfast.contrastive_loss`.
        backend: "auto" or a name from `clipfast.backends()`.

    Returns:
        "image_to_text_R@k" and "text_to_image_R@k" as fractions for each k, and "..._median_rank", "..._mean_rank".

    Raises:
        TypeError, ValueError: an argument is not as stated, or no row has a match.
    """
    ranks = arguments.process_group(group)
    with telling(ranks, image_features, equal_shards=False):
        if not isinstance(ks, Iterable):
            raise TypeError(f"ks: got {arguments.type_name(ks)}; accepted is a sequence of integers from 1")
        cuts = tuple(arguments.positive_integer("ks", k) for k in ks)
        arguments.flag("normalize", normalize)
        arguments.choice("scheme", scheme, SCHEMES)
        pair = arguments.feature_pair(image_features, text_features, fewest_rows=0 if ranks else 1)
        x, y = (t.detach() for t in pair)
        if image_ids is None and text_ids is None and len(x) != len(y):
            raise ValueError(
                f"text_features: got {len(y)} rows; accepted without ids are the {len(x)} rows of image_features"
            )
        ids = arguments.ids(image_ids, text_ids, x, y)
        needs = frozenset({RANKS} if ids[0] is None else {RANKS, IDS})
        problem = Problem(max(1, len(x)), max(1, len(y)), x.shape[1], x.dtype, x.device, needs)
        backend = dispatch.select(problem, backend)
    if normalize:
        x, y = l2_normalize(x), l2_normalize(y)
    with without_autocast(x.device):
        if ranks is None:
            both = _ranks_of_matches(x, y, *ids, backend)
        else:
            from clipfast.distributed import ranks_of_matches  # imports torch's compiler, which takes a second

            alike = {"ks": cuts, "normalize": normalize, "image_ids": "None" if ids[0] is None else "given"}
            both = ranks_of_matches(x, y, *ids, backend, alike, GroupOptions(ranks, "mean", scheme, False))
    metrics: dict[str, float] = {}
    for direction, of_all in zip(("image_to_text", "text_to_image"), both, strict=True):
        of_queries = of_all[of_all > 0]
        if not len(of_queries):
            raise ValueError("text_ids: no text has the id of an image; there is nothing to retrieve")
        metrics |= {f"{direction}_R@{k}": (of_queries <= k).double().mean().item() for k in cuts}
        metrics[f"{direction}_median_rank"] = of_queries.double().median().item()
        metrics[f"{direction}_mean_rank"] = of_queries.double().mean().item()
    return metrics


def _ranks_of_matches(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    image_ids: Tensor | None,  # [n]
    text_ids: Tensor | None,  # [m]
    backend: str,
) -> tuple[Tensor, Tensor]:  # [n], [m], int64
    """In one process; in any order, for the metrics do not look at it."""
    if image_ids is None or text_ids is None:
        block = retrieval.similarities(x, y)
    else:
        # Rows of one id lie together, and so do the tiles that have matches.
        (row_ids, rows), (col_ids, cols) = (t.sort() for t in number_ids(image_ids, text_ids))
        block = retrieval.similarities(x[rows], y[cols], len(y), row_ids, col_ids)
    module = dispatch.get(backend)
    best = retrieval.matches(module, block)
    row_above, col_above = retrieval.count_above(module, block, best)
    return retrieval.ranks(row_above, best.rows), retrieval.ranks(col_above, best.cols)
