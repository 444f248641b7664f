"""Cached steps have the gradients of the whole batch at once (traps 2, 33)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cached_ranks import cached
from oracle import error
from ranks import Failed, Ranks
from torch import Tensor, nn
from towers import Towers

import clipfast
from clipfast import cached as module
from clipfast.models import CBOW, CLIP, ResNet, TextTransformer, VisionTransformer

N = 24
ENCODERS = {
    "vit, transformer": lambda: CLIP(VisionTransformer(8, 4, 8, 1, 2), TextTransformer(20, 5, 8, 1, 2), 6),
    "vit, cbow": lambda: CLIP(VisionTransformer(8, 4, 8, 1, 2), CBOW(20, 8), 6),
    "resnet, cbow": lambda: CLIP(ResNet((1, 1), 2, 2, 16), CBOW(20, 8), 6),
    "towers": Towers,
}


def batch(model: nn.Module, n: int = N) -> tuple[Tensor, Tensor]:
    if isinstance(model, Towers):
        return torch.randn(n, 6), torch.randn(n, 7)
    return torch.randn(n, 3, *[model.image_encoder.image_size] * 2), torch.randint(1, 20, (n, 5))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(got: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == exact.keys()
    largest = max(gradient.abs().max().item() for gradient in exact.values())
    for name, gradient in got.items():
        assert error(gradient, exact[name]) <= tolerance * largest, name


def by_parts(model: nn.Module, inputs: tuple[Tensor, ...], rows: int) -> Tensor:
    """The loss in one graph of all micro-batches, in the order in which cached_step takes them."""
    parts = [model(*part) for part in zip(*(t.split(rows) for t in inputs), strict=True)]
    joined = {
        name: value if value.ndim == 0 else torch.cat([part[name] for part in parts])
        for name, value in parts[-1].items()
    }
    loss = clipfast.ContrastiveLoss()(**joined)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("micro_batch", [N, 8, 5, 1])
def test_gradients_are_those_of_the_whole_batch(kind: str, micro_batch: int) -> None:
    model = ENCODERS[kind]().eval()  # batch normalization by its running statistics
    inputs = batch(model)
    expected = clipfast.ContrastiveLoss()(**model(*inputs))
    expected.backward()
    exact = gradients(model)
    got = clipfast.cached_step(model, inputs, clipfast.ContrastiveLoss(), micro_batch)
    assert not got.requires_grad
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(model), exact)


def test_gradients_are_added() -> None:
    model = Towers()
    inputs = batch(model)
    clipfast.cached_step(model, inputs, clipfast.ContrastiveLoss(), 5)
    once = {name: 2 * gradient for name, gradient in gradients(model).items()}
    for _ in range(2):
        clipfast.cached_step(model, inputs, clipfast.ContrastiveLoss(), 5)
    assert_close(gradients(model), once)


@pytest.mark.parametrize("keep_bytes", [None, 0, 10**9])
def test_dropout_is_the_same_in_both_passes(keep_bytes: int | None) -> None:
    model = CLIP(VisionTransformer(8, 4, 8, 1, 2, dropout=0.5), CBOW(20, 8, dropout=0.5), 6)
    inputs = batch(model)
    torch.manual_seed(7)
    expected = by_parts(model, inputs, 8)
    after, exact = torch.get_rng_state(), gradients(model)
    torch.manual_seed(7)
    loss = clipfast.cached_loss(model, inputs, clipfast.ContrastiveLoss(), 8, keep_bytes=keep_bytes)
    torch.randn(3)  # what a trainer draws between the passes
    between = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), between)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(model), exact)
    torch.manual_seed(7)
    clipfast.cached_step(model, inputs, clipfast.ContrastiveLoss(), 8)
    assert torch.equal(torch.get_rng_state(), after)


def test_without_randomness_no_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.random, "fork_rng", None)
    model = Towers()
    clipfast.cached_step(model, batch(model), clipfast.ContrastiveLoss(), 8)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_the_same_in_both_passes(inside: bool) -> None:
    """Also where backward() is called outside; casts without a graph are not taken for casts with one."""
    model = CLIP(VisionTransformer(8, 4, 8, 1, 2), CBOW(20, 8), 6)
    inputs = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_parts(model, inputs, 8)
        exact = gradients(model)
        loss = clipfast.cached_loss(model, inputs, clipfast.ContrastiveLoss(), 8, keep_bytes=0)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(model), exact, 1e-2)


def test_a_scaled_loss() -> None:
    model = Towers()
    inputs = batch(model)
    expected = by_parts(model, inputs, N)
    exact = {name: 1024 * gradient for name, gradient in gradients(model).items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = clipfast.cached_step(model, inputs, clipfast.ContrastiveLoss(), 5, scaler=scaler)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(model), exact)


def test_running_statistics_are_updated_once() -> None:
    """By each micro-batch, with its own statistics, in every mode of keeping graphs."""
    model = ENCODERS["resnet, cbow"]()
    inputs = batch(model)
    expected, frozen = copy.deepcopy(model), copy.deepcopy(model)
    by_parts(expected, inputs, 8)
    exact = gradients(expected)
    for keep_bytes in (None, 0, 10**9):
        got = copy.deepcopy(model)
        clipfast.cached_step(got, inputs, clipfast.ContrastiveLoss(), 8, keep_bytes=keep_bytes)
        assert_close(gradients(got), exact)
        for name, value in expected.named_buffers():
            assert torch.allclose(got.get_buffer(name), value), name
        assert all(norm.track_running_stats for norm in got.modules() if isinstance(norm, nn.BatchNorm2d))
    norms = [norm.eval() for norm in frozen.modules() if isinstance(norm, nn.BatchNorm2d)]
    before = copy.deepcopy(dict(frozen.named_buffers()))
    clipfast.cached_step(frozen, inputs, clipfast.ContrastiveLoss(), 8)
    assert norms
    assert all(torch.equal(value, before[name]) for name, value in frozen.named_buffers())


@pytest.mark.parametrize("frozen", [("image",), ("text",), ("image", "text")])
def test_frozen_towers(frozen: tuple[str, ...]) -> None:
    model = Towers()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    inputs, calls = batch(model), 0

    def called(*_: object) -> None:
        nonlocal calls
        calls += 1

    by_parts(model, inputs, N)
    exact = gradients(model)
    model.register_forward_hook(called)
    clipfast.cached_step(model, inputs, clipfast.ContrastiveLoss(), 8)
    assert calls == (4 if len(frozen) == 2 else 5)
    assert_close(gradients(model), exact)
    model.requires_grad_(False)
    assert not clipfast.cached_loss(model, inputs, clipfast.ContrastiveLoss(), 8).requires_grad


@pytest.mark.parametrize(("keep_bytes", "calls"), [(None, 5), (0, 6), (10**9, 3)])
def test_kept_graphs_are_not_encoded_twice(keep_bytes: int | None, calls: int) -> None:
    model, got = Towers(), 0

    def called(*_: object) -> None:
        nonlocal got
        got += 1

    model.register_forward_hook(called)
    clipfast.cached_step(model, batch(model), clipfast.ContrastiveLoss(), 8, keep_bytes=keep_bytes)
    assert got == calls


def test_a_byte_budget_counts_graphs() -> None:
    """A micro-batch of 8 rows saves as much as the whole batch of 8 does; two fit twice that."""
    model = Towers()
    inputs = batch(model)
    saved = module._SavedBytes(model)
    with saved:
        model(*(t[:8] for t in inputs))
    parts = module._Parts(model, module._cut(inputs, N, 3), "last")
    parts.encode(2 * saved.total)
    assert 0 < saved.total < 10_000
    assert list(parts.kept) == [0, 1]


def test_twice_backward_is_twice_the_gradient() -> None:
    model = Towers()
    loss = clipfast.cached_loss(model, batch(model), clipfast.ContrastiveLoss(), 5)
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_close(gradients(model), once)


def test_without_gradients_it_is_the_loss() -> None:
    model = Towers()
    inputs = batch(model)
    with torch.no_grad():
        loss = clipfast.cached_loss(model, inputs, clipfast.ContrastiveLoss(), 5)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(by_parts(model, inputs, N).item(), rel=1e-6)


class Named(nn.Module):
    """Inputs by name, nested, in lists, and some that are not cut."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = Towers()

    def forward(self, images: dict[str, Tensor], words: list[str], texts: Tensor, gain: Any, flag: bool) -> Any:
        assert len(words) == len(texts)
        assert flag is True
        return self.towers(images["pixels"], texts + torch.tensor([[float(word)] for word in words])) | {
            "logit_scale": gain * self.towers.logit_scale.exp()
        }


def test_what_a_batch_may_be() -> None:
    model = Named()
    images, texts = batch(model.towers)
    whole = {
        "images": {"pixels": images},
        "words": [str(i % 3) for i in range(N)],
        "texts": texts,
        "gain": torch.tensor(2.0),
        "flag": True,
    }
    clipfast.ContrastiveLoss()(**model(**whole)).backward()
    exact = gradients(model)
    clipfast.cached_step(model, whole, clipfast.ContrastiveLoss(), 7)
    assert_close(gradients(model), exact)


def test_siglip() -> None:
    model = Towers()
    inputs = batch(model)
    clipfast.SigLipLoss()(**model(*inputs)).backward()
    exact = gradients(model)
    clipfast.cached_step(model, list(inputs), clipfast.SigLipLoss(), 5)
    assert_close(gradients(model), exact)


def test_errors() -> None:
    model, loss = Towers(), clipfast.ContrastiveLoss()
    images, texts = batch(model)

    def fails(kind: type[Exception], match: str, inputs: Any = (images, texts), size: Any = 5, **given: Any) -> None:
        with pytest.raises(kind, match=match):
            clipfast.cached_step(given.pop("model", model), inputs, given.pop("loss", loss), size, **given)

    fails(ValueError, "^micro_batch: got 0; accepted", size=0)
    fails(ValueError, "^micro_batch: got True", size=True)
    fails(ValueError, "^sync: got 'never'", sync="never")
    fails(ValueError, "^batch: got first dimensions 23, 24; accepted", inputs=(images, texts[1:]))
    fails(ValueError, "^batch: got first dimensions 0; accepted", inputs=())
    fails(TypeError, "^batch: got Tensor; accepted", inputs=images)
    fails(TypeError, "^loss: gave dict; accepted", loss=lambda **outputs: loss(**outputs, output_dict=True))
    fails(TypeError, "^model: gave Tensor; accepted is a dict", inputs=(images,), model=model.image)
    wrong = Towers()
    wrong.register_forward_hook(lambda *given: given[2] | {"text_features": given[2]["text_features"][1:]})
    fails(ValueError, "^model: text_features has 3 rows; accepted are the 4 of its micro-batch", model=wrong)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    two = Ranks(2)
    yield two
    two.close()


@pytest.mark.parametrize("sizes", [(12, 12), (16, 5)])
@pytest.mark.parametrize(
    ("wrapper", "keep_bytes", "sync"),
    [
        ("ddp", None, "last"),
        ("ddp", 0, "last"),
        ("ddp", 10**9, "last"),
        ("fsdp2", None, "last"),
        ("fsdp2", None, "each"),
        ("fsdp2", 10**9, "last"),
    ],
)
def test_ranks_have_the_gradients_of_one_process(
    ranks: Ranks, wrapper: str, keep_bytes: int | None, sync: str, sizes: tuple[int, int]
) -> None:
    """One reduction for each step; as many micro-batches on the rank with fewer rows."""
    torch.manual_seed(0)
    model = Towers().double()
    images, texts = (t.double() for t in batch(model, sum(sizes)))
    expected = by_parts(model, (images, texts), sum(sizes))
    exact = {name: 2 * gradient for name, gradient in gradients(model).items()}
    options = {"keep_bytes": keep_bytes, "sync": sync}
    results = ranks.run(cached, images.split(sizes), texts.split(sizes), wrapper, 4, options)
    for result in results:
        assert not isinstance(result, Failed), result
        loss, calls, reductions, got = result
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        parts = -(-max(sizes) // 4)
        assert calls == 2 * (2 * parts - {None: 1, 0: 0, 10**9: parts}[keep_bytes])
        assert reductions == (2 if wrapper == "ddp" else 0)
        assert_close(got, exact, 1e-12)


def test_a_rank_with_too_few_rows_is_an_error_on_all(ranks: Ranks) -> None:
    images, texts = (t.double() for t in batch(Towers(), 18))
    results = ranks.run(cached, images.split((16, 2)), texts.split((16, 2)), "ddp", 4, {})
    assert [str(result) for result in results] == [
        "ValueError: batch: a rank has 2 rows; accepted is at least one for each of 4 micro-batches"
    ] * 2
