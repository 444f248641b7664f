"""A cached step as a rank takes it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from towers import Towers

import clipfast


def cached(
    rank: int,
    group: Any,
    images: list[Tensor],
    texts: list[Tensor],
    wrapper: str,
    micro_batch: int,
    options: dict[str, Any],
) -> tuple[float, int, int, dict[str, Tensor]]:
    """Two steps, gradients added: the loss, calls of the encoders, reductions, and the parameters' gradients."""
    model = Towers().double()
    wrapped: Any = model
    reductions = calls = 0

    def count(state, bucket):  # type: ignore[no-untyped-def] # DDP reads annotations, and no deferred ones
        nonlocal reductions
        reductions += 1
        return (
            dist.all_reduce(bucket.buffer().div_(2), group=group, async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    def called(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.image.register_forward_hook(called)
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model, process_group=group)
        wrapped.register_comm_hook(None, count)
    elif wrapper == "fsdp2":
        for name in ("logit_scale", "logit_bias"):  # FSDP2 shards no 0-D parameter
            setattr(model, name, nn.Parameter(getattr(model, name).detach().reshape(1)))
        mesh = DeviceMesh.from_group(group, "cpu")
        fully_shard(model.image, mesh=mesh)
        fully_shard(model.text, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    loss = clipfast.ContrastiveLoss(backend="torch", group=group)
    for _ in range(2):
        value = clipfast.cached_step(wrapped, (images[rank], texts[rank]), loss, micro_batch, **options)
    gradients = {
        name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone().squeeze()
        for name, p in model.named_parameters()
    }
    return value.item(), calls, reductions, gradients
