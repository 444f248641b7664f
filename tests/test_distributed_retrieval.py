"""Retrieval metrics over several ranks are those of one process with all rows; each similarity is counted once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks, call, retrieval
from shards import SCHEMES, SHARDS, Batch

import clipfast


def one_process(shards: list[dict[str, Any]], **options: Any) -> dict[str, float]:
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    return clipfast.retrieval_metrics(whole.pop("x"), whole.pop("y"), **whole, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("shards", [name for name in SHARDS if name != "one rank"])
def test_metrics(ranks: Ranks, shards: str, backend: str, with_ids: bool, scheme: str) -> None:
    if clipfast.backends()[backend]:
        pytest.skip("; ".join(clipfast.backends()[backend]))
    sizes = SHARDS[shards] if with_ids else [(n, n) for n, _ in SHARDS[shards]]
    batch = Batch(sizes, 7, torch.float32, ids=with_ids)
    for shard in batch.shards:
        shard["x"], shard["y"] = (t + 0.7 * torch.randn_like(t) for t in (shard["x"], shard["y"]))
    expected = one_process(batch.shards, backend=backend)
    found = ranks.run(retrieval, batch.shards, {"scheme": scheme, "backend": backend}, ranks=range(len(sizes)))
    for (metrics, products), (n, _) in zip(found, sizes, strict=True):
        assert metrics == pytest.approx(expected, rel=1e-12)
        assert products == n * batch.m * 7


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_texts_than_images_and_the_reverse(ranks: Ranks, scheme: str) -> None:
    """Any numbers on any rank, several captions of an image on different ranks, texts of no image."""
    sizes = [(3, 11), (8, 0), (0, 7), (5, 4)]
    ids = torch.arange(16), torch.randint(20, (22,))
    x, y = torch.randn(16, 7), torch.randn(22, 7)
    parts = [t.split([size[side] for size in sizes]) for side, t in ((0, x), (1, y), (0, ids[0]), (1, ids[1]))]
    shards = [dict(zip(("x", "y", "image_ids", "text_ids"), part, strict=True)) for part in zip(*parts, strict=True)]
    expected = one_process(shards, backend="torch")
    for metrics, _ in ranks.run(retrieval, shards, {"scheme": scheme, "backend": "torch"}):
        assert metrics == pytest.approx(expected, rel=1e-12)


def test_one_error_on_all_ranks(ranks: Ranks) -> None:
    shards = [{"x": torch.randn(3, 7), "y": torch.randn(3, 7)} for _ in range(3)]
    wrong = [*shards[:2], {"x": torch.randn(3, 7), "y": torch.randn(2, 7)}]
    failures = ranks.run(retrieval, wrong, {}, ranks=range(3))
    assert str(failures[2]).startswith("ValueError: text_features: got 2 rows; accepted without ids")
    assert str(failures[0]) == str(failures[1])
    assert str(failures[0]).startswith("ValueError: group: rank 2 refused its arguments")
    of_no_image = {"image_ids": torch.arange(3), "text_ids": torch.arange(3) + 10}
    failures = ranks.run(retrieval, [shard | of_no_image for shard in shards], {}, ranks=range(3))
    assert {str(failure) for failure in failures} == {
        "ValueError: text_ids: no text has the id of an image; there is nothing to retrieve"
    }
    assert len(set(ranks.run(call, [{}] * 3, ranks=range(3)))) == 1
