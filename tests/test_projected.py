"""The loss from the encoders' outputs on: value and all six gradients, three ways; what it saves; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import error
from torch import Tensor

import clipfast
from clipfast import reference

NAMES = ("image_features", "text_features", "w_i", "w_t", "t")


def operands(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    shapes = (n, 24), (m, 40), (24, 16), (40, 16)
    tensors = [torch.randn(shape, generator=generator) / shape[0] ** 0.25 for shape in shapes]
    return tuple(t.to(dtype).requires_grad_() for t in (*tensors, torch.tensor(2.66)))


def computed(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return loss, *torch.autograd.grad(loss, leaves)


def plain_layers(images: Tensor, texts: Tensor, w_i: Tensor, w_t: Tensor, t: Tensor) -> Tensor:
    x, y = (torch.nn.functional.normalize(product.float(), dim=1) for product in (images @ w_i, texts @ w_t))
    logits, labels = t.float().exp() * x @ y.T, torch.arange(len(x))
    return sum(torch.nn.functional.cross_entropy(z, labels) for z in (logits, logits.T[: len(x)])) / 2  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (50, 50), (130, 257)])
def test_three_ways(backend: str, n: int, m: int, dtype: torch.dtype) -> None:
    leaves = operands(n, m, dtype)
    exact_leaves = tuple(t.detach().double().requires_grad_() for t in leaves)
    exact = computed(reference.clip_loss(*exact_leaves), exact_leaves)
    peer = computed(plain_layers(*leaves), leaves)
    got = computed(
        clipfast.projected_contrastive_loss(
            *leaves[:4], leaves[4].float().exp() if dtype.itemsize < 4 else leaves[4].exp(), backend=backend
        ),
        leaves,
    )
    for name, a, b, c in zip(("loss", *NAMES), got, peer, exact, strict=True):
        # The rows may be normalized in their dtype.
        eps = torch.finfo(dtype).eps * (1 if name == "loss" else 4)
        size = c.abs().max().item()
        assert error(a, c) <= 2 * error(b, c) + eps * size + 4 * torch.finfo(torch.float32).eps, name
        assert a.dtype == b.dtype or name == "loss", name


@pytest.mark.needs("ids", "ranks")
def test_options(backend: str) -> None:
    images, texts, w_i, w_t, t = operands(60, 60, torch.float32)
    options: dict[str, Any] = {
        "image_ids": torch.arange(60) % 17, "same_id": "positive", "return_metrics": True, "label_smoothing": 0.1,
        "backend": backend,
    }  # fmt: skip
    loss, metrics = clipfast.projected_contrastive_loss(images, texts, w_i, w_t, t.exp(), **options)
    expected, counted = clipfast.contrastive_loss(images @ w_i, texts @ w_t, t.exp(), normalize=True, **options)
    assert torch.equal(loss, expected)
    assert metrics == counted


def test_what_is_saved_is_inputs_and_embeddings(backend: str) -> None:
    """No normalized copy: the projected rows, the inputs, and vectors."""
    images, texts, w_i, w_t, t = operands(500, 600, torch.float32)
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        clipfast.projected_contrastive_loss(images, texts, w_i, w_t, t.exp(), keep_bytes=0, backend=backend)
    inputs, embeddings = sum(tensor.nbytes for tensor in (images, texts, w_i, w_t)), (500 + 600) * 16 * 4
    assert sum(storages.values()) <= inputs + embeddings + 8 * (2 * 500 + 600) + 256


def test_autocast_and_two_dtypes(backend: str) -> None:
    images, texts, w_i, w_t, t = operands(40, 40, torch.float32)
    half = clipfast.projected_contrastive_loss(images.bfloat16(), texts.bfloat16(), w_i, w_t, t.exp(), backend=backend)
    exact = reference.clip_loss(images.bfloat16().float(), texts.bfloat16().float(), w_i, w_t, t)
    assert error(half, exact) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        loss = clipfast.projected_contrastive_loss(images, texts, w_i, w_t, t.exp(), backend=backend)
    assert loss.dtype == torch.float32
    assert error(loss, exact) <= 0.05


def test_what_it_refuses() -> None:
    images, texts, w_i, w_t, t = operands(4, 4, torch.float32)
    for arguments, options, failure, text in (
        ((images, texts, w_t, w_i), {}, ValueError, "w_i: got shape .40, 16.; its rows must be the columns of image"),
        ((images, texts, w_i, w_t[:, :3]), {}, ValueError, "text_features: got shape .4, 3.; its d must be"),
        ((images, texts, w_i, 3.0), {}, TypeError, "w_t: got float; accepted is a torch.Tensor"),
        ((images, texts, w_i, w_t), {"normalize": False}, TypeError, "normalize: not an option; projected"),
    ):
        with pytest.raises(failure, match=text):
            clipfast.projected_contrastive_loss(*arguments, t, **options)  # type: ignore[arg-type]
