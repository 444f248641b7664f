"""Batches whose rows are a pure function of (seed, epoch, step): not of workers, processes or what was read before.

That is what lets a run go on at any step without a state of the reader; torchdata's StatefulDataLoader keeps one, which
holds for the same number of workers and processes alone.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipfast.emoji.data import Tokenizer
from clipfast.training.flags import Refused
from clipfast.training.sources import Source, pillow

# The paper's code.
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)  # of random crops, open_clip's
ATTEMPTS = 20  # pairs in place of one that cannot be read
TOKENIZER_CAPTIONS = 100_000  # from which one is learned


@dataclass(frozen=True)
class Batch:
    """A rank's part of a step."""

    images: Tensor  # [b, 3, size, size]
    tokens: Tensor  # [b, s]
    unreadable: list[tuple[str, str]]  # name and reason of each pair that could not be read

    def pin_memory(self) -> Batch:
        """For copies to a GPU that nobody waits for."""
        return Batch(self.images.pin_memory(), self.tokens.pin_memory(), self.unreadable)


def number(*parts: object) -> int:
    """A seed of 63 bits from anything, the same in every process."""
    return random.Random(" ".join(map(str, parts))).getrandbits(63)


def order(seed: int, epoch: int, count: int) -> Tensor:  # [count]
    """The pairs of an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(number(seed, epoch)))


class Steps(Sampler[list[tuple[int, int]]]):
    """(epoch, pair) of the rows of each of a rank's steps from `first` on; ranks hold a step's rows in order."""

    def __init__(self, seed: int, count: int, batch: int, rank: int, world: int, first: int, last: int) -> None:
        self.seed, self.count, self.batch, self.rank, self.first, self.last = seed, count, batch, rank, first, last
        self.whole = batch * world
        self.per_epoch = count // self.whole
        if not self.per_epoch:
            raise Refused(f"--batch-size: {world} times {batch} pairs in a step; the data has {count}")

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, rows = -1, torch.empty(0)
        for step in range(self.first, self.last):
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                rows = order(self.seed, epoch, self.count)
            begin = step % self.per_epoch * self.whole + self.rank * self.batch
            yield [(epoch, index) for index in rows[begin : begin + self.batch].tolist()]


Row = tuple[Tensor | None, str, list[tuple[str, str]]]


class Pairs(Dataset[Row]):
    """Pairs as tensors and captions, cropped at random by (seed, epoch, pair).

    One that cannot be read is replaced by another, drawn by its place; without a seed, nothing is cropped or replaced.
    """

    def __init__(self, source: Source, size: int, seed: int | None) -> None:
        self.source, self.size, self.seed = source, size, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> Row:
        """The pair, None and no caption if there is none that can be read; and what could not be."""
        epoch, index = place
        failed: list[tuple[str, str]] = []
        for attempt in range(ATTEMPTS if self.seed is not None else 1):
            draw = random.Random(f"{self.seed} {epoch} {index}")
            try:
                caption = self.source.caption(index, draw).strip()
                if not caption:
                    raise ValueError("its caption is empty")
                return self._pixels(self.source.image(index), draw), caption, failed
            except Exception as error:  # of any kind: PIL's decoders raise many
                failed.append((self.source.name(index), str(error) or type(error).__name__))
                index = number(self.seed, epoch, place[1], attempt) % len(self.source)
        return None, "", failed

    def _pixels(self, image: Any, draw: random.Random) -> Tensor:  # [3, size, size]
        image = image.convert("RGB")
        width, height = image.size
        box = _crop(width, height, draw) if self.seed is not None else _middle(width, height)
        pixels = np.asarray(
            image.resize((self.size, self.size), pillow().Resampling.BICUBIC, box=box), dtype=np.float32
        )
        return torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(2, 0, 1))


def _crop(width: int, height: int, draw: random.Random) -> tuple[float, float, float, float]:
    """A random part of the area with a random ratio; the middle where none fits, as torchvision's RandomResizedCrop."""
    for _ in range(10):
        area, ratio = width * height * draw.uniform(*SCALE), draw.uniform(*RATIO)
        w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if w <= width and h <= height:
            left, top = draw.uniform(0, width - w), draw.uniform(0, height - h)
            return left, top, left + w, top + h
    return _middle(width, height)


def _middle(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


class Collate:
    """Rows to a batch, without those that have no picture."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[Row]) -> Batch:
        unreadable = [name for _, _, failed in rows for name in failed]
        pairs = [(image, caption) for image, caption, _ in rows if image is not None]
        if not pairs:
            return Batch(torch.empty(0), torch.empty(0), unreadable)
        images, captions = zip(*pairs, strict=True)
        return Batch(torch.stack(images), self.tokenizer(captions), unreadable)


def loader(pairs: Pairs, steps: Any, tokenizer: Tokenizer, workers: int) -> DataLoader[Any]:
    """Batches in the order of `steps`, whatever the number of workers."""
    return DataLoader(
        pairs,
        batch_sampler=steps,
        num_workers=workers,
        collate_fn=Collate(tokenizer),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_without_interrupts,
    )


def _without_interrupts(worker: int) -> None:
    """Ctrl-C and SIGTERM go to all processes of a terminal; the main one ends its workers when it has saved."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)


def learn_tokenizer(source: Source, vocab_size: int, context_length: int) -> Tokenizer:
    """From captions evenly over all pairs.

    Raises:
        Refused: no caption of them can be read.
    """

    def caption(index: int) -> str:
        try:
            return source.caption(index, random.Random(index))
        except Exception:  # counted when it comes into a batch
            return ""

    stride = -(-len(source) // TOKENIZER_CAPTIONS)
    captions = [text for text in map(caption, range(0, len(source), stride)) if text]
    if not captions:
        raise Refused("--train-data: no caption can be read")
    return Tokenizer.train(captions, vocab_size, context_length)
