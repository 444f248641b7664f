"""Everything that ranks send to each other, and the record on which they agree before that.

A tensor travels as its bytes, and nothing is reduced on the way: sums are taken in rank order where the parts arrive,
so that they are bitwise the same on every run and every rank, and any dtype goes.
"""

from __future__ import annotations

import functools
import operator
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

SIZES = "4q"  # of the record: whether the rank refuses its arguments, n, m, and which gradients it wants
VALUES, VALUE_BYTES = 16, 24  # and what must be alike, as text
RECORD = struct.Struct(SIZES + f"{VALUE_BYTES}s" * VALUES)

WANTS_TEXTS, WANTS_ANY = 1, 2


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, numbered as in it."""

    group: dist.ProcessGroup | None  # None only to predict
    rank: int
    count: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Ranks:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, own: Tensor) -> Tensor:  # [...], alike on all ranks -> [count, ...]
        """Every rank's tensor, in rank order."""
        received = own.new_empty((self.count, *own.shape))
        if own.numel():
            # torch 2.13 gave it this name and warns of the other.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(_bytes(received).flatten(), _bytes(own.contiguous()).flatten(), group=self.group)
        return received

    def gather_rows(self, own: Tensor, sizes: Sequence[int]) -> Tensor:  # [own size, ...] -> [sum of sizes, ...]
        """Every rank's rows, in rank order; those of a rank with fewer travel with padding."""
        longest = max(sizes)
        padded = own
        if len(own) < longest:
            padded = own.new_zeros((longest, *own.shape[1:]))
            padded[: len(own)] = own
        received = self.gather(padded)
        if min(sizes) == longest:
            return received.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])

    def sum(self, own: Tensor) -> Tensor:  # [...]
        """The sum over ranks, the same on each."""
        return self.gather(own).sum(dim=0)

    def exchange(self, parts: Tensor, sizes: Sequence[int]) -> Tensor:  # [sum of sizes, ...] -> [count, own size, ...]
        """Send rank q its sizes[q] rows of `parts`; get this rank's rows from every rank, in rank order."""
        own = sizes[self.rank]
        received = parts.new_empty((self.count, own, *parts.shape[1:]))
        arriving = _bytes(received).flatten(0, 1)
        dist.all_to_all_single(arriving, _bytes(parts.contiguous()), [own] * self.count, list(sizes), group=self.group)
        return received

    def pass_on(self, leaving: Sequence[Tensor], arriving: Sequence[Tensor]) -> Callable[[], None]:
        """Start to send tensors to the next rank and to fill others from the one before; what it returns waits."""
        after, before = (self.rank + 1) % self.count, (self.rank - 1) % self.count
        bytes_leaving, bytes_arriving = ([_bytes(t) for t in ts if t.numel()] for ts in (leaving, arriving))
        operations = [dist.P2POp(dist.isend, t, group=self.group, group_peer=after) for t in bytes_leaving]
        operations += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=before) for t in bytes_arriving]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                work.wait()
            bytes_leaving.clear()  # they had to live until here

        return wait


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory."""
    return tensor.unsqueeze(-1).view(torch.uint8)


class Shards(NamedTuple):
    """What all ranks know of each other."""

    images: tuple[int, ...]  # rows of each rank
    texts: tuple[int, ...]
    wants_texts: bool  # whether any rank wants a gradient of its text features
    wants_any: bool  # or of anything


def agree(
    ranks: Ranks, sizes: tuple[int, int], wants: int, alike: Mapping[str, object], device: torch.device
) -> Shards:
    """Exchange the records; nothing else is sent before all ranks have seen that they agree.

    Args:
        ranks: of the group.
        sizes: this rank's n and m.
        wants: WANTS_TEXTS and WANTS_ANY, added.
        alike: what must be alike on all ranks, in an order of its own for each loss.
        device: of the features, from which the group can send.

    Raises:
        ValueError: ranks disagree, one refuses its arguments, or none has a row; the same text on all ranks.
    """
    values = [str(value).encode()[:VALUE_BYTES] for value in alike.values()]
    own = RECORD.pack(0, *sizes, wants, *values, *[b""] * (VALUES - len(values)))
    records = _exchange(ranks, own, device)
    refusing = [rank for rank, record in enumerate(records) if record.refuses]
    if refusing:
        raise ValueError(f"group: {_named(refusing)} refused its arguments, with an error of its own; nothing was sent")
    for place, name in enumerate(alike):
        found: dict[str, list[int]] = {}
        for rank, record in enumerate(records):
            found.setdefault(record.values[place], []).append(rank)
        if len(found) > 1:
            got = ", ".join(f"{value} on {_named(where)}" for value, where in found.items())
            raise ValueError(f"{name}: got {got}; accepted is the same on all ranks of the group")
    images, texts = (tuple(sizes) for sizes in zip(*((r.n, r.m) for r in records), strict=True))
    if not any(images):
        raise ValueError("image_features: got no rows on any rank of the group; at least one is needed")
    wants = functools.reduce(operator.or_, (record.wants for record in records))
    return Shards(images, texts, bool(wants & WANTS_TEXTS), bool(wants & WANTS_ANY))


@contextmanager
def refusing(group: dist.ProcessGroup, device: torch.device, equal_shards: bool) -> Iterator[None]:
    """An error inside, before this rank's record is sent, is told to the other ranks, which wait for the record."""
    try:
        yield
    except (TypeError, ValueError):
        if not equal_shards:
            with suppress(RuntimeError):  # of the group, where others have not come; this rank's own says more
                _exchange(Ranks.of(group), RECORD.pack(1, 0, 0, 0, *[b""] * VALUES), device)
        raise


class _Record(NamedTuple):
    refuses: int
    n: int
    m: int
    wants: int
    values: tuple[str, ...]


def _exchange(ranks: Ranks, record: bytes, device: torch.device) -> list[_Record]:
    sent = torch.frombuffer(bytearray(record), dtype=torch.uint8).to(device)
    received = ranks.gather(sent).cpu().numpy().tobytes()
    records = []
    for refuses, n, m, wants, *values in RECORD.iter_unpack(received):
        records.append(_Record(refuses, n, m, wants, tuple(value.rstrip(b"\0").decode() for value in values)))
    return records


def _named(ranks: list[int]) -> str:
    few = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {few}" if len(ranks) == 1 else f"ranks {few}"


def world_of(rank: int, world_size: int, device: torch.device, equal_shards: bool) -> dist.ProcessGroup:
    """All of the job's processes, which must be `world_size` and this one the `rank`-th; the others are told if not."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"world_size: got {world_size}; accepted is 1 until torch.distributed.init_process_group has been called"
        )
    world = dist.distributed_c10d._get_default_group()
    with refusing(world, device, equal_shards):
        if world_size != dist.get_world_size():
            raise ValueError(
                f"world_size: got {world_size}; accepted is that of torch.distributed, {dist.get_world_size()}"
            )
        if rank != dist.get_rank():
            raise ValueError(f"rank: got {rank}; accepted is that of torch.distributed, {dist.get_rank()}")
    return world


def warn_of_a_local_loss() -> None:
    """Once in a job of several processes whose loss sees this process's rows alone: it is rarely what was meant."""
    if torch.compiler.is_compiling() or not _AVAILABLE or dist.group.WORLD is None:
        return
    if (count := dist.get_world_size()) > 1 and not _warned:
        _warned.append(True)
        warnings.warn(
            f"clipfast: this loss is that of this process's own rows, in a job of {count} processes. For the loss over "
            "all of them write group=torch.distributed.group.WORLD",
            stacklevel=5,
        )


_AVAILABLE = dist.is_available()
_warned: list[bool] = []
