"""explain() over several ranks, counted on real processes: bytes sent, products, memory (traps 3, 27)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Failed, Ranks, cost
from shards import SCHEMES, Batch

import clipfast
from benchmarks import scaling
from clipfast import collectives, schemes
from clipfast.collectives import Shards
from clipfast.predictions import Asked, bytes_sent

POSITIVE = {"same_id": "positive", "label_smoothing": 0.1}
COSTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("contrastive_loss", {}, {}),
    "nothing kept": ("contrastive_loss", {"keep_bytes": 0}, {}),
    "ignore": ("contrastive_loss", {"same_id": "ignore"}, {"ids": True}),
    "positive, smoothing": ("contrastive_loss", POSITIVE, {"ids": True, "positives": True, "smoothing": True}),
    "metrics, none": (
        "contrastive_loss", {"return_metrics": True, "reduction": "none"}, {"metrics": True, "mean": False},
    ),
    "siglip": ("siglip_loss", {"same_id": "ignore"}, {"loss": "siglip", "ids": True}),
    "distillation": ("distillation_loss", {}, {"loss": "distillation"}),
}  # fmt: skip
PRODUCTS = {"contrastive": 3, "siglip": 3, "distillation": 6}
D = 8


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", COSTS)
def test_bytes_sent_and_products(ranks: Ranks, case: str, scheme: str) -> None:
    """On every rank of unequal shards, and what explain says of equal ones; each product once in the whole job."""
    loss, options, fields = COSTS[case]
    asked = Asked(**fields)
    for sizes in ([(4, 4)] * 4, [(5, 6), (0, 0), (9, 9), (2, 5)]):
        batch = Batch(sizes, D, torch.bfloat16, ids=asked.ids)
        images, texts = zip(*sizes, strict=True)
        for rank, found in enumerate(ranks.run(cost, loss, batch.shards, options, scheme)):
            assert not isinstance(found, Failed), found
            forward, backward, products, *_ = found
            job = schemes.make(
                scheme, collectives.Ranks(None, rank, 4), Shards(images, texts, True, True), D, torch.bfloat16
            )
            assert bytes_sent(job, D, torch.bfloat16, asked) == (forward, backward)
            assert products == (PRODUCTS[asked.loss] + (case == "nothing kept")) * images[rank] * batch.m * D
    if not asked.mean:
        return
    batch = Batch([(3, 5)] * 4, D, torch.bfloat16, ids=asked.ids)
    explanation = clipfast.explain(
        3, D, "bfloat16", m=5, world_size=4, scheme=scheme, loss=asked.loss, backend="torch", **options
    )
    assert explanation.ranks is not None
    for forward, backward, products, *_ in ranks.run(cost, loss, batch.shards, options, scheme):
        assert (explanation.ranks.forward_bytes, explanation.ranks.backward_bytes) == (forward, backward)
        assert explanation.ranks.products * batch.n * batch.m * D == products


def test_saved_bytes_of_the_ring_are_flat(ranks: Ranks) -> None:
    saved = {}
    for count in (2, 3, 4):
        batch = Batch([(32, 40)] * count, 16, torch.float32)
        for scheme in SCHEMES:
            results = ranks.run(
                *(cost, "contrastive_loss", batch.shards, {"normalize": True, "keep_bytes": 0}, scheme, True),
                ranks=range(count),
            )
            assert len({result[3] for result in results}) == 1
            saved[scheme, count] = results[0][3]
    assert saved["ring", 2] == saved["ring", 3] == saved["ring", 4]
    for count in (2, 3, 4):
        assert saved["gather", count] - saved["ring", count] == 40 * count * 16 * 4


@pytest.mark.parametrize("seed", range(16))
def test_memory_is_bounded(ranks: Ranks, seed: int) -> None:
    """What is saved, and the peak of what PyTorch allocates."""
    draw = random.Random(seed)
    loss = draw.choice(("contrastive", "siglip", "distillation"))
    options: dict[str, Any] = {"normalize": draw.random() < 0.5}
    ids = loss != "distillation" and draw.random() < 0.5
    if ids:
        options["same_id"] = draw.choice(("ignore", "positive"))
    if loss == "contrastive":
        options |= {"label_smoothing": draw.choice((0.0, 0.1)), "return_metrics": draw.random() < 0.3}
        options |= {"keep_bytes": (0, 1 << 20)[seed // 2 % 2]}
    n, d, dtype = draw.choice((50, 200)), draw.choice((64, 256)), draw.choice((torch.float32, torch.bfloat16))
    m, scheme = n + draw.choice((0, 30)), SCHEMES[seed % 2]
    batch = Batch([(n, m)] * 3, d, dtype, ids=ids)
    explanation = clipfast.explain(n, d, dtype, m=m, world_size=3, scheme=scheme, loss=loss, backend="torch", **options)
    found = ranks.run(cost, f"{loss}_loss", batch.shards, options, scheme, ranks=range(3))
    assert not isinstance(found[0], Failed), found
    saved, peak = (max(result[place] for result in found) for place in (3, 4))
    assert saved <= explanation.saved_bytes <= saved + 64, options
    features = (n + m) * d * dtype.itemsize if loss == "contrastive" else 0  # there already
    predicted = explanation.workspace_bytes + explanation.gradient_bytes + explanation.saved_bytes - features
    assert peak <= predicted <= 2 * peak + (1 << 18), (loss, scheme, options, peak, predicted)


def test_explain_tells_the_scheme_and_why() -> None:
    text = str(clipfast.explain(1024, 512, "bfloat16", world_size=64, backend="torch"))
    assert "scheme: gather (all texts and their gradients take 320.0 MiB on each rank, at most 4,096 MiB)" in text
    assert "sent by each rank:" in text
    large = clipfast.explain(1024, 512, "bfloat16", world_size=4096, backend="torch")
    assert large.ranks is not None
    assert large.ranks.scheme == "ring"
    assert (
        large.ranks.held_bytes
        == clipfast.explain(1024, 512, "bfloat16", world_size=8, scheme="ring", backend="torch").ranks.held_bytes
    )
    for wrong, name in (({"world_size": 0}, "world_size"), ({"world_size": 2, "scheme": "tree"}, "scheme")):
        with pytest.raises(ValueError, match=f"{name}: got"):
            clipfast.explain(8, 8, **wrong)


def test_scaling_benchmark(tmp_path: Path) -> None:
    result = scaling.run(scaling.Setting(tflops=400, gigabytes=50), [1, 2], rows=24, rounds=1)
    both_towers = 4 * 24 * scaling.WIDTH * 4
    for row in result["measured"]:
        peer, scheme = row["candidate"].split(", ") if ", " in row["candidate"] else (row["candidate"], "")
        if peer == "open_clip":
            assert row["products"] == pytest.approx(6 / row["ranks"] if scheme else 3)
            assert row["bytes_sent"] == (row["ranks"] - 1) * both_towers
            continue
        assert row["products"] == pytest.approx(4 / row["ranks"])
        explained = clipfast.explain(24, scaling.WIDTH, world_size=row["ranks"], scheme=scheme).ranks
        if row["ranks"] > 1:
            assert explained is not None
            assert row["bytes_sent"] == explained.forward_bytes + explained.backward_bytes
    assert [row["ranks"] for row in result["measured"]] == [1] * 4 + [2] * 4
    assert scaling.table(result).count("\n") > 40
    scaling.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
