"""The processes of a run: who they are, what they agree on, and how they are asked to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

TIMEOUT = timedelta(hours=1)  # rank 0 evaluates and writes while the others wait
Value = TypeVar("Value")


class Elsewhere(Exception):
    """Another rank failed, and tells of it."""


class Job:
    """This process among those of the run, as torchrun's variables say; one alone without them."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        self.stopped_by: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """The group of all processes, and signals that wait for the end of a step; a second one ends at once."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            kinds = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(kinds, timeout=TIMEOUT)
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.world > 1:
                dist.destroy_process_group()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def first(self, work: Callable[[], Value]) -> Value:
        """What `work` gives on rank 0, on all ranks.

        Raises:
            Exception: whatever `work` raises; on the other ranks Elsewhere.
        """
        found: list[Any] = [None, False]
        try:
            if self.is_first:
                found = [work(), True]
        finally:  # also before an error ends this rank
            if self.world > 1:
                dist.broadcast_object_list(found)
        if not found[1]:
            raise Elsewhere
        value: Value = found[0]
        return value

    def total(self, *values: int) -> list[int]:
        """Each number summed over the ranks."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values)
        dist.all_reduce(sums)
        return [int(value) for value in sums.tolist()]

    def largest(self, value: int) -> int:
        """Over the ranks."""
        if self.world == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)
