"""Logits that the forward pass keeps: the same gradients, bit for bit, of three products; memory within the bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import features
from torch import Tensor

import clipfast
from benchmarks.environment import SavedStorages
from benchmarks.scaling import Counter
from clipfast import dispatch
from clipfast.backends import torch as torch_backend

SAME = {"image_ids": torch.arange(70) % 23, "text_ids": torch.arange(517) % 23}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"normalize": True, "direction": "image_to_text", "reduction": "none"},
    {"label_smoothing": 0.1, "return_metrics": True},
    SAME,
    SAME | {"same_id": "positive", "normalize": True},
)


def loss_and_gradients(x: Tensor, y: Tensor, backend: str, **options: Any) -> tuple[Tensor, ...]:
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (14.3, -3.0))
    value = clipfast.contrastive_loss(x, y, scale, bias, backend=backend, **options)
    loss = value[0] if isinstance(value, tuple) else value
    return loss, *torch.autograd.grad(loss.sum(), (x, y, scale, bias))


def assert_the_same_bits(n: int, m: int, d: int, dtype: torch.dtype, backend: str, **options: Any) -> None:
    x, y = ((t / 4).requires_grad_() for t in features("unnormalized", n, m, d, dtype))
    kept, formed = (loss_and_gradients(x, y, backend, keep_bytes=count, **options) for count in (1 << 30, 0))
    for got, expected in zip(kept, formed, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.needs("ids", "ranks")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_the_same_bits(70, 517, 33, dtype, backend, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_of_one_row_at_a_time(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "CHUNK_BYTES", 1)
    assert_the_same_bits(70, 517, 33, dtype, "torch", **options)


def test_a_graph_that_is_kept_gives_the_same_twice(backend: str) -> None:
    x, y = (t.requires_grad_() for t in features("trained", 100, 130, 24))
    loss = clipfast.contrastive_loss(x, y, 14.3, keep_bytes=1 << 30, backend=backend)
    first, second = (torch.autograd.grad(loss, (x, y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("fewer", "products"), [(0, 3), (1, 4)])
def test_bytes(backend: str, fewer: int, products: int) -> None:
    keep_bytes = dispatch.kept_bytes(backend, 100, 130, torch.float32) - fewer
    x, y = (t.requires_grad_() for t in features("trained", 100, 130, 24))
    told = clipfast.explain(100, 24, m=130, label_smoothing=0.1, keep_bytes=keep_bytes, backend=backend)
    assert told.forward_products + told.backward_products == products
    with SavedStorages() as saved:
        clipfast.contrastive_loss(x, y, 14.3, label_smoothing=0.1, keep_bytes=keep_bytes, backend=backend)
    assert (max(saved.sizes.values()) == keep_bytes) == (fewer == 0)
    assert saved.total <= told.saved_bytes


@pytest.mark.parametrize(("keep_bytes", "products"), [(4 * 100 * 130, 3), (4 * 100 * 130 - 1, 4)])
def test_products(keep_bytes: int, products: int) -> None:
    """Of the torch backend, whose products can be counted."""
    x, y = (t.requires_grad_() for t in features("trained", 100, 130, 24))
    with Counter() as counter:
        clipfast.contrastive_loss(x, y, 14.3, keep_bytes=keep_bytes, backend="torch").backward()
    assert counter.products == products * 100 * 130 * 24


@pytest.mark.parametrize(("dtype", "keeps"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_triton_keeps_where_that_should_pay(dtype: torch.dtype, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if reasons := dispatch.backends()["triton"]:
        pytest.skip("; ".join(reasons))
    told = clipfast.explain(1024, 512, dtype, backend="triton")
    assert told.keeps_logits == keeps
    assert "by arithmetic that nobody has measured" in str(told)
    monkeypatch.setenv(dispatch.KEEP_VARIABLE, str(1 << 30))
    assert clipfast.explain(1024, 512, dtype, backend="triton").keeps_logits
    assert not clipfast.explain(1024, 512, dtype, backend="triton", keep_bytes=0).keeps_logits
