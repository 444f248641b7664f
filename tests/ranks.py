"""Processes that are ranks of a gloo group and run what a test sends them."""

from __future__ import annotations

import datetime
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from towers import Towers

import clipfast
from benchmarks.environment import SavedStorages
from benchmarks.scaling import Counter
from clipfast.problem import accumulation_dtype
from clipfast.schemes import GroupOptions
from clipfast.softmax import Options

DEFAULTS = {
    "normalize": False,
    "label_smoothing": 0.0,
    "direction": "both",
    "reduction": "mean",
    "same_id": "ignore",
    "metrics": False,
    "backend": "torch",
}
FAIL_TIMEOUT = 4
TIMEOUT = 60  # seconds that a rank waits for another
GROUPS: dict[tuple[int, ...], Any] = {}  # of a rank's process, by their ranks


class Failed(Exception):
    """An error in a rank's process: its type's name and its text."""


class Ranks:
    """`count` processes; `run` has each call a function, and returns what each returned or how it failed."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            here, there = context.Pipe()
            store = Path(self.folder.name) / "store"
            process = context.Process(target=_serve, args=(there, rank, count, str(store)), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, ranks: Sequence[int] | None = None) -> list[Any]:
        """`function(rank in the group, group, *arguments)` on these ranks (all by default), in a group of them."""
        members = tuple(range(len(self.pipes)) if ranks is None else ranks)
        call = pickle.dumps((function, members, arguments))
        for pipe in self.pipes:
            pipe.send_bytes(call)
        results = [_receive(pipe) for pipe in self.pipes]
        return [results[rank] for rank in members]

    def kill(self) -> None:
        """End processes that do not answer any more."""
        for process in self.processes:
            process.kill()
        self.close()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=TIMEOUT)
            process.kill()
        self.folder.cleanup()


def _receive(pipe: Connection) -> Any:
    try:
        failed, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return Failed("the process ended")
    return Failed(result) if failed else result


def _serve(pipe: Connection, rank: int, count: int, store: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=datetime.timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            function, members, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        torch.manual_seed(0)
        try:
            group = group_of(members)
            result = False, function(members.index(rank), group, *arguments) if rank in members else None
        except Exception as error:
            traceback.print_exc()
            result = True, f"{type(error).__name__}: {error}"
        pipe.send_bytes(pickle.dumps(result))
    time.sleep(0.5)  # see conftest.process_group
    dist.destroy_process_group()


def group_of(members: tuple[int, ...]) -> Any:
    """The group of these ranks, made by all ranks when any first asks for it."""
    if members not in GROUPS:
        whole = members == tuple(range(dist.get_world_size()))
        GROUPS[members] = dist.group.WORLD if whole else dist.new_group(list(members))
    return GROUPS[members]


def contrastive(
    rank: int,
    group: Any,
    shards: Sequence[dict[str, Any]],  # each rank's x [n, d], y [m, d], perhaps image_ids and text_ids
    scale: float,
    bias: float,
    options: dict[str, Any],
    upstream: Sequence[Any] = (),  # each rank's
    scheme: str = "gather",
    grad_reduction: str = "mean",
    equal_shards: bool = False,
) -> dict[str, torch.Tensor]:
    """This rank's loss, gradients and counts."""
    from clipfast import distributed

    shard = shards[rank]
    x, y = (shard[name].detach().requires_grad_() for name in ("x", "y"))
    s, b = (torch.tensor(v, dtype=accumulation_dtype(x.dtype), requires_grad=True) for v in (scale, bias))
    loss, row_above, col_above = distributed.contrastive_loss(
        x,
        y,
        s,
        b,
        shard.get("image_ids"),
        shard.get("text_ids"),
        Options(**DEFAULTS | {name: value for name, value in options.items() if name != "keep_bytes"}),
        GroupOptions(group, grad_reduction, scheme, equal_shards),
        options.get("keep_bytes", 0),
    )
    gradient = torch.as_tensor(upstream[rank] if upstream else 1.0, dtype=loss.dtype).expand(loss.shape)
    gradients = torch.autograd.grad(loss, (x, y, s, b), gradient, retain_graph=True)
    again = torch.autograd.grad(loss, (x, y, s, b), gradient)
    assert all(torch.equal(g.nan_to_num(), a.nan_to_num()) for g, a in zip(gradients, again, strict=True))
    result = dict(zip(("dx", "dy", "dscale", "dbias"), gradients, strict=True)) | {"loss": loss.detach()}
    return result if row_above is None else result | {"row_above": row_above, "col_above": col_above}


def formed(
    rank: int,
    group: Any,
    name: str,  # of the loss
    shards: Sequence[
        dict[str, Any]
    ],  # each rank's x [n, d], y [m, d], perhaps image_ids and text_ids, and its teacher's
    scale: float,
    bias: float,
    options: dict[str, Any],
    upstream: Sequence[float] = (),
) -> dict[str, torch.Tensor]:
    """This rank's siglip_loss or distillation_loss, and its gradients."""
    inputs = dict(shards[rank])
    x, y = (inputs.pop(key).detach().requires_grad_() for key in ("x", "y"))
    s, b = (torch.tensor(v, dtype=accumulation_dtype(x.dtype), requires_grad=True) for v in (scale, bias))
    if name == "siglip_loss":
        loss = clipfast.siglip_loss(x, y, s, b, **inputs, group=group, **options)
    else:
        loss = clipfast.distillation_loss(x, y, s, *inputs.values(), group=group, **options) + 0 * b
    gradient = torch.tensor(upstream[rank] if upstream else 1.0, dtype=loss.dtype)
    gradients = torch.autograd.grad(loss, (x, y, s, b), gradient, retain_graph=True)
    again = torch.autograd.grad(loss, (x, y, s, b), gradient)
    assert all(torch.equal(g, a) for g, a in zip(gradients, again, strict=True))
    return dict(zip(("dx", "dy", "dscale", "dbias"), gradients, strict=True)) | {"loss": loss.detach()}


def retrieval(
    rank: int, group: Any, shards: Sequence[dict[str, Any]], options: dict[str, Any]
) -> tuple[dict[str, float], int]:
    """The metrics, and the multiply-adds of this rank's forward passes."""
    shard = dict(shards[rank])
    with Counter() as counter:
        metrics = clipfast.retrieval_metrics(shard.pop("x"), shard.pop("y"), **shard, group=group, **options)
    return metrics, counter.products


def cost(
    rank: int,
    group: Any,
    name: str,  # of the loss
    shards: Sequence[dict[str, Any]],
    options: dict[str, Any],
    scheme: str = "gather",
    equal_shards: bool = False,
) -> tuple[int, int, int, int, int]:
    """Bytes sent forward and backward, multiply-adds, bytes saved between the passes and the peak, but for x and y."""
    shard = shards[rank]
    x, y = (shard[key].detach().clone().requires_grad_() for key in ("x", "y"))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (14.3, 0.0))
    ids = {key: shard[key].clone() for key in ("image_ids", "text_ids") if key in shard}
    teacher = (x.detach(), y.detach(), 3.0) if name == "distillation_loss" else (bias,)

    with (
        Counter() as counter,
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler,
    ):
        with SavedStorages() as saved:
            how = {"group": group, "scheme": scheme, "equal_shards": equal_shards, "backend": "torch"}
            loss = getattr(clipfast, name)(x, y, scale, *teacher, **ids, **how | options)
            loss = loss[0] if isinstance(loss, tuple) else loss
        forward = counter.sent
        loss.sum().backward()
    events = profiler.profiler.kineto_results.events()
    peak = max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    return forward, counter.sent - forward, counter.products, saved.total, peak


def step(
    rank: int,
    group: Any,
    images: list[torch.Tensor],
    texts: list[torch.Tensor],
    wrapper: str,
    loss_options: dict[str, Any],
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three optimizer steps of a small CLIP under DDP or FSDP2: the losses, and the parameters after them."""
    model = Towers().double()
    wrapped: Any = model
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model, process_group=group)
    elif wrapper == "fsdp2":
        for name in ("logit_scale", "logit_bias"):  # FSDP2 shards no 0-D parameter
            setattr(model, name, nn.Parameter(getattr(model, name).detach().reshape(1)))
        mesh = DeviceMesh.from_group(group, "cpu")
        fully_shard(model.image, mesh=mesh)
        fully_shard(model.text, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5, momentum=0.9)
    loss_options = loss_options if loss_options.get("world_size") else loss_options | {"group": group}
    if "world_size" in loss_options:
        loss_options = loss_options | {"rank": rank}
    loss, losses = clipfast.ContrastiveLoss(backend="torch", **loss_options), []
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(**wrapped(images[rank], texts[rank]))
        value.backward()
        if loss_options.get("grad_reduction") == "sum":
            for parameter in model.parameters():
                parameter.grad *= dist.get_world_size(group)
        optimizer.step()
        losses.append(value.item())
    parameters = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone().squeeze()
        for name, p in model.named_parameters()
    }
    return losses, parameters


def mesh_step(rank: int, group: Any, x: torch.Tensor, y: torch.Tensor, scheme: str) -> list[torch.Tensor]:
    """A 2 x 2 mesh: in one step the losses over this rank's row and its column, and their gradients."""
    rows, columns = [group_of(members) for members in ((0, 1), (2, 3))], [group_of(m) for m in ((0, 2), (1, 3))]
    x, y = (t[rank].detach().requires_grad_() for t in (x, y))
    results = []
    losses = [
        clipfast.contrastive_loss(x, y, 14.3, group=group, scheme=scheme, backend="torch")
        for group in (rows[rank // 2], columns[rank % 2])
    ]
    for loss in losses:
        results += [loss.detach(), *torch.autograd.grad(loss, (x, y), retain_graph=True)]
    together = torch.autograd.grad(losses[0] + losses[1], (x, y))
    return [*results, *together]


def call(
    rank: int, group: Any, per_rank: Sequence[dict[str, Any]], shapes: Sequence[tuple[int, int, int]] = ()
) -> float:
    """contrastive_loss with this rank's keywords; shapes are n, m and d of each rank."""
    n, m, d = shapes[rank] if shapes else (3, 3, 4)
    keywords = {"logit_scale": torch.tensor(2.0, requires_grad=True), "backend": "torch"} | per_rank[rank]
    dtype, requires_grad = keywords.pop("dtype", torch.float32), keywords.pop("requires_grad", True)
    x, y = (torch.randn(rows, d).to(dtype).requires_grad_(requires_grad) for rows in (n, m))
    with torch.set_grad_enabled(keywords.pop("grad", True)):
        loss = clipfast.contrastive_loss(x, y, group=group, **keywords)
    if loss.requires_grad:
        loss.backward()
    return loss.item()


def named(rank: int, group: Any, loss: str, ranks: Sequence[int], world_sizes: Sequence[int]) -> float:
    """A module's loss with the rank and the world_size that this rank is said to have."""
    module = getattr(clipfast, loss)(rank=ranks[rank], world_size=world_sizes[rank], backend="torch")
    x = torch.randn(3, 4)
    return module(x, x, 2.0, 0.5).item()  # type: ignore[no-any-return]


def under_autocast(rank: int, group: Any, x: torch.Tensor, y: torch.Tensor, scheme: str) -> list[list[torch.Tensor]]:
    """Losses, gradients and counts without autocast and with it."""
    x, y = (t[rank].detach().requires_grad_() for t in (x, y))
    found = []
    for enabled in (False, True):
        results = []
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            how = {"normalize": True, "group": group, "scheme": scheme, "backend": "torch"}
            loss, metrics = clipfast.contrastive_loss(x, y, 14.3, return_metrics=True, **how)
            results += metrics.values()
            others = (
                clipfast.siglip_loss(x, y, 14.3, -3.0, **how),
                clipfast.distillation_loss(x, y, 14.3, y.detach(), x.detach(), 5.0, **how),
            )
            for value in (loss, *others):
                results += [value.detach(), *torch.autograd.grad(value, (x, y))]
            options = {"group": group, "scheme": scheme, "backend": "torch"}
            results += [torch.tensor(v) for v in clipfast.retrieval_metrics(x, y, **options).values()]
        found.append(results)
    return found


def fail(rank: int, group: Any, how: str, scheme: str) -> float:
    """A rank raises, ends or hangs between the passes of others."""
    # To connect takes a loaded machine longer than a test should wait for a rank that is gone.
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=FAIL_TIMEOUT), group)
    x = torch.randn(4, 3, requires_grad=True)
    loss = clipfast.contrastive_loss(x, x, 2.0, group=group, scheme=scheme, backend="torch")
    if rank == 1 and how == "raise":
        raise RuntimeError("of its own")
    if rank == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        time.sleep(3 * FAIL_TIMEOUT)
    started = time.monotonic()
    try:
        loss.backward()
    except RuntimeError:
        return time.monotonic() - started
    return math.inf


def compiled(rank: int, group: Any) -> tuple[float, float, list[tuple[str, str]]]:
    """A step under torch.compile and one without: both losses, and why and where the graph breaks."""
    model = Towers()
    loss = clipfast.ContrastiveLoss(group=group, backend="torch")
    images, texts = torch.randn(4, 6), torch.randn(4, 7)

    def forward() -> torch.Tensor:
        return loss(**model(images, texts)) * 2  # type: ignore[no-any-return]

    plain = forward()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch.compile looks for a .grad of what comes out of the break.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        got = torch.compile(forward, backend="aot_eager")()
        breaks = [(b.reason, str(b.user_stack[-1])) for b in torch._dynamo.explain(forward)().break_reasons]
    got.backward()
    expected = torch.autograd.grad(plain, model.image.weight)[0]
    assert torch.allclose(model.image.weight.grad, expected, atol=1e-6)
    return got.item(), plain.item(), breaks
