"""One optimizer step: which parameters decay, how fast they learn, and the cached gradients."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clipfast.cached import cached_step

MAX_LOGIT_SCALE = math.log(100)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters for AdamW: weight decay on matrices and convolutions, none on gains, biases and temperature."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, settings: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW with the paper's numbers for each kind of encoder, but for those given."""
    vit = "vit" in settings.model.lower()
    beta2 = settings.beta2 if settings.beta2 is not None else 0.98 if vit else 0.999
    eps = settings.eps if settings.eps is not None else 1e-6 if vit else 1e-8
    groups = parameter_groups(model, settings.wd)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, beta2), eps=eps)


def learning_rate(
    step: int, steps: int, peak: float, warmup: int, scheduler: str = "cosine", cooldown: int = 0
) -> float:
    """Of step 0..steps-1: a linear warm-up, then half a cosine to 0, or the peak, which a cooldown takes to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if scheduler == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak * min(1.0, (steps - step) / cooldown) if cooldown else peak


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Tensor],
    batch: tuple[Tensor, Tensor],  # images [b, 3, h, w], tokens [b, s]
    micro_batch: int,
    lr: float,
    scaler: torch.amp.GradScaler,
    clip_norm: float | None = None,
) -> Tensor:
    """One step; returns the loss, 0-D, and keeps exp(t) at most 100. Autocast is the caller's."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    value = cached_step(model, batch, loss, micro_batch, scaler=scaler, equal_shards=True)
    if clip_norm is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                whole = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                whole.clamp_(0, MAX_LOGIT_SCALE)
    return value
