"""The losses as modules that stand where open_clip's stand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from clipfast import arguments
from clipfast.collectives import world_of
from clipfast.functional import contrastive_loss, projected_contrastive_loss, siglip_loss
from clipfast.norms import l2_normalize


class Loss(nn.Module):
    """What an open_clip loss was constructed with, and the options of the function that computes it here."""

    def __init__(self, constructor: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__()
        rank, world_size = constructor["rank"], constructor["world_size"]
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}; accepted is a number below world_size, {world_size}")
        if constructor.get("use_horovod"):
            raise ValueError("use_horovod: got True; accepted is False, with torch.distributed in place of Horovod")
        if world_size > 1 and options.get("group") is not None:
            raise ValueError(f"world_size: got {world_size} together with a group; accepted is one of both")
        self.constructor = constructor
        self.options = options

    def options_of_call(self, image_features: object, **ids: Tensor | None) -> dict[str, Any]:
        """The function's options, with the group of the call."""
        return {**ids, **self.options, **self.group_of_call(image_features)}

    def group_of_call(self, image_features: object) -> dict[str, Any]:
        """The group of the processes that the constructor named, if it named some."""
        rank, world_size = self.constructor["rank"], self.constructor["world_size"]
        if world_size == 1:
            return {}
        device, equal_shards = arguments.device_of(image_features), self.options.get("equal_shards", False)
        return {"group": world_of(rank, world_size, device, equal_shards)}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (self.constructor | self.options).items())


class ContrastiveLoss(Loss):
    """`clipfast.contrastive_loss` with the constructor and the forward of open_clip.ClipLoss (3.3.0).

    Args:
        local_loss: accepted, as gather_with_grad: the loss and its gradients are right, and cost least, with any flags.
        gather_with_grad: accepted.
        cache_labels: accepted; there are no labels to cache.
        rank: this process's number in range(world_size).
        world_size: the number of processes; with more than 1 the loss is that of all of torch.distributed's. With 1
            inside a larger job it is that of this process's own rows, as in open_clip.
        use_horovod: must be False.
        options: the keyword options of `clipfast.contrastive_loss`, but for the ids, which come with each batch. With
            return_metrics the metrics of the last forward are in the attribute `metrics`; forward returns the loss.

    Raises:
        TypeError: an option is unknown.
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
        **options: Any,
    ) -> None:
        constructor = {
            "local_loss": local_loss,
            "gather_with_grad": gather_with_grad,
            "cache_labels": cache_labels,
            "rank": rank,
            "world_size": world_size,
            "use_horovod": use_horovod,
        }
        super().__init__(constructor, arguments.options_of(contrastive_loss, options))
        self.metrics: dict[str, Tensor] = {}

    def forward(
        self,
        image_features: Tensor,  # [n, d]
        text_features: Tensor,  # [m, d]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,  # [n]
        text_ids: Tensor | None = None,  # [m]
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-D; with output_dict a dict with it under "contrastive_loss" and no other key."""
        options = self.options_of_call(image_features, image_ids=image_ids, text_ids=text_ids)
        loss: Any = contrastive_loss(image_features, text_features, logit_scale, logit_bias, **options)
        if self.options.get("return_metrics"):
            loss, self.metrics = loss
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(Loss):
    """`clipfast.siglip_loss` with the constructor and the forward of open_clip.SigLipLoss (3.3.0).

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank: this process's number in range(world_size).
        world_size: the number of processes, as in ContrastiveLoss.
        dist_impl: None, "bidir", "shift", "reduce" or "gather": accepted; the option `scheme` says how texts travel.
        options: the keyword options of `clipfast.siglip_loss`, but for the ids, which come with each batch.

    Raises:
        TypeError: an option is unknown.
        ValueError: rank lies outside range(world_size), or dist_impl is unknown; in the call, rank and world_size are
            not those of torch.distributed.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        **options: Any,
    ) -> None:
        if dist_impl is not None:
            arguments.choice("dist_impl", dist_impl, ("bidir", "shift", "reduce", "gather"))
        constructor = {"cache_labels": cache_labels, "rank": rank, "world_size": world_size, "dist_impl": dist_impl}
        super().__init__(constructor, arguments.options_of(siglip_loss, options))

    def forward(
        self,
        image_features: Tensor,  # [n, d]
        text_features: Tensor,  # [m, d]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
        *,
        image_ids: Tensor | None = None,  # [n]
        text_ids: Tensor | None = None,  # [m]
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-D; with output_dict a dict with it under "contrastive_loss" and no other key."""
        bias = 0.0 if logit_bias is None else logit_bias
        options = self.options_of_call(image_features, image_ids=image_ids, text_ids=text_ids)
        loss = siglip_loss(image_features, text_features, logit_scale, bias, **options)
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

    def forward(self, image_features: Tensor, text_features: Tensor, **options: Any) -> Tensor:
        """The contrastive loss, 0-D, of image features [n, image_dim] and text features [m, text_dim], m >= n.

        `options` are those of `clipfast.projected_contrastive_loss`, and what comes back is what it returns.
        """
        return projected_contrastive_loss(
            image_features, text_features, self.w_i, self.w_t, self.logit_scale.exp(), **options
        )
