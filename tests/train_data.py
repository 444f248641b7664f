"""Small data sets on disk, whole and spoiled, for the tests of training."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Image = pytest.importorskip("PIL.Image", reason="pillow is missing; the extra `demo` brings it")

COLOURS = ((220, 40, 40), (40, 160, 60), (40, 80, 210), (240, 210, 40), (20, 20, 20), (245, 245, 245))
NAMES = ("red", "green", "blue", "yellow", "black", "white")
Members = dict[str, bytes]


def jpeg(first: int, second: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """Two colours, one above the other."""
    image = Image.new("RGB", size, COLOURS[first])
    image.paste(COLOURS[second], (0, size[1] // 2, *size))
    content = io.BytesIO()
    image.save(content, "JPEG")
    return content.getvalue()


def caption(index: int) -> str:
    return f"{NAMES[index % 6]} above {NAMES[index // 6 % 6]}"


def pair(index: int) -> Members:
    """One as img2dataset writes it: the picture, its caption, and a JSON with both's facts."""
    facts = {
        "caption": caption(index),
        "url": f"http://example.org/{index}",
        "key": f"{index:09d}",
        "status": "success",
    }
    image = jpeg(index % 6, index // 6 % 6)
    return {"jpg": image, "json": json.dumps(facts).encode(), "txt": caption(index).encode()}


SPOILED: dict[str, Callable[[Members], Members]] = {
    "cut": lambda members: members | {"jpg": members["jpg"][:200]},
    "empty": lambda members: members | {"jpg": b""},
    "no picture": lambda members: {kind: content for kind, content in members.items() if kind != "jpg"},
    "not UTF-8": lambda members: members | {"txt": b"\xff\xfe\x00"},
    "blank caption": lambda members: members | {"txt": b" \n"},
}


def write_shards(folder: Path, counts: Sequence[int], spoiled: Sequence[int] = ()) -> str:
    """00000.tar, ... in img2dataset's layout; spoiled pairs each in another way. Returns their pattern."""
    index, ways = 0, list(SPOILED.values())
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for _ in range(count):
                members = pair(index)
                if index in spoiled:
                    members = ways[list(spoiled).index(index) % len(ways)](members)
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"{index:09d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                index += 1
        (folder / f"{number:05d}_stats.json").write_text("{}")
    return str(folder / f"{{00000..{len(counts) - 1:05d}}}.tar")


def write_csv(folder: Path, count: int, spoiled: Sequence[int] = (), separator: str = "\t") -> str:
    """Pictures, and a table of them with open_clip's columns; spoiled pictures are cut or missing."""
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["filepath", "title"])
        for index in range(count):
            path = folder / f"{index}.jpg"
            if index not in spoiled:
                path.write_bytes(pair(index)["jpg"])
            elif index % 2:
                path.write_bytes(pair(index)["jpg"][:100])
            writer.writerow([path, caption(index)])
    return str(folder / "pairs.csv")
