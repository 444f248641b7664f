"""The model of a run: built from its flags, frozen in part, compiled, replicated or sharded."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from clipfast.models import CLIP, CONFIGS, build_model
from clipfast.modules import ContrastiveLoss, SigLipLoss
from clipfast.training.flags import Refused

CONTEXT_LENGTH = 77
SIGLIP_SCALE, SIGLIP_BIAS = math.log(10), -10.0  # Zhai et al. 2023, arXiv:2303.15343


class Biased(nn.Module):
    """A CLIP with a learned bias of its logits."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip
        with torch.no_grad():
            clip.head.logit_scale.fill_(SIGLIP_SCALE)
        self.logit_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The sigmoid loss's arguments."""
        return {**self.clip(images, tokens), "logit_bias": self.logit_bias}


def image_size(settings: argparse.Namespace) -> int:
    """Height and width of the pictures, in pixels."""
    return CONFIGS[settings.model].image_size


def build(settings: argparse.Namespace, vocab_size: int) -> nn.Module:
    """A new model on the CPU with weights by the seed; frozen encoders are as the flags say.

    Raises:
        Refused: a flag that the model cannot have.
    """
    torch.manual_seed(settings.seed)
    clip = build_model(settings.model, vocab_size, CONTEXT_LENGTH, settings.text)
    for locked, encoder in ((settings.lock_image, clip.image_encoder), (settings.lock_text, clip.text_encoder)):
        encoder.requires_grad_(not locked)
    if settings.grad_checkpointing:
        blocks = _blocks(clip, "blocks")
        if not blocks or CONFIGS[settings.model].patch_size is None:
            # Computed twice, batch normalization would count every micro-batch twice.
            raise Refused(
                "--grad-checkpointing: accepted with the Vision Transformers; --accum-freq saves memory in any"
            )
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    model: nn.Module = Biased(clip) if settings.siglip else clip
    return model.to(torch.bfloat16) if settings.precision == "pure_bf16" else model


def _blocks(model: nn.Module, names: str = "blocks|stages") -> list[nn.Module]:
    return [m for name, m in model.named_modules() if re.search(rf"\.({names})\.\d+$", name)]


def clip_of(model: nn.Module) -> CLIP:
    """The CLIP in what `build` made."""
    clip = model.clip if isinstance(model, Biased) else model
    assert isinstance(clip, CLIP)
    return clip


def set_training(model: nn.Module, settings: argparse.Namespace) -> None:
    """Training mode; a frozen encoder's batch normalization stays as it is."""
    model.train()
    for name, module in model.named_modules():
        if (settings.lock_image and name.endswith("image_encoder")) or (
            settings.lock_text and name.endswith("text_encoder")
        ):
            module.eval()


def spread(model: nn.Module, settings: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model for this process: compiled, and replicated or sharded if there are several."""
    model = model.to(device)
    if not settings.fsdp:  # which shards contiguous parameters alone
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # faster on a CPU
    if settings.torchcompile:
        model.compile()
    if not dist.is_initialized():
        return model
    if not settings.fsdp:
        return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])
    for module in model.modules():
        for name in ("logit_scale", "logit_bias"):
            if isinstance(parameter := getattr(module, name, None), nn.Parameter):  # FSDP2 shards no 0-D parameter
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1)))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*_blocks(model), clip_of(model).image_encoder, clip_of(model).text_encoder):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make_loss(settings: argparse.Namespace) -> ContrastiveLoss | SigLipLoss:
    """The loss over all processes; the contrastive one has in-batch accuracy from the same pass."""
    where: dict[str, Any] = {"group": dist.group.WORLD, "equal_shards": True} if dist.is_initialized() else {}
    return SigLipLoss(**where) if settings.siglip else ContrastiveLoss(return_metrics=True, **where)


def autocast_of(settings: argparse.Namespace, device: torch.device) -> Callable[[], torch.autocast]:
    """Autocast by --precision; amp is the device's own dtype."""
    dtype = torch.bfloat16 if settings.precision.startswith("amp_") else torch.get_autocast_dtype(device.type)
    return partial(torch.autocast, device.type, dtype, enabled=settings.precision.startswith("amp"))
