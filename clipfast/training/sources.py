"""Where pairs come from: each source has a length and reads pair i by itself, in any order.

webdataset 1.0.2 reads tars as streams and cannot go on at a step; its random-access part, `wids`, is no longer in it.
The index here is what Python's tarfile finds in the headers.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from clipfast.emoji import data as emoji
from clipfast.training.flags import Refused

IMAGES = ("jpg", "jpeg", "png", "webp")
SYNTHETIC = 10_000  # pairs
NONE = -1  # the offset of what a sample has not
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 210), "yellow": (240, 210, 40),
    "black": (20, 20, 20), "white": (245, 245, 245), "purple": (130, 50, 160), "orange": (240, 140, 30),
}  # fmt: skip


class Source(Protocol):
    """Pairs by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """For messages."""

    def image(self, index: int) -> Any:
        """A PIL picture.

        Raises:
            Exception: of any kind, if it cannot be read.
        """

    def caption(self, index: int, draw: random.Random) -> str:
        """A text; one of several by `draw`. Raises as `image`."""


def pillow() -> Any:
    return emoji.require("PIL.Image")


def _decode(content: bytes) -> Any:
    try:
        return pillow().open(io.BytesIO(content))
    except pillow().UnidentifiedImageError as error:
        raise ValueError("is no picture that Pillow knows") from error


class Member(NamedTuple):
    """Where a sample's parts lie in its shard."""

    key: str
    image: tuple[int, int] = (NONE, 0)  # offset, size
    text: tuple[int, int] = (NONE, 0)
    json: tuple[int, int] = (NONE, 0)


def shards(pattern: str) -> list[str]:
    """`a/{000..012}.tar::b.tar` written out.

    Raises:
        Refused: a file is missing, or not on a local disk.
    """
    found: list[str] = []
    todo = pattern.split("::")[::-1]
    while todo:
        path = todo.pop()
        if span := re.search(r"\{(\d+)\.\.(\d+)\}", path):
            first, last = span[1], span[2]
            numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
            todo += [path[: span.start()] + number + path[span.end() :] for number in numbers][::-1]
        else:
            found.append(path)
    if not found:
        raise Refused(f"--train-data: {pattern!r} names no shard")
    for path in found:
        if not Path(path).is_file():
            raise Refused(f"--train-data or --val-data: there is no shard {path}; accepted are tars on a local disk")
    return found


def index_of(shard: str) -> list[Member]:
    """The samples of a tar, in the order of their first members, by the headers alone.

    Raises:
        Refused: it is no tar.
    """
    samples: dict[str, Member] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, kind = file.partition(".")
                part = "image" if kind.lower() in IMAGES else {"txt": "text", "json": "json"}.get(kind.lower())
                if member.isfile() and part is not None:
                    key = f"{folder}/{stem}" if folder else stem
                    place: Any = {part: (member.offset_data, member.size)}
                    samples[key] = samples.get(key, Member(key))._replace(**place)
    except tarfile.TarError as error:
        raise Refused(f"--train-data or --val-data: {shard} is no whole tar: {error}") from error
    return list(samples.values())


class WebDataset:
    """Tars in webdataset's form, as img2dataset writes them: KEY.jpg with KEY.txt, or with a caption in KEY.json."""

    def __init__(self, pattern: str) -> None:
        self.shards = shards(pattern)
        members = [(number, member) for number, shard in enumerate(self.shards) for member in index_of(shard)]
        if not members:
            raise Refused(f"--train-data or --val-data: {pattern!r} holds no pairs")
        # Plain arrays: worker processes share them, where a list of objects would be copied by its reference counts.
        self.keys = np.array([member.key.encode() for _, member in members])
        self.places = np.array(
            [(number, *m.image, *m.text, *m.json) for number, m in members], dtype=np.int64
        )  # [n, 7]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]]}: {self.keys[index].decode()}"

    def _read(self, index: int, part: int) -> bytes:
        shard, (offset, size) = self.places[index, 0], self.places[index, part : part + 2].tolist()
        with Path(self.shards[shard]).open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise ValueError("the shard ends within it")
        return content

    def image(self, index: int) -> Any:
        if self.places[index, 1] == NONE:
            raise ValueError("has no picture")
        return _decode(self._read(index, 1))

    def caption(self, index: int, draw: random.Random) -> str:
        if self.places[index, 3] != NONE:
            return self._read(index, 3).decode()
        if self.places[index, 5] == NONE:
            raise ValueError("has no caption")
        return str(json.loads(self._read(index, 5))["caption"] or "")


class Csv:
    """A csv file with a picture's path and its caption in each row; paths are as from where the program runs."""

    def __init__(self, path: str, separator: str, image_key: str, caption_key: str) -> None:
        if not Path(path).is_file():
            raise Refused(f"--train-data or --val-data: there is no file {path}")
        try:
            with Path(path).open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, delimiter=separator)
                columns = reader.fieldnames or []
                for flag, key in (("--csv-img-key", image_key), ("--csv-caption-key", caption_key)):
                    if columns and key not in columns:
                        raise Refused(f"{flag}: {path} has no column {key!r}; it has {', '.join(map(repr, columns))}")
                self.rows = [(row[image_key] or "", row[caption_key] or "") for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise Refused(f"--train-data or --val-data: {path} cannot be read as csv: {error}") from error
        if not self.rows:
            raise Refused(f"--train-data or --val-data: {path} holds no pairs")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index][0]

    def image(self, index: int) -> Any:
        return _decode(Path(self.rows[index][0]).read_bytes())

    def caption(self, index: int, draw: random.Random) -> str:
        return self.rows[index][1]


class Synthetic:
    """Four coloured quarters and their names: nothing is read, and there is something to learn."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"synthetic pair {index}"

    def _colours(self, index: int) -> list[str]:
        return random.Random(f"synthetic {index}").choices(list(COLOURS), k=4)

    def image(self, index: int) -> Any:
        quarters = np.array([COLOURS[name] for name in self._colours(index)], dtype=np.uint8).reshape(2, 2, 3)
        return pillow().fromarray(quarters).resize((self.size, self.size), pillow().Resampling.NEAREST)

    def caption(self, index: int, draw: random.Random) -> str:
        return "{}, {}, {} and {}".format(*self._colours(index))


class OpenMoji:
    """A drawing and a name of each concept of `clipfast.emoji`; a tenth of the concepts are held out."""

    def __init__(self, size: int, seed: int, held_out: bool) -> None:
        training, rest = emoji.split(emoji.read_concepts(), seed)
        self.concepts = rest if held_out else training
        self.held_out = held_out
        self.pictures = emoji.draw([concept.pictures[0].file for concept in self.concepts], size)  # uint8 [n, 3, h, w]

    def __len__(self) -> int:
        return len(self.concepts)

    def name(self, index: int) -> str:
        return self.concepts[index].name

    def image(self, index: int) -> Any:
        return pillow().fromarray(self.pictures[index].permute(1, 2, 0).contiguous().numpy())

    def caption(self, index: int, draw: random.Random) -> str:
        if self.held_out:
            return self.concepts[index].name
        return draw.choice(emoji.TEMPLATES).format(draw.choice(self.concepts[index].pictures[0].captions))


def open_source(settings: argparse.Namespace, size: int, validation: bool) -> Source | None:
    """The pairs of training, or of validation if there are some.

    Raises:
        Refused: a file is missing or not as it must be.
        ImportError: a package is missing.
    """
    kind, path = settings.dataset_type, settings.val_data if validation else settings.train_data
    if kind == "openmoji":
        return OpenMoji(size, settings.seed, validation)
    if kind == "synthetic":
        return None if validation else Synthetic(settings.train_num_samples or SYNTHETIC, size)
    if path is None:
        return None
    if kind == "webdataset":
        return WebDataset(path)
    return Csv(path, settings.csv_separator, settings.csv_img_key, settings.csv_caption_key)
