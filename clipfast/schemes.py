"""Two ways to take every rank's images against the texts of all: gather the texts, or pass them round.

Both do the same with a `visit`, which takes the rank's own images against some texts and returns what it adds to those
texts' columns: statistics, or gradients. They bring it home to the rank whose texts they are. Tensors that belong to
texts have them in their first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipfast.collectives import Ranks, Shards
from clipfast.problem import accumulation_dtype

AUTO, GATHER, RING = SCHEMES = ("auto", "gather", "ring")

# Of all texts and of the gradients by them, on each rank. A constant, for free memory differs from rank to rank, and
# ranks that chose differently would wait for each other; a twentieth of a GPU with 80 GB.
GATHER_BYTES = 4 << 30

# Takes the column of the first image's match, and some texts' tensors; returns these columns' [m, ...].
Visit = Callable[[int, Sequence[Tensor]], Tensor | None]
# Makes one of all ranks' parts: [parts, m, ...] -> [m, ...].
Merge = Callable[[Tensor], Tensor]


class GroupOptions(NamedTuple):
    """What `clipfast.contrastive_loss` says of the ranks of its group."""

    group: torch.distributed.ProcessGroup
    grad_reduction: str
    scheme: str
    equal_shards: bool


@dataclass(frozen=True)
class Gather:
    """Every rank holds all texts, and visits them at once; what belongs to columns is sent home, O(M) for each."""

    ranks: Ranks
    shards: Shards

    name = GATHER
    holds_all = True  # what `spread` returns has come from other ranks

    def spread(self, own: Tensor) -> Tensor:  # [m_r, ...] -> [M, ...]
        """What a visit needs of the texts."""
        return self.ranks.gather_rows(own, self.shards.texts)

    def columns(self, held: Sequence[Tensor], visit: Visit, merge: Merge) -> Tensor | None:
        """Visit all texts; the rank's own columns of what all ranks' visits returned, merged in rank order."""
        part = visit(sum(self.shards.texts[: self.ranks.rank]), held)
        return None if part is None else merge(self.ranks.exchange(part, self.shards.texts))

    def bytes_of_spread(self, row: int) -> int:
        """What this rank sends, where a text has so many bytes."""
        return (self.ranks.count - 1) * max(self.shards.texts) * row

    def bytes_of_columns(self, held: int, part: int) -> int:
        """What this rank sends, where a text has so many bytes that the visit needs, and so many that it returns."""
        return (sum(self.shards.texts) - self.shards.texts[self.ranks.rank]) * part


@dataclass(frozen=True)
class Ring:
    """Texts go from rank to rank while the ones before are visited; O(m_r) memory whatever the number of ranks is.

    What belongs to columns goes one step behind: to the rank that visits the same texts next, and home at the end.
    """

    ranks: Ranks
    shards: Shards

    name = RING
    holds_all = False

    def spread(self, own: Tensor) -> Tensor:  # [m_r, ...]
        return own.contiguous()

    def columns(self, held: Sequence[Tensor], visit: Visit, merge: Merge) -> Tensor | None:
        rank, count = self.ranks.rank, self.ranks.count
        texts, behind = list(held), list[Tensor]()  # what the next rank gets: of this step, of the last one
        for step in range(count):
            owner = (rank - step) % count
            coming = [self._like(t, owner - 1) for t in texts] if step < count - 1 else []
            caught_up = [self._like(t, owner) for t in behind]
            wait = self.ranks.pass_on([*(texts if coming else ()), *behind], [*coming, *caught_up])
            # Another rank's texts hold no match: one that lies beyond them.
            part = visit(0 if owner == rank else len(texts[0]), texts)
            wait()
            if part is not None:
                behind = [merge(torch.stack((*caught_up, part))) if caught_up else part.contiguous()]
            texts = coming
        if not behind or count == 1:
            return behind[0] if behind else None
        home = self._like(behind[0], rank)
        self.ranks.pass_on(behind, [home])()
        return home

    def _like(self, tensor: Tensor, owner: int) -> Tensor:
        return tensor.new_empty((self.shards.texts[owner % self.ranks.count], *tensor.shape[1:]))

    def bytes_of_spread(self, row: int) -> int:
        return 0

    def bytes_of_columns(self, held: int, part: int) -> int:
        # All texts but the next rank's, which has sent them itself, are passed on; all columns are.
        texts = self.shards.texts
        return (sum(texts) - texts[(self.ranks.rank + 1) % self.ranks.count]) * held + sum(texts) * part


Scheme = Gather | Ring


def chosen(scheme: str, texts: int, d: int, dtype: torch.dtype) -> tuple[str, str]:
    """The scheme that "auto" means for so many texts over all ranks, and why; any other name is itself."""
    if scheme != AUTO:
        return scheme, "asked for"
    needed = gathered_bytes(texts, d, dtype)
    fits = needed <= GATHER_BYTES
    return (GATHER if fits else RING), (
        f"all texts and their gradients take {needed / 2**20:,.1f} MiB on each rank, "
        f"{'at most' if fits else 'more than'} {GATHER_BYTES / 2**20:,.0f} MiB"
    )


def gathered_bytes(texts: int, d: int, dtype: torch.dtype) -> int:
    """Of all texts, of the gradient by them and of what the other ranks send of this rank's."""
    return texts * d * (dtype.itemsize + 2 * accumulation_dtype(dtype).itemsize)


def make(scheme: str, ranks: Ranks, shards: Shards, d: int, dtype: torch.dtype) -> Scheme:
    name, _ = chosen(scheme, sum(shards.texts), d, dtype)
    return Gather(ranks, shards) if name == GATHER else Ring(ranks, shards)
