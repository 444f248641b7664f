"""Where training's pairs come from, and in which order: a function of (seed, epoch, step) alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from train_data import SPOILED, caption, jpeg, pair, write_csv, write_shards

from clipfast.emoji.data import Tokenizer
from clipfast.training.batches import ATTEMPTS, Pairs, Steps, learn_tokenizer, loader, order
from clipfast.training.flags import Refused
from clipfast.training.sources import Csv, OpenMoji, Synthetic, WebDataset, index_of, shards

DRAW = random.Random(0)


def test_shards_are_written_out(tmp_path: Path) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar"):
        (tmp_path / name).touch()
    names = [Path(path).name for path in shards(f"{tmp_path}/a-{{08..10}}.tar::{tmp_path}/b.tar")]
    assert names == ["a-08.tar", "a-09.tar", "a-10.tar", "b.tar"]
    with pytest.raises(Refused, match=r"--train-data or --val-data: there is no shard .*a-11.tar"):
        shards(f"{tmp_path}/a-{{08..11}}.tar")


def test_tars_are_read_at_random(tmp_path: Path) -> None:
    """Every pair by itself, in any order, as its own bytes; the caption of the JSON where there is no text."""
    source = WebDataset(write_shards(tmp_path, (3, 1, 5)))
    assert len(source) == 9
    for index in (8, 0, 4, 3, 0):
        assert source._read(index, 1) == pair(index)["jpg"]
        assert source.caption(index, DRAW) == caption(index)
        assert source.name(index).endswith(f".tar: {index:09d}")
    source.places[2, 3] = -1
    assert source.caption(2, DRAW) == caption(2)


def test_what_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar " * 200)
    with pytest.raises(Refused, match=r"a.tar is no whole tar"):
        index_of(str(tmp_path / "a.tar"))
    content = Path(write_shards(tmp_path, (4,)).replace("{00000..00000}", "00000")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(Refused, match=r"cut.tar is no whole tar"):
        WebDataset(str(tmp_path / "cut.tar"))


def test_csv(tmp_path: Path) -> None:
    path = write_csv(tmp_path, 4, separator=",")
    source = Csv(path, ",", "filepath", "title")
    assert [source.caption(i, DRAW) for i in range(4)] == [caption(i) for i in range(4)]
    assert source.image(3).size == (40, 30)
    with pytest.raises(Refused, match=r"--csv-img-key: .*pairs.csv has no column 'image'; it has 'filepath', 'title'"):
        Csv(path, ",", "image", "title")
    with pytest.raises(Refused, match=r"--csv-caption-key: .* has no column 'title'; it has 'filepath,title'"):
        Csv(path, "\t", "filepath,title", "title")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(Refused, match=r"empty.csv holds no pairs"):
        Csv(str(tmp_path / "empty.csv"), ",", "filepath", "title")
    with pytest.raises(Refused, match=r"there is no file .*missing.csv"):
        Csv(str(tmp_path / "missing.csv"), ",", "filepath", "title")


def test_synthetic_and_openmoji() -> None:
    source = Synthetic(5, 8)
    assert source.image(3).size == (8, 8)
    assert source.caption(3, DRAW) == source.caption(3, random.Random(7))
    held_out, training = OpenMoji(16, 0, True), OpenMoji(16, 0, False)
    assert held_out.name(0) == "kangaroo" == held_out.caption(0, DRAW)
    assert not {held_out.name(i) for i in range(len(held_out))} & {training.name(i) for i in range(len(training))}
    assert len({training.caption(0, random.Random(i)) for i in range(20)}) > 2


@pytest.mark.parametrize("way", range(len(SPOILED)))
def test_a_spoiled_pair_is_named_and_replaced(tmp_path: Path, way: int) -> None:
    spoiled = list(range(3, 3 + way + 1))
    pairs = Pairs(WebDataset(write_shards(tmp_path, (12,), spoiled)), 8, seed=0)
    image, text, failed = pairs[0, spoiled[-1]]
    assert image is not None
    assert text in {caption(i) for i in range(12) if i not in spoiled}
    assert failed[0][0].endswith(f"{spoiled[-1]:09d}")
    again = pairs[0, spoiled[-1]]
    assert torch.equal(image, again[0])
    assert failed == again[2]
    assert Pairs(pairs.source, 8, None)[0, spoiled[-1]][0] is None


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    pairs = Pairs(WebDataset(write_shards(tmp_path, (3,), range(3))), 8, seed=0)
    image, _, failed = pairs[0, 1]
    assert image is None
    assert len(failed) == ATTEMPTS


def test_augmentation_is_of_the_pair(tmp_path: Path) -> None:
    source = WebDataset(write_shards(tmp_path, (3,)))
    pairs = Pairs(source, 16, seed=0)
    assert torch.equal(pairs[0, 1][0], Pairs(source, 16, seed=0)[0, 1][0])
    for other in (pairs[1, 1], Pairs(source, 16, seed=1)[0, 1]):
        assert not torch.equal(pairs[0, 1][0], other[0])


def test_pixels() -> None:
    """The middle square, normalized as in the paper's code."""
    source = Synthetic(1, 8)
    source.image = lambda index: pytest.importorskip("PIL.Image").fromarray(  # type: ignore[method-assign]
        np.full((10, 30, 3), 255, dtype=np.uint8)
    )
    image = Pairs(source, 4, None)[0, 0][0]
    assert image is not None
    assert image.shape == (3, 4, 4)
    assert torch.allclose(image[:, 0, 0], torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-4)
    assert jpeg(0, 1)[:2] == b"\xff\xd8"


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_rows_do_not_depend_on_processes_or_on_the_first_step(world: int) -> None:
    whole = list(Steps(5, 50, 12, 0, 1, 0, 12))
    assert len(whole) == 12
    ranks = [list(Steps(5, 50, 12 // world, rank, world, 7, 12)) for rank in range(world)]
    assert [[row for rank in ranks for row in rank[step]] for step in range(5)] == whole[7:]
    for epoch in range(3):
        rows = [row for step in whole[4 * epoch : 4 * epoch + 4] for row in step]
        assert {number for number, _ in rows} == {epoch}
        assert len({index for _, index in rows}) == 48
        assert [index for _, index in rows] == order(5, epoch, 50)[:48].tolist()
    assert not torch.equal(order(5, 0, 50), order(5, 1, 50))
    assert not torch.equal(order(5, 0, 50), order(6, 0, 50))
    with pytest.raises(Refused, match="--batch-size: 2 times 30 pairs in a step; the data has 50"):
        Steps(5, 50, 30, 0, 2, 0, 1)


def test_workers_change_nothing(tmp_path: Path) -> None:
    source = WebDataset(write_shards(tmp_path, (10, 10), (4, 13)))
    tokenizer = learn_tokenizer(source, 400, 12)
    read = [list(loader(Pairs(source, 8, 3), Steps(3, 20, 4, 0, 1, 2, 9), tokenizer, n)) for n in (0, 2)]
    assert len(read[0]) == 7
    for one, two in zip(*read, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.tokens, two.tokens)
        assert one.unreadable == two.unreadable
    assert sum(len(batch.unreadable) for batch in read[0]) >= 2


def test_a_tokenizer_is_learned_from_what_can_be_read(tmp_path: Path) -> None:
    source = WebDataset(write_shards(tmp_path, (12,), (0, 1, 2, 3, 4)))
    tokenizer = learn_tokenizer(source, 400, 12)
    assert tokenizer.to_json() == learn_tokenizer(source, 400, 12).to_json()
    assert Tokenizer(tokenizer.to_json())(["red above blue"]).shape[1] < 8
    with pytest.raises(Refused, match="--train-data: no caption can be read"):
        learn_tokenizer(Blank(3, 8), 400, 12)


class Blank(Synthetic):
    def caption(self, index: int, draw: random.Random) -> str:
        raise ValueError("none")
