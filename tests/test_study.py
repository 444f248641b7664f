"""The study of the batch size, and the shards of emoji that it trains on."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from benchmarks import study
from clipfast.emoji import data


def test_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of each case in this process; recall by a run on shards of a few emoji; table and plot of both."""
    pytest.importorskip("emoji")
    emoji_shards = importlib.import_module("examples.emoji_shards")
    few = [concept for index, concept in enumerate(data.read_concepts(["twemoji"])) if index % 40 == 0]
    monkeypatch.setattr(emoji_shards, "read_concepts", lambda others: few)
    emoji_shards.main([str(tmp_path), str(icon_set(tmp_path / "set.tgz")), "--size", "16"])
    cost = [{"part": "loss", "how": name, "n": 32} | study.loss_cost(name, 32) for name in study.LOSSES]
    steps = [{"how": name} | study.step_cost(name, 128) for name in (*study.LOSSES, study.CACHED)]
    cost += [{"part": "step", "n": 128} | row for row in steps]
    result = {"cost": cost, "recall": study.recall(tmp_path, (16, 32), epochs=1)}
    assert [row["steps"] for row in result["recall"]] == [row["pairs"] // row["n"] for row in result["recall"]]
    assert "SHARDS/train-{00000..00000}.tar" in result["recall"][0]["flags"]
    study.plot(result, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000
    assert len(study.table(result).splitlines()) == 2 + 5 + 1 + 2 + 2


def icon_set(path: Path) -> Path:
    """An icon set of Iconify with one drawing, of which the name alone is known."""
    icons = {"width": 8, "height": 8, "icons": {"grinning-face": {"body": '<circle cx="4" cy="4" r="3"/>'}}}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (("icons", json.dumps(icons)), ("chars", "{}")):
            info = tarfile.TarInfo(f"package/{name}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
    return path
