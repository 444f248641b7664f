"""open_clip and the patch of its losses, for the tests of both; skips where it is missing."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from torch import Tensor

open_clip = pytest.importorskip("open_clip", reason="open_clip is missing; the extra `open-clip` brings it")
integration = importlib.import_module("clipfast.integrations.open_clip")
params, distributed, train = (
    importlib.import_module(f"open_clip_train.{name}") for name in ("params", "distributed", "train")
)


def arguments(*flags: str) -> Any:
    """What open_clip's training script makes of its command line."""
    args = params.parse_args([*flags, "--device", "cpu", "--precision", "fp32", "--skip-scheduler"])
    distributed.init_distributed_device(args)
    args.distill = args.distill_model is not None
    args.wandb = False
    return args


def dense_loss(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """open_clip's formula, whatever forward is installed."""
    loss: Tensor = integration.OPEN_CLIP_FORWARDS[open_clip.ClipLoss](open_clip.ClipLoss(), x, y, s, b)
    return loss
