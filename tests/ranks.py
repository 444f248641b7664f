"""Processes that are ranks of a gloo group and run what a test sends them."""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
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

from clipfast.problem import accumulation_dtype
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
TIMEOUT = 20  # seconds that a rank waits for another
GROUPS: dict[tuple[int, ...], Any] = {}  # of a rank's process, by their ranks


class Failed(Exception):
    """An error in a rank's process: its type's name and its text."""


class Ranks:
    """`count` processes; `run` has each call a function, and returns what each returned or how it failed."""

    def __init__(self, count: int, timeout: float = TIMEOUT) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            here, there = context.Pipe()
            store = Path(self.folder.name) / "store"
            process = context.Process(target=_serve, args=(there, rank, count, str(store), timeout), daemon=True)
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


def _serve(pipe: Connection, rank: int, count: int, store: str, timeout: float) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=datetime.timedelta(seconds=timeout)
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
        Options(**DEFAULTS | options),
        group=group,
        grad_reduction=grad_reduction,
        scheme=scheme,
        equal_shards=equal_shards,
    )
    gradient = torch.as_tensor(upstream[rank] if upstream else 1.0, dtype=loss.dtype).expand(loss.shape)
    gradients = torch.autograd.grad(loss, (x, y, s, b), gradient, retain_graph=True)
    again = torch.autograd.grad(loss, (x, y, s, b), gradient)
    assert all(torch.equal(g.nan_to_num(), a.nan_to_num()) for g, a in zip(gradients, again, strict=True))
    result = dict(zip(("dx", "dy", "dscale", "dbias"), gradients, strict=True)) | {"loss": loss.detach()}
    return result if row_above is None else result | {"row_above": row_above, "col_above": col_above}
