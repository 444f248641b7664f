"""Logits that the compiled kernels keep: over their chunks, over instruction sets, and how many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import features
from test_kept import loss_and_gradients
from torch import Tensor

import clipfast
from benchmarks.environment import SavedStorages
from clipfast import dispatch, operators
from clipfast.backends import cpu
from clipfast.problem import accumulation_dtype
from clipfast.softmax import Options

if not cpu.instruction_sets():
    pytest.skip("; ".join(clipfast.backends()["cpu"]), allow_module_level=True)

AVAILABLE = [name for name, here in cpu.instruction_sets().items() if here]


def bytes_kept(n: int, m: int, dtype: torch.dtype) -> int:
    return dispatch.kept_bytes("cpu", n, m, dtype)


def test_more_rows_than_a_chunk() -> None:
    x, y = (t.requires_grad_() for t in features("trained", 4200, 4300, 8))
    kept, formed = (loss_and_gradients(x, y, "cpu", keep_bytes=count) for count in (1 << 30, 0))
    assert all(torch.equal(a, b) for a, b in zip(kept, formed, strict=True))


@pytest.mark.skipif(len(AVAILABLE) < 2, reason="needs two instruction sets")
def test_another_instruction_set_takes_none_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its panels may be of another width; it recomputes then."""
    x, y = (t.requires_grad_() for t in features("trained", 50, 70, 20))
    gradients = []
    for second in AVAILABLE:
        monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, AVAILABLE[0])
        loss = clipfast.contrastive_loss(x, y, 14.3, direction="image_to_text", backend="cpu")
        monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, second)
        gradients.append(torch.autograd.grad(loss, (x, y)))
    for other in gradients[1:]:
        for got, expected in zip(other, gradients[0], strict=True):
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def kept_storage(x: Tensor, y: Tensor, **options: Any) -> int:
    """The largest of the tensors that autograd saves."""
    with SavedStorages() as saved:
        clipfast.contrastive_loss(x, y, 14.3, direction="image_to_text", backend="cpu", **options)
    return max(saved.sizes.values())


def test_no_more_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (t.requires_grad_() for t in features("trained", 300, 400, 8))
    needed = bytes_kept(300, 400, torch.float32)
    assert 4 * 300 * 400 < needed <= 4 * 300 * 464 + 64
    assert kept_storage(x, y) == kept_storage(x, y, keep_bytes=needed) == needed
    assert kept_storage(x, y, keep_bytes=needed - 1) == kept_storage(x, y, keep_bytes=0) == y.nbytes
    monkeypatch.setenv(dispatch.KEEP_VARIABLE, str(needed - 1))
    assert kept_storage(x, y) == y.nbytes
    monkeypatch.setenv(dispatch.KEEP_VARIABLE, "much")
    with pytest.raises(ValueError, match="CLIPFAST_KEEP_BYTES: got 'much'; accepted is a number of bytes"):
        kept_storage(x, y)
    with pytest.raises(TypeError, match="keep_bytes: got -1; accepted is a number of bytes, or None"):
        kept_storage(x, y, keep_bytes=-1)


def test_explain_says_so() -> None:
    options: dict[str, Any] = {"label_smoothing": 0.1}
    kept, formed = (clipfast.explain(1024, 512, keep_bytes=count, **options) for count in (None, 0))
    assert (kept.backward_products, formed.backward_products) == (2, 3)
    assert kept.saved_bytes - formed.saved_bytes == bytes_kept(1024, 1024, torch.float32)
    assert "kept for the backward pass" in str(kept)
    assert "never stored" in str(formed)
    assert clipfast.explain(4096, 512).keeps_logits
    assert clipfast.explain(8192, 512).backward_products == 3
    at_once = clipfast.explain(1024, 512)
    assert (at_once.forward_products, at_once.backward_products) == (3, 0)
    assert "held while the gradients are formed with the loss" in str(at_once)
    x, y = (t.requires_grad_() for t in features("random", 1024, 1024, 512))
    with SavedStorages() as saved:
        clipfast.contrastive_loss(x, y, 14.3, backend="cpu")
    assert 0 <= at_once.saved_bytes - saved.total <= 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.25, 1 / 3, 65536.0, 0.0])
def test_gradients_that_come_with_the_loss_are_scaled(dtype: torch.dtype, upstream: float) -> None:
    """A power of two changes no bit, another number rounds once more; float16 keeps small ones until they are scaled"""
    inputs = [t.requires_grad_() for t in (*features("trained", 70, 90, 33, dtype), torch.tensor(14.3))]

    def gradients(times: float, keep_bytes: int | None = None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(times * clipfast.contrastive_loss(*inputs, keep_bytes=keep_bytes), inputs)

    got = gradients(upstream)
    if upstream != 1 / 3:
        assert all(torch.equal(a, b) for a, b in zip(got, gradients(upstream, keep_bytes=0), strict=True))
    elif dtype != torch.float16:
        factor = torch.tensor(upstream, dtype=accumulation_dtype(dtype))
        assert all(torch.equal(a, b * factor) for a, b in zip(got, gradients(1.0), strict=True))
    else:
        for a, b in zip(got, gradients(upstream, keep_bytes=0), strict=True):
            assert (a - b).norm() <= 2 * torch.finfo(a.dtype).eps * b.norm()


def test_a_gradient_of_one_is_not_multiplied_and_a_kept_graph_gives_copies() -> None:
    """What was formed is given away where nothing looks at it again; else it may be changed in place."""
    x, y = (t.requires_grad_() for t in features("trained", 70, 90, 33))
    expected = torch.autograd.grad(clipfast.contrastive_loss(x, y, 14.3), (x, y))
    loss = clipfast.contrastive_loss(x, y, 14.3)
    for _ in range(2):
        got = torch.autograd.grad(loss, (x, y), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        for gradient in got:
            gradient.zero_()
    loss.backward()
    formed = x.grad
    assert formed is not None
    assert torch.equal(formed, expected[0])
    clipfast.contrastive_loss(x, y, 14.3).backward()
    assert x.grad is formed
    assert torch.equal(formed, 2 * expected[0])


def test_the_environment_is_asked_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the same call was settled before."""
    x, y = (t.requires_grad_() for t in features("trained", 70, 90, 33))

    def saved() -> int:
        with SavedStorages() as storages:
            clipfast.contrastive_loss(x, y, 14.3, label_smoothing=0.1)
        return max(storages.sizes.values())

    kept = bytes_kept(70, 90, torch.float32)
    assert saved() == kept
    monkeypatch.setenv("CLIPFAST_KEEP_BYTES", "0")
    assert saved() < kept
    monkeypatch.setenv("CLIPFAST_KEEP_BYTES", "many")
    with pytest.raises(ValueError, match="CLIPFAST_KEEP_BYTES: got 'many'"):
        saved()
    monkeypatch.delenv("CLIPFAST_KEEP_BYTES")
    assert saved() == kept
    monkeypatch.setenv("CLIPFAST_BACKEND", "nothing")
    with pytest.raises(ValueError, match="CLIPFAST_BACKEND: 'nothing' is unknown"):
        saved()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, y = (t.requires_grad_() for t in features("trained", 5, 7, 4, dtype))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (14.3, 0.5))
    options = Options(True, 0.0, "both", "mean", "ignore", False, "cpu", True)
    torch.library.opcheck(operators.symmetric_loss.operator, (x, y, scale, bias, None, None, *options))


def test_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(clipfast.contrastive_loss, fullgraph=True, dynamic=True)
    for n in (50, 90):
        x, y = (t.requires_grad_() for t in features("trained", n, n, 24))
        losses = (loss(x, y, 14.3) for loss in (compiled, clipfast.contrastive_loss))
        got, expected = (torch.autograd.grad(loss, (x, y)) for loss in losses)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("options", [{"direction": "image_to_text"}, {"reduction": "none"}, {"label_smoothing": 0.1}])
def test_only_the_plain_loss_has_its_gradients_formed_with_it(options: dict[str, Any]) -> None:
    x, y = (t.requires_grad_() for t in features("trained", 70, 90, 33))
    with SavedStorages() as saved:
        clipfast.contrastive_loss(x, y, 14.3, backend="cpu", **options)
    assert max(saved.sizes.values()) == bytes_kept(70, 90, torch.float32)


def test_nothing_is_kept_without_gradients() -> None:
    x, y = features("trained", 40, 50, 8)
    with torch.no_grad():
        loss = clipfast.contrastive_loss(x, y, 14.3, backend="cpu")
    assert torch.equal(loss, clipfast.contrastive_loss(x, y, 14.3, backend="cpu"))
