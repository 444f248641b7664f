"""CLIP's objective in the paper's words, dense and slow: the oracle that everything else is judged against.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021, arXiv:2103.00020),
figure 3. Works in any floating dtype; float64 inputs give the truth. Stores the n*m logits, several times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def l2_normalize(features: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero (the same floor as torch.nn.functional.normalize)."""
    norms: Tensor = features.norm(dim=1, keepdim=True)
    return features / norms.clamp_min(1e-12)


def embed(
    image_features: Tensor,  # I_f [n, d_i]
    text_features: Tensor,  # T_f [m, d_t]
    w_i: Tensor,  # [d_i, d]
    w_t: Tensor,  # [d_t, d]
) -> tuple[Tensor, Tensor]:  # I_e [n, d], T_e [m, d]
    """Joint multimodal embedding: project, then l2-normalize."""
    return l2_normalize(image_features @ w_i), l2_normalize(text_features @ w_t)


def logits(
    image_embeddings: Tensor,  # I_e [n, d]
    text_embeddings: Tensor,  # T_e [m, d]
    logit_scale: Tensor | float,  # exp(t)
    logit_bias: Tensor | float = 0.0,
) -> Tensor:  # [n, m]
    """Scaled pairwise cosine similarities."""
    return logit_scale * (image_embeddings @ text_embeddings.T) + logit_bias


def contrastive_loss(
    image_embeddings: Tensor,  # [n, d]
    text_embeddings: Tensor,  # [m, d], m >= n; text i is the match of image i, the rest are extra negatives
    logit_scale: Tensor | float,
    logit_bias: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:  # 0-D
    """Symmetric cross-entropy: images choose among all texts, the n matched texts among all images."""
    scores = logits(image_embeddings, text_embeddings, logit_scale, logit_bias)
    n = len(scores)
    labels = torch.arange(n, device=scores.device)
    loss_i = cross_entropy(scores, labels, label_smoothing=label_smoothing)
    loss_t = cross_entropy(scores.T[:n], labels, label_smoothing=label_smoothing)
    return (loss_i + loss_t) / 2


def image_to_text_loss(
    image_embeddings: Tensor,  # [n, d]
    text_embeddings: Tensor,  # [m, d], m >= n
    logit_scale: Tensor | float,
    logit_bias: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:  # 0-D
    """One direction of it: images choose among all texts."""
    scores = logits(image_embeddings, text_embeddings, logit_scale, logit_bias)
    return cross_entropy(scores, torch.arange(len(scores), device=scores.device), label_smoothing=label_smoothing)


def clip_loss(
    image_features: Tensor,  # I_f [n, d_i]
    text_features: Tensor,  # T_f [m, d_t]
    w_i: Tensor,  # [d_i, d]
    w_t: Tensor,  # [d_t, d]
    t: Tensor,  # 0-D, the learned temperature
) -> Tensor:  # 0-D
    """Figure 3 of the paper from the encoders' outputs on: embed, scale by exp(t), symmetric cross-entropy."""
    return contrastive_loss(*embed(image_features, text_features, w_i, w_t), t.exp())
