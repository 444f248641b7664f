"""The losses as modules that stand where open_clip's stand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.collectives import world_of
from clipfast.functional import contrastive_loss
from clipfast.norms import l2_normalize


class ContrastiveLoss(nn.Module):
    """`clipfast.contrastive_loss` with the constructor and the forward of open_clip.ClipLoss (3.3.0).

    Args:
        local_loss: accepted, as gather_with_grad: the loss and its gradients are right, and cost least, with any flags.
        gather_with_grad: accepted.
        cache_labels: accepted; there are no labels to cache.
        rank: this process's number in range(world_size).
        world_size: the number of processes; with more than 1 the loss is that of all of torch.distributed's. With 1
            inside a larger job it is that of this process's own rows, as in open_clip.
        use_horovod: must be False.
        normalize, label_smoothing, group, grad_reduction, scheme, equal_shards, deterministic, backend: see
            `clipfast.contrastive_loss`.

    Raises:
        ValueError: rank lies outside range(world_size); use_horovod; in the call, rank and world_size are not those of
            torch.distributed.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        normalize: bool = False,
        label_smoothing: float = 0.0,
        group: Any = None,
        grad_reduction: str = "mean",
        scheme: str = "auto",
        equal_shards: bool = False,
        deterministic: bool | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}; accepted is a number below world_size, {world_size}")
        if use_horovod:
            raise ValueError("use_horovod: got True; accepted is False, with torch.distributed in place of Horovod")
        if world_size > 1 and group is not None:
            raise ValueError(f"world_size: got {world_size} together with a group; accepted is one of both")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        self.group = group
        self.grad_reduction = grad_reduction
        self.scheme = scheme
        self.equal_shards = equal_shards
        self.deterministic = deterministic
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,  # [n, d]
        text_features: Tensor,  # [m, d]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-D; with output_dict a dict with it under "contrastive_loss" and no other key."""
        loss = contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            normalize=self.normalize,
            label_smoothing=self.label_smoothing,
            group=world_of(self.rank, self.world_size) if self.world_size > 1 else self.group,
            grad_reduction=self.grad_reduction,
            scheme=self.scheme,
            equal_shards=self.equal_shards,
            deterministic=self.deterministic,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class ProjectionHead(nn.Module):
    """The contrastive core of CLIP on top of two encoders: W_i, W_t, the learned temperature, and the loss.

    Radford et al. 2021 (arXiv:2103.00020), figure 3 and section 2.5: x = l2norm(I_f W_i), y = l2norm(T_f W_t),
    logits exp(t) x y^T with t learned from log(1/0.07).

    Args:
        image_dim: width of the image encoder's features.
        text_dim: width of the text encoder's features.
        embed_dim: d, the width of the joint embedding.
        init_logit_scale: the initial t. The parameter `logit_scale` holds t, the loss sees exp(t).

    Raises:
        ValueError: a width is not positive.
    """

    def __init__(
        self, image_dim: int, text_dim: int, embed_dim: int, init_logit_scale: float = math.log(1 / 0.07)
    ) -> None:
        super().__init__()
        for name, width in {"image_dim": image_dim, "text_dim": text_dim, "embed_dim": embed_dim}.items():
            if width < 1:
                raise ValueError(f"{name}: got {width}; accepted is a positive width")
        self.w_i = nn.Parameter(torch.empty(image_dim, embed_dim).normal_(std=image_dim**-0.5))
        self.w_t = nn.Parameter(torch.empty(text_dim, embed_dim).normal_(std=text_dim**-0.5))
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale))

    def encode_image(self, image_features: Tensor) -> Tensor:
        """[n, image_dim] -> l2-normalized image embeddings [n, embed_dim]."""
        return l2_normalize(image_features @ self.w_i)

    def encode_text(self, text_features: Tensor) -> Tensor:
        """[n, text_dim] -> l2-normalized text embeddings [n, embed_dim]."""
        return l2_normalize(text_features @ self.w_t)

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """The contrastive loss, 0-D, of image features [n, image_dim] and text features [m, text_dim], m >= n."""
        return contrastive_loss(
            image_features @ self.w_i, text_features @ self.w_t, self.logit_scale.exp(), normalize=True
        )
