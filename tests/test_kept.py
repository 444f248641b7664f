"""Logits that the torch backend keeps: the same gradients, bit for bit, of three products; memory within the bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import features
from torch import Tensor

import clipfast
from benchmarks.environment import SavedStorages
from benchmarks.scaling import Counter
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


@pytest.mark.parametrize("chunk_bytes", [16 << 20, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits(
    dtype: torch.dtype, options: dict[str, Any], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "CHUNK_BYTES", chunk_bytes)  # all rows, or one, at a time
    x, y = ((t / 4).requires_grad_() for t in features("unnormalized", 70, 517, 33, dtype))
    kept, formed = (loss_and_gradients(x, y, "torch", keep_bytes=count, **options) for count in (1 << 30, 0))
    for got, expected in zip(kept, formed, strict=True):
        assert torch.equal(got, expected)


def test_a_graph_that_is_kept_gives_the_same_twice() -> None:
    x, y = (t.requires_grad_() for t in features("trained", 100, 130, 24))
    loss = clipfast.contrastive_loss(x, y, 14.3, backend="torch")
    first, second = (torch.autograd.grad(loss, (x, y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("keep_bytes", "products"), [(4 * 100 * 130, 3), (4 * 100 * 130 - 1, 4)])
def test_products_and_bytes(keep_bytes: int, products: int) -> None:
    x, y = (t.requires_grad_() for t in features("trained", 100, 130, 24))
    told = clipfast.explain(100, 24, m=130, keep_bytes=keep_bytes, backend="torch")
    assert told.forward_products + told.backward_products == products
    with Counter() as counter, SavedStorages() as saved:
        loss = clipfast.contrastive_loss(x, y, 14.3, keep_bytes=keep_bytes, backend="torch")
        loss.backward()
    assert counter.products == products * 100 * 130 * 24
    assert saved.total <= told.saved_bytes
