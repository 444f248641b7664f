"""SigLIP's loss and distillation over several ranks are those of one process with the whole batch (traps 1, 16, 17)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import features
from ranks import Ranks, formed
from shards import SCHEMES, SHARDS, Batch, joined, judge
from torch import Tensor

from clipfast import dispatch, reference
from clipfast.problem import Problem

TEACHER_SCALE = 20.0
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("siglip_loss", {}),
    "siglip, normalize": ("siglip_loss", {"normalize": True}),
    "siglip, ignore": ("siglip_loss", {"same_id": "ignore"}),
    "siglip, positive": ("siglip_loss", {"same_id": "positive", "normalize": True}),
    "distillation": ("distillation_loss", {}),
    "distillation, normalize": ("distillation_loss", {"normalize": True}),
}


def siglip(batch: Batch, x: Tensor, y: Tensor, s: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
    if options.get("normalize"):
        x, y = reference.l2_normalize(x), reference.l2_normalize(y)
    image_ids, text_ids = batch.ids
    ids = {} if text_ids is None else {"image_ids": image_ids, "text_ids": text_ids[batch.order]}
    return reference.siglip_loss(x, y, s, b, **ids, same_id=options.get("same_id", "ignore"))


def distillation(batch: Batch, x: Tensor, y: Tensor, s: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
    teacher_x, teacher_y = (torch.cat([shard[name] for shard in batch.shards]) for name in ("teacher_x", "teacher_y"))
    both = (x, y), (teacher_x.to(x.dtype), teacher_y[batch.order].to(x.dtype))
    if options.get("normalize"):
        both = tuple(tuple(reference.l2_normalize(t) for t in pair) for pair in both)
    return reference.distillation_loss(*both[0], s, *both[1], TEACHER_SCALE)


def make_batch(case: str, sizes: list[tuple[int, int]], d: int, dtype: torch.dtype) -> Batch:
    loss, options = OPTIONS[case]
    batch = Batch(sizes, d, dtype, ids="same_id" in options)
    if loss == "distillation_loss":
        x, y = features("trained", batch.n, batch.m, 11, dtype)
        rows = zip(x.split([n for n, _ in sizes]), y.split([m for _, m in sizes]), strict=True)
        for shard, (teacher_x, teacher_y) in zip(batch.shards, rows, strict=True):
            shard |= {"teacher_x": teacher_x, "teacher_y": teacher_y, "teacher_scale": TEACHER_SCALE}
    return batch


def assert_right(ranks: Ranks, case: str, batch: Batch, upstream: list[float] | None = None, **how: Any) -> None:
    loss, options = OPTIONS[case]
    scale, bias = 14.3, -3.0
    call = loss, batch.shards, scale, bias, {"backend": "torch"} | options | how, upstream or ()
    got = joined(ranks.run(formed, *call, ranks=range(len(batch.sizes))), {})
    if loss == "distillation_loss":
        judge(batch, got, scale, bias, options, upstream, distillation, gradient_sum=4.0)  # four softmaxes
        return
    x, y = (reference.l2_normalize(t.double()) if options.get("normalize") else t.double() for t in (batch.x, batch.y))
    g = (scale * x @ y.T + bias).sigmoid()
    judge(batch, got, scale, bias, options, upstream, siglip, 1 + max(g.sum(1).max().item(), g.sum(0).max().item()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("shards", SHARDS)
def test_loss_and_gradients(ranks: Ranks, shards: str, case: str, scheme: str) -> None:
    assert_right(ranks, case, make_batch(case, SHARDS[shards], 7, torch.float64), scheme=scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["siglip, positive", "siglip, ignore", "distillation, normalize"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_dtypes_and_backends(ranks: Ranks, backend: str, case: str, dtype: torch.dtype, scheme: str) -> None:
    batch = make_batch(case, [(30, 34), (50, 50), (9, 20)], 16, dtype)
    needs = {"sigmoid", "ids"} if case.startswith("siglip") else {"distillation"}
    problem = Problem(30, 104, 16, dtype, torch.device("cpu"), frozenset(needs))
    if reasons := dispatch.get(backend).unsupported_reasons(problem):
        pytest.skip("; ".join(reasons))
    assert_right(ranks, case, batch, scheme=scheme, backend=backend)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", ["siglip, positive", "distillation"])
def test_repeats_bitwise(ranks: Ranks, case: str, scheme: str) -> None:
    loss, options = OPTIONS[case]
    batch = make_batch(case, [(5, 8), (0, 0), (12, 12), (7, 9)], 16, torch.float32)
    call = loss, batch.shards, 14.3, -3.0, options | {"scheme": scheme}
    first, second = ranks.run(formed, *call), ranks.run(formed, *call)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", ["siglip", "distillation, normalize"])
def test_every_rank_has_an_upstream_gradient_of_its_own(ranks: Ranks, case: str) -> None:
    batch = make_batch(case, [(5, 5), (9, 9), (2, 2)], 7, torch.float64)
    assert_right(ranks, case, batch, upstream=[0.5, -3.0, 1.25])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", ["siglip, normalize", "distillation"])
def test_equal_shards_need_no_record(ranks: Ranks, case: str, scheme: str) -> None:
    batch = make_batch(case, [(5, 8)] * 3, 7, torch.float64)
    assert_right(ranks, case, batch, scheme=scheme, equal_shards=True)
