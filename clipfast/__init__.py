"""clipfast: CLIP's contrastive loss, exact and fast, in memory linear in the batch size."""

from __future__ import annotations

from clipfast.dispatch import Explanation, backends, explain
from clipfast.functional import contrastive_loss
from clipfast.metrics import retrieval_metrics
from clipfast.modules import ContrastiveLoss, ProjectionHead

__version__ = "0.1.0"

__all__ = [
    "ContrastiveLoss",
    "Explanation",
    "ProjectionHead",
    "backends",
    "contrastive_loss",
    "explain",
    "retrieval_metrics",
]
