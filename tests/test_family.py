"""The loss family through the public functions, three ways and against the real peers (traps 4-9, 11, 17, 29, 32)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import SCALES, Result, assert_three_way, error, evaluate, features, ours
from torch import Tensor

import clipfast
from clipfast import operators, reference
from clipfast.calls import METRIC_KS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("loss", "dx", "dy", "dscale", "dbias")


def random_ids(n: int, m: int, groups: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n + m + groups)
    return {
        name: torch.randint(-groups, groups, (size,), generator=generator) * 10**12
        for name, size in (("image_ids", n), ("text_ids", m))
    }


@pytest.mark.needs("ids")
@pytest.mark.parametrize(
    ("direction", "smoothing"), [("both", 0.0), ("both", 0.2), ("image_to_text", 0.2), ("text_to_image", 0.0)]
)
@pytest.mark.parametrize("same_id", ["ignore", "positive"])
@pytest.mark.parametrize(("n", "m", "groups"), [(1, 1, 1), (2, 3, 1), (61, 61, 4), (61, 73, 40), (130, 150, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids(
    backend: str, dtype: torch.dtype, n: int, m: int, groups: int, smoothing: float, same_id: str, direction: str
) -> None:
    x, y = features("trained", n, m, 40, dtype)
    options = {"label_smoothing": smoothing, "same_id": same_id, "direction": direction}
    assert_three_way(x, y, 14.3, bias=0.25, backend=backend, **random_ids(n, m, groups), **options)


@pytest.mark.needs("ids")
@pytest.mark.parametrize("same_id", ["ignore", "positive"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["random", "matched", "opposed", "collapsed", "unnormalized"])
def test_ids_at_every_scale(backend: str, kind: str, scale: float, same_id: str) -> None:
    assert_three_way(*features(kind, 64, 64, 64), scale, backend=backend, **random_ids(64, 64, 15), same_id=same_id)


@pytest.mark.needs("ids")
def test_text_ids_are_image_ids_where_left_out(backend: str) -> None:
    x, y = features("trained", 40, 40, 12)
    ids = torch.randint(5, (40,))
    losses = [
        clipfast.contrastive_loss(x, y, 5.0, image_ids=ids, text_ids=text_ids, backend=backend)
        for text_ids in (None, ids)
    ]
    assert torch.equal(*losses)


@pytest.mark.needs("ids")
def test_a_row_whose_every_other_column_is_left_out(backend: str) -> None:
    """It has no loss and no gradient, and breaks nobody else's."""
    x, y = features("random", 30, 30, 12)
    same = torch.zeros(30, dtype=torch.long)
    got = ours(x, y, 14.3, backend=backend, image_ids=same)
    for name in NAMES:
        assert not getattr(got, name).any(), name
    distinct = torch.arange(30)
    assert_equal(ours(x, y, 14.3, backend=backend, image_ids=distinct), ours(x, y, 14.3, backend=backend), 1e-6)


@pytest.mark.needs("ids")
@pytest.mark.parametrize("same_id", ["ignore", "positive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ids_and_normalize(backend: str, dtype: torch.dtype, same_id: str) -> None:
    x, y = features("unnormalized", 33, 40, 21, dtype)
    ids = random_ids(33, 40, 9)
    exact = evaluate(
        normalized(reference.contrastive_loss), x.double(), y.double(), 14.3,
        scalar_dtype=torch.float64, same_id=same_id, **ids,
    )  # fmt: skip
    got = ours(x, y, 14.3, normalize=True, same_id=same_id, backend=backend, **ids)
    assert_equal(got, exact, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("direction", ["both", "image_to_text", "text_to_image"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_losses_of_rows(backend: str, dtype: torch.dtype, smoothing: float, direction: str) -> None:
    """Weighted by the caller; their mean is the loss."""
    x, y = features("trained", 50, 61, 24, dtype)
    sample_weights = torch.rand(1 if direction != "both" else 2, 50).double()
    options = {"label_smoothing": smoothing, "direction": direction}

    def dense(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return (reference.contrastive_losses(x, y, s, b, **options) * sample_weights.to(s.dtype)).sum() / 50

    def of_rows(x: Tensor, y: Tensor, s: Tensor, b: Tensor, backend: str) -> Tensor:
        losses = clipfast.contrastive_loss(x, y, s, b, reduction="none", backend=backend, **options)
        assert losses.shape == ((2, 50) if direction == "both" else (50,))
        mean = clipfast.contrastive_loss(x, y, s, b, backend=backend, **options)
        assert error(losses.mean(), mean) <= 1e-6
        return (losses.reshape(-1, 50) * sample_weights.to(s.dtype)).sum() / 50

    assert_three_way(x, y, 14.3, backend=backend, formula=dense, exact_formula=dense, loss_fn=of_rows)


def test_one_direction_is_the_transpose_of_the_other(backend: str) -> None:
    x, y = features("trained", 50, 50, 24)
    first = ours(x, y, 14.3, direction="text_to_image", backend=backend)
    second = ours(y, x, 14.3, direction="image_to_text", backend=backend)
    assert error(first.loss, second.loss) <= 1e-6
    assert error(first.dx, second.dy) <= 1e-6


@pytest.mark.needs("ranks", "ids")
@pytest.mark.parametrize("same_id", [None, "ignore", "positive"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (300, 300), (257, 311)])
def test_metrics(backend: str, n: int, m: int, normalize: bool, same_id: str | None) -> None:
    x, y = (3 * t for t in features("trained", n, m, 6))
    ids = random_ids(n, m, 30) if same_id else {}
    options: dict[str, Any] = {"normalize": normalize, "backend": backend, **ids}
    if same_id:
        options["same_id"] = same_id
    x.requires_grad_()
    loss, metrics = clipfast.contrastive_loss(x, y, 5.0, return_metrics=True, **options)
    plain = clipfast.contrastive_loss(x, y, 5.0, **options)
    assert torch.equal(loss, plain)
    (gradient,), (expected,) = (torch.autograd.grad(value, x) for value in (loss, plain))
    assert torch.equal(gradient, expected)
    similarity = (x / x.norm(dim=1, keepdim=True) if normalize else x).double() @ (
        y / y.norm(dim=1, keepdim=True) if normalize else y
    ).double().T
    own = torch.eye(n, m, dtype=torch.bool)
    matches = own | (ids["image_ids"][:, None] == ids["text_ids"]) if ids else own
    best = similarity.masked_fill(~matches, -torch.inf)
    for name, dim in (("image_to_text", 1), ("text_to_image", 0)):
        above = ((similarity >= best.amax(dim, keepdim=True)) & ~matches).sum(dim)[:n]
        for k in METRIC_KS:
            value = metrics[f"{name}_R@{k}"]
            assert value.shape == ()
            assert value == pytest.approx((above < k).double().mean().item(), abs=2 / n if n > 1 else 0)
    assert len(metrics) == 6


@pytest.mark.needs("ranks")
def test_metrics_under_autocast_equal_metrics_without(backend: str) -> None:
    x, y = features("trained", 200, 200, 16)
    _, outside = clipfast.contrastive_loss(x, y, 5.0, return_metrics=True, backend=backend)
    recall = clipfast.retrieval_metrics(x, y, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, inside = clipfast.contrastive_loss(x, y, 5.0, return_metrics=True, backend=backend)
        assert clipfast.retrieval_metrics(x, y, backend=backend) == recall
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


@pytest.mark.needs("ranks", "ids")
def test_retrieval_with_five_captions_for_an_image(backend: str) -> None:
    """COCO's layout; one image has no caption and one caption no image: candidates, not queries."""
    images, d = 60, 8
    x = torch.nn.functional.normalize(torch.randn(images, d), dim=1)
    text_ids = torch.arange(images).repeat(5)[torch.randperm(5 * images)]
    y = torch.nn.functional.normalize(x[text_ids] + 0.4 * torch.randn(5 * images, d), dim=1)
    x, image_ids = torch.cat((x, torch.randn(1, d))), torch.cat((torch.arange(images), torch.tensor([777])))
    y, text_ids = torch.cat((y, torch.randn(1, d))), torch.cat((text_ids, torch.tensor([888])))
    got = clipfast.retrieval_metrics(x, y, ks=(1, 4), image_ids=image_ids, text_ids=text_ids, backend=backend)
    similarity = (x / x.norm(dim=1, keepdim=True)) @ (y / y.norm(dim=1, keepdim=True)).T
    matches = image_ids[:, None] == text_ids
    for name, s, own in (("image_to_text", similarity, matches), ("text_to_image", similarity.T, matches.T)):
        best = s.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks = (1 + ((s >= best) & ~own).sum(1))[own.any(1)].double()
        assert got[f"{name}_R@1"] == pytest.approx((ranks <= 1).double().mean().item(), abs=1e-9)
        assert got[f"{name}_R@4"] == pytest.approx((ranks <= 4).double().mean().item(), abs=1e-9)
        assert got[f"{name}_mean_rank"] == pytest.approx(ranks.mean().item())
    with pytest.raises(ValueError, match="text_ids: no text has the id of an image"):
        clipfast.retrieval_metrics(x, y, image_ids=image_ids, text_ids=text_ids + 10**6, backend=backend)


def assert_siglip(x: Tensor, y: Tensor, scale: float, bias: float, *, backend: str, **options: Any) -> None:
    formula = reference.siglip_loss
    logits = reference.logits(x.double(), y.double(), scale, bias)
    g = torch.where(torch.eye(*logits.shape, dtype=torch.bool), -(-logits).sigmoid(), logits.sigmoid()).abs()
    if options.get("same_id") == "positive":
        g = torch.maximum(g, (-logits).sigmoid())
    assert_three_way(
        x, y, scale, bias, backend=backend, formula=formula, exact_formula=formula, loss_fn=clipfast.siglip_loss,
        gradient_sum=max(g.sum(1).max().item(), g.sum(0).max().item()), **options,
    )  # fmt: skip


@pytest.mark.needs("sigmoid")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["random", "trained", "matched", "opposed", "collapsed", "unnormalized"])
@pytest.mark.parametrize("bias", [-10.0, 0.0])
def test_siglip_scales_and_cosines(backend: str, bias: float, kind: str, scale: float) -> None:
    assert_siglip(*features(kind, 64, 64, 64), scale, bias, backend=backend)


@pytest.mark.needs("sigmoid")
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 3, 7), (2, 2, 100), (127, 257, 40), (257, 257, 512)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_siglip_shapes_and_dtypes(backend: str, dtype: torch.dtype, n: int, m: int, d: int) -> None:
    assert_siglip(*features("trained", n, m, d, dtype), 10.0, -10.0, backend=backend)


@pytest.mark.needs("sigmoid", "ids")
@pytest.mark.parametrize("same_id", ["ignore", "positive"])
@pytest.mark.parametrize("groups", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_siglip_ids(backend: str, dtype: torch.dtype, groups: int, same_id: str) -> None:
    options = {"same_id": same_id, **random_ids(61, 73, groups)}
    assert_siglip(*features("trained", 61, 73, 40, dtype), 10.0, -10.0, backend=backend, **options)


@pytest.mark.needs("sigmoid")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_siglip_normalizes(backend: str, dtype: torch.dtype) -> None:
    x, y = features("unnormalized", 33, 40, 21, dtype)
    dense = normalized(reference.siglip_loss)
    exact = evaluate(dense, x.double(), y.double(), 14.3, -10.0, scalar_dtype=torch.float64)
    got = ours(x, y, 14.3, -10.0, loss_fn=clipfast.siglip_loss, normalize=True, backend=backend)
    assert_equal(got, exact, 8 * torch.finfo(dtype).eps)


@pytest.mark.needs("sigmoid")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_siglip_takes_what_is_not_finite_as_the_dense_formula(backend: str, value: float) -> None:
    x, y = features("random", 40, 43, 8)
    y[1][3] = value
    dense, got = (
        evaluate(loss, x, y, 14.3, -10.0)
        for loss in (reference.siglip_loss, functools.partial(clipfast.siglip_loss, backend=backend))
    )
    assert torch.equal(got.loss.isfinite(), dense.loss.isfinite())
    assert torch.equal(got.loss.isnan(), dense.loss.isnan())


@pytest.mark.needs("sigmoid")
def test_siglip_of_a_well_trained_model_keeps_its_digits(backend: str) -> None:
    x, y = features("matched", 64, 64, 512)
    exact = evaluate(reference.siglip_loss, x.double(), y.double(), 60.0, -30.0, scalar_dtype=torch.float64)
    got = ours(x, y, 60.0, -30.0, loss_fn=clipfast.siglip_loss, backend=backend)
    assert exact.loss < 1e-8
    for name in NAMES:
        value = getattr(exact, name)
        assert error(getattr(got, name), value) <= 1e-4 * value.abs().max(), name


@pytest.mark.needs("sigmoid")
def test_siglip_under_autograd(backend: str) -> None:
    """The upstream gradient, twice, without gradients, and no second derivative."""
    x, y = (t.requires_grad_() for t in features("trained", 20, 20, 6))
    loss = clipfast.siglip_loss(x, y, 14.3, -10.0, backend=backend)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss.expand(4), x, torch.full((4,), 1024.0), retain_graph=True)
    torch.testing.assert_close(scaled, 4096 * once)
    with pytest.raises(RuntimeError, match="clipfast does not support double backward"):
        torch.autograd.grad(loss, x, create_graph=True)
    with torch.no_grad():
        assert torch.equal(clipfast.siglip_loss(x, y, 14.3, -10.0, backend=backend), loss)


@pytest.mark.needs("distillation")
@pytest.mark.parametrize("teacher_d", [24, 40])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (61, 61), (130, 157)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distillation(backend: str, dtype: torch.dtype, n: int, m: int, teacher_d: int) -> None:
    teacher = features("trained", n, m, teacher_d, dtype)

    def with_teacher(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, y, s, b, **o: loss(x, y, s, *(t.to(x.dtype) for t in teacher), 20.0, **o) + 0 * b

    dense = with_teacher(reference.distillation_loss)
    assert_three_way(
        *features("trained", n, m, 40, dtype), 14.3, backend=backend, formula=dense, exact_formula=dense,
        loss_fn=with_teacher(clipfast.distillation_loss), gradient_sum=4.0,  # two softmaxes more
    )  # fmt: skip


@pytest.mark.needs("distillation")
def test_distillation_from_itself_has_no_gradient(backend: str) -> None:
    x, y = features("trained", 64, 64, 24)
    leaves = [t.clone().requires_grad_() for t in (x, y, torch.tensor(14.3))]
    clipfast.distillation_loss(*leaves, x, y, 14.3, backend=backend).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.abs().max() <= 1e-6


@pytest.mark.needs("distillation")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["x", "y", "extra", "teacher x", "teacher y", "teacher extra"])
@pytest.mark.parametrize("kind", ["random", "positive"])
def test_distillation_takes_what_is_not_finite_as_the_dense_formula(
    backend: str, kind: str, place: str, value: float
) -> None:
    """Where all features are positive an infinite one makes logits of one sign, and most numbers stay finite."""
    x, y, *teacher = (t if kind == "random" else t.abs() for d in (8, 12) for t in features("random", 20, 23, d))
    of_x, of_y = teacher if place.startswith("teacher") else (x, y)
    {"x": of_x[1], "y": of_y[1], "extra": of_y[21]}[place.removeprefix("teacher ")][3] = value
    dense, got = (
        evaluate(lambda x, y, s, b, loss=loss: loss(x, y, s, *teacher, 20.0) + 0 * b, x, y, 14.3)
        for loss in (reference.distillation_loss, functools.partial(clipfast.distillation_loss, backend=backend))
    )
    for name in ("loss", "dx", "dy", "dscale"):
        expected, actual = getattr(dense, name), getattr(got, name)
        assert torch.equal(actual.isnan(), expected.isnan()), name
        assert torch.equal(actual.isinf(), expected.isinf()), name


@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 0.25)])
def test_matryoshka(backend: str, weights: tuple[float, ...] | None) -> None:
    dims = (4, 12, 24)

    def dense(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        parts = [normalized(reference.contrastive_loss)(x[:, :d], y[:, :d], s, b) for d in dims]
        return sum(w * part for w, part in zip(weights or (1.0,) * 3, parts, strict=True))  # type: ignore[return-value]

    loss = clipfast.matryoshka(functools.partial(clipfast.contrastive_loss, backend=backend), dims, weights)
    x, y = features("unnormalized", 40, 50, 24)
    exact = evaluate(dense, x.double(), y.double(), 14.3, scalar_dtype=torch.float64)
    assert_equal(evaluate(loss, x, y, 14.3), exact, 1e-5)
    module = clipfast.matryoshka(clipfast.ContrastiveLoss(normalize=True, backend=backend), dims, weights)
    assert error(module(x, y, 14.3, output_dict=True)["contrastive_loss"], loss(x, y, 14.3)) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (((), None), "dims: got none"),
        (((0,), None), "dims: got 0"),
        (((4, 8), (1.0,)), "weights: got 1; accepted is one for each of the 2 dims"),
        (((40,), None), "image_features: got d = 3; dims has 40"),
    ],
)
def test_matryoshka_refuses(arguments: tuple[Any, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        clipfast.matryoshka(clipfast.contrastive_loss, *arguments)(torch.ones(2, 3), torch.ones(2, 3), 1.0)
    with pytest.raises(ValueError, match="loss: got a module made with normalize=False"):
        clipfast.matryoshka(clipfast.ContrastiveLoss(), (2,))


def test_a_bias_for_each_candidate(backend: str) -> None:
    """What open_clip's ClipLoss makes of a logit_bias [n]."""
    x, y = features("trained", 40, 40, 16)
    bias = torch.randn(40, requires_grad=True)
    scale = torch.tensor(7.0, requires_grad=True)
    leaves = [t.requires_grad_() for t in (x, y)] + [scale, bias]

    def open_clip(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        labels = torch.arange(40)
        logits = (s * x @ y.T + b, s * y @ x.T + b)
        return sum(torch.nn.functional.cross_entropy(scores, labels) for scores in logits) / 2  # type: ignore[return-value]

    expected = open_clip(*leaves)
    got = clipfast.contrastive_loss(*leaves, backend=backend)
    assert error(got, expected) <= 1e-6
    for a, b in zip(*(torch.autograd.grad(value, leaves) for value in (got, expected)), strict=True):
        assert error(a, b) <= 1e-6


def operator_arguments(name: str, backend: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x, y = (t.requires_grad_() for t in features("trained", 5, 7, 4, dtype))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (14.3, -0.5))
    ids = torch.arange(5, dtype=torch.int32) % 3, torch.arange(7, dtype=torch.int32) % 3
    return {
        "contrastive_loss": (x, y, scale, bias, *ids, True, 0.1, "both", "none", "positive", True, backend),
        "siglip_loss": (x, y, scale, bias, *ids, True, True, "ignore", backend),
        "distillation_loss": (x, y, scale, x.detach() * 2, y.detach() * 2, scale.detach(), True, False, backend),
    }[name]


@pytest.mark.needs("ids", "ranks", "sigmoid", "distillation")
@pytest.mark.parametrize("name", ["contrastive_loss", "siglip_loss", "distillation_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(backend: str, dtype: torch.dtype, name: str) -> None:
    torch.library.opcheck(getattr(operators, name).operator, operator_arguments(name, backend, dtype))


@pytest.mark.needs("ids", "ranks", "sigmoid", "distillation")
def test_the_family_compiles_as_one_graph(backend: str) -> None:
    def step(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        ids = torch.arange(len(x)) % 7
        loss, metrics = clipfast.contrastive_loss(
            x, y, s, b, image_ids=ids, same_id="positive", return_metrics=True, backend=backend
        )
        loss = loss + clipfast.siglip_loss(x, y, s, b, image_ids=ids, backend=backend)
        loss = loss + clipfast.distillation_loss(x, y, s, x.detach() * 2, y.detach(), 3.0, backend=backend)
        return loss + metrics["image_to_text_R@1"]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        x, y = features("trained", n, n, 8)
        assert_equal(evaluate(compiled, x, y, 14.3), evaluate(step, x, y, 14.3), 1e-6)


def normalized(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, y, *rest, **named: loss(reference.l2_normalize(x), reference.l2_normalize(y), *rest, **named)


def assert_equal(got: Result, exact: Result, tolerance: float) -> None:
    for name in ("loss", "dx", "dy", "dscale"):
        value = getattr(exact, name)
        assert error(getattr(got, name), value) <= tolerance * max(1.0, value.abs().max().item()), name
