"""sentence-transformers' MultipleNegativesRankingLoss without its n*m similarities; one import changes:

from clipfast.integrations.sentence_transformers import MultipleNegativesRankingLoss

loss = MultipleNegativesRankingLoss(model)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipfast.functional import contrastive_loss

try:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import cos_sim, dot_score
except ImportError as error:
    raise ImportError(
        f'{error}: sentence-transformers 6 or later is needed: pip install "clipfast[sentence-transformers]"',
        name=error.name,
    ) from error

ONE_DIRECTION = {"query_to_doc"}
BOTH_DIRECTIONS = {"query_to_doc", "doc_to_query"}


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):  # type: ignore[misc]
    """sentence-transformers' loss of this name, its constructor and its forward, computed by clipfast.

    With queries x [n, d] and documents y [m, d], the n positives first and k negatives of each query behind them,
    m = (1 + k) n, the loss is

        similarities = scale * cos_sim(x, y)                                          # [n, m], never stored
        cross_entropy(similarities, torch.arange(n))

    or, with directions=("query_to_doc", "doc_to_query") and partition_mode="per_direction", the mean of it and of
    cross_entropy(similarities.T[:n], torch.arange(n)).

    With gather_across_devices every process gets the mean over the queries of all, where sentence-transformers' has
    that of its own; the averaged gradients are the same. Batches need not be equal.

    Args:
        arguments, options: those of sentence-transformers' loss.
        backend: "auto" or a name from `clipfast.backends()`.

    Raises:
        ValueError: sentence-transformers' loss refuses an argument.
        NotImplementedError: an argument means a loss that needs similarities one by one: other directions, both in one
            softmax (partition_mode="joint"), hardness_mode, a similarity_fct other than cos_sim and dot_score.
    """

    def __init__(self, *arguments: Any, backend: str = "auto", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.backend = backend
        directions = set(self.directions)
        if directions not in (ONE_DIRECTION, BOTH_DIRECTIONS):
            others = ", ".join(sorted(directions - BOTH_DIRECTIONS))
            raise NotImplementedError(f"directions: {others} not available; accepted are query_to_doc and doc_to_query")
        if directions == BOTH_DIRECTIONS and self.partition_mode != "per_direction":
            raise NotImplementedError(
                f"partition_mode: got {self.partition_mode!r}; accepted for both directions is 'per_direction'"
            )
        if self.hardness_mode is not None:
            raise NotImplementedError(f"hardness_mode: got {self.hardness_mode!r}; accepted is None")
        if self.similarity_fct not in (cos_sim, dot_score):
            raise NotImplementedError(
                f"similarity_fct: got {self.similarity_fct!r}; accepted are cos_sim and dot_score of "
                "sentence_transformers.util"
            )

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss, 0-D, of embeddings [n, d]: the queries', their positives', and any number of negatives'."""
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: got {len(embeddings)}; at least those of queries and positives are needed")
        direction = "both" if set(self.directions) == BOTH_DIRECTIONS else "image_to_text"
        queries, *documents = embeddings
        normalize = self.similarity_fct is cos_sim
        group = torch.distributed.group.WORLD if self.gather_across_devices and _processes() > 1 else None
        return contrastive_loss(
            queries,
            torch.cat(documents),
            self.scale,
            normalize=normalize,
            direction=direction,
            group=group,
            backend=self.backend,
        )


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
