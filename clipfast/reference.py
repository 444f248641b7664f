"""CLIP's objective and its family in the papers' words, dense and slow: the oracle of all tests.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021, arXiv:2103.00020),
figure 3. Works in any floating dtype; float64 inputs give the truth. Stores the n*m logits, several times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, softmax


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


def contrastive_losses(
    image_embeddings: Tensor,  # [n, d]
    text_embeddings: Tensor,  # [m, d], m >= n; text i is the match of image i, the rest are extra negatives
    logit_scale: Tensor | float,
    logit_bias: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
    image_ids: Tensor | None = None,  # [n]
    text_ids: Tensor | None = None,  # [m]
    same_id: str = "ignore",
    direction: str = "both",
) -> Tensor:  # [2, n]: images choose among all texts, the n matched texts among all images; or [1, n], one of these
    """Cross-entropies of every row and every matched column.

    Pairs off the diagonal with equal ids are left out ("ignore"), or are positives too, over which the target is
    uniform ("positive"; Khosla et al. 2020, arXiv:2004.11362, equation 2).
    """
    scores = logits(image_embeddings, text_embeddings, logit_scale, logit_bias)
    n = len(scores)
    own, same = _pairs(scores, image_ids, text_ids)
    directions = {"image_to_text": (scores, own, same), "text_to_image": (scores.T[:n], own.T[:n], same.T[:n])}
    chosen = directions if direction == "both" else (direction,)
    return torch.stack([_cross_entropies(*directions[name], label_smoothing, same_id) for name in chosen])


def _cross_entropies(
    scores: Tensor,  # [n, m]
    own: Tensor,  # [n, m]
    same: Tensor,  # [n, m]
    label_smoothing: float,
    same_id: str,
) -> Tensor:  # [n]
    if not same.any():
        labels = torch.arange(len(scores), device=scores.device)
        return cross_entropy(scores, labels, label_smoothing=label_smoothing, reduction="none")
    positive, allowed = (own, ~same) if same_id == "ignore" else (own | same, torch.ones_like(own))
    uniform = [t.to(scores.dtype) / t.sum(1, keepdim=True) for t in (positive, allowed)]
    target = (1 - label_smoothing) * uniform[0] + label_smoothing * uniform[1]
    log_probabilities = log_softmax(scores.masked_fill(~allowed, -torch.inf), dim=1)
    return -(target * log_probabilities.masked_fill(~allowed, 0)).sum(1)


def _pairs(scores: Tensor, image_ids: Tensor | None, text_ids: Tensor | None) -> tuple[Tensor, Tensor]:  # [n, m]
    """Which pairs are matches, and which others have equal ids."""
    own = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    if image_ids is None or text_ids is None:
        return own, torch.zeros_like(own)
    return own, (image_ids[:, None] == text_ids) & ~own


def contrastive_loss(
    image_embeddings: Tensor,  # [n, d]
    text_embeddings: Tensor,  # [m, d], m >= n
    logit_scale: Tensor | float,
    logit_bias: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
    direction: str = "both",
) -> Tensor:  # 0-D
    """Symmetric cross-entropy, or that of one direction: the mean of `contrastive_losses`."""
    options = label_smoothing, image_ids, text_ids, same_id, direction
    return contrastive_losses(image_embeddings, text_embeddings, logit_scale, logit_bias, *options).mean()


def clip_loss(
    image_features: Tensor,  # I_f [n, d_i]
    text_features: Tensor,  # T_f [m, d_t]
    w_i: Tensor,  # [d_i, d]
    w_t: Tensor,  # [d_t, d]
    t: Tensor,  # 0-D, the learned temperature
) -> Tensor:  # 0-D
    """Figure 3 of the paper from the encoders' outputs on: embed, scale by exp(t), symmetric cross-entropy."""
    return contrastive_loss(*embed(image_features, text_features, w_i, w_t), t.exp())


def siglip_loss(
    image_embeddings: Tensor,  # [n, d]
    text_embeddings: Tensor,  # [m, d], m >= n
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "ignore",
) -> Tensor:  # 0-D
    """Zhai et al. 2023 (arXiv:2303.15343), equation 1: every pair is a yes or no of its own, summed over texts."""
    scores = logits(image_embeddings, text_embeddings, logit_scale, logit_bias)
    own, same = _pairs(scores, image_ids, text_ids)
    labels = torch.where(own | same if same_id == "positive" else own, 1.0, -1.0).to(scores.dtype)
    losses = -logsigmoid(labels * scores)
    return (losses.masked_fill(same, 0) if same_id == "ignore" else losses).sum() / len(scores)


def distillation_loss(
    image_embeddings: Tensor,  # [n, d]
    text_embeddings: Tensor,  # [m, d], m >= n
    logit_scale: Tensor | float,
    teacher_image_embeddings: Tensor,  # [n, d']
    teacher_text_embeddings: Tensor,  # [m, d']
    teacher_logit_scale: Tensor | float,
) -> Tensor:  # 0-D
    """Cross-entropy of the student's softmaxes under the teacher's, as open_clip's DistillClipLoss has it."""
    student = logits(image_embeddings, text_embeddings, logit_scale)
    teacher = logits(teacher_image_embeddings, teacher_text_embeddings, teacher_logit_scale)
    n = len(student)
    directions = ((student, teacher), (student.T[:n], teacher.T[:n]))
    return torch.stack([-(softmax(t, 1) * log_softmax(s, 1)).sum(1).mean() for s, t in directions]).mean()
