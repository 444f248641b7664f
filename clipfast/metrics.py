"""Retrieval metrics without the n*n similarity matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast.functional import matched_features
from clipfast.norms import l2_normalize

CHUNK_BYTES = 16 << 20  # of similarities held at a time


@torch.no_grad()
def retrieval_metrics(
    image_features: Tensor,  # [n, d]
    text_features: Tensor,  # [n, d]
    ks: Sequence[int] = (1, 5, 10),
    *,
    normalize: bool = True,
) -> dict[str, float]:
    """Recall@k, median and mean rank in both directions, where image i belongs to text i.

    The rank of a match is 1 plus the number of other candidates that are at least as similar, so ties count against
    the model and features that collapsed to one point get no recall; a NaN similarity counts as more similar.

    Args:
        image_features: [n, d], one of the dtypes of `clipfast.contrastive_loss`.
        text_features: [n, d].
        ks: the cut-offs, positive.
        normalize: compare by cosine (default) or by the plain dot product.

    Returns:
        "image_to_text_R@k" and "text_to_image_R@k" as fractions for each k, and "..._median_rank", "..._mean_rank".

    Raises:
        TypeError, ValueError: the features are not as stated or differ in their number of rows, or a k is below 1.
    """
    x, y = matched_features(image_features, text_features)
    if len(x) != len(y):
        raise ValueError(f"text_features: got {len(y)} rows; accepted are the {len(x)} rows of image_features")
    for k in ks:
        if k < 1:
            raise ValueError(f"ks: got {k}; accepted are numbers from 1")
    if normalize:
        x, y = l2_normalize(x), l2_normalize(y)
    metrics: dict[str, float] = {}
    for direction, ranks in (("image_to_text", _ranks(x, y)), ("text_to_image", _ranks(y, x))):
        metrics |= {f"{direction}_R@{k}": (ranks <= k).double().mean().item() for k in ks}
        metrics[f"{direction}_median_rank"] = ranks.double().median().item()
        metrics[f"{direction}_mean_rank"] = ranks.double().mean().item()
    return metrics


def _ranks(queries: Tensor, gallery: Tensor) -> Tensor:  # [n], [n] -> [n]
    n = len(queries)
    step = max(1, CHUNK_BYTES // (n * 4))
    ranks = torch.empty(n, dtype=torch.long, device=queries.device)
    gallery = gallery.float() if gallery.dtype != torch.float64 else gallery
    for begin in range(0, n, step):
        similarity = queries[begin : begin + step].to(gallery.dtype) @ gallery.T
        match = similarity[:, begin : begin + step].diagonal()
        # The match itself is never below itself, so it counts the 1.
        ranks[begin : begin + step] = (~(similarity < match[:, None])).sum(dim=1)
    return ranks
