"""clipfast: CLIP's contrastive loss, exact and fast, in memory linear in the batch size."""

from __future__ import annotations

from clipfast.cached import cached_loss, cached_step
from clipfast.dispatch import backends
from clipfast.explanation import Explanation, explain
from clipfast.functional import contrastive_loss, distillation_loss, projected_contrastive_loss, siglip_loss
from clipfast.metrics import retrieval_metrics
from clipfast.modules import ContrastiveLoss, ProjectionHead, SigLipLoss
from clipfast.prefixes import matryoshka

__version__ = "0.1.0"

__all__ = [
    "ContrastiveLoss",
    "Explanation",
    "ProjectionHead",
    "SigLipLoss",
    "backends",
    "cached_loss",
    "cached_step",
    "contrastive_loss",
    "distillation_loss",
    "explain",
    "matryoshka",
    "projected_contrastive_loss",
    "retrieval_metrics",
    "siglip_loss",
]
