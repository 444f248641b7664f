"""What fell when the losses were attacked, each as it was found (traps 23 to 25, 28 and 29)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracle import error, evaluate, features, half_operands, operand_rounding, reasons_against
from torch import Tensor
from torch.autograd import forward_ad

import clipfast
from clipfast import reference
from clipfast.problem import DISTILLATION, SIGMOID

TEACHER = features("trained", 8, 8, 5)
Loss = Callable[..., Tensor]


def distillation(function: Loss) -> Loss:
    """With a teacher, and a bias that has no part in it, to be called as the others."""
    return lambda x, y, s, b, **options: function(x, y, s, *(t.to(x.dtype) for t in TEACHER), 7.0, **options) + 0 * b


LOSSES = {
    "contrastive": (clipfast.contrastive_loss, reference.contrastive_loss),
    "siglip": (clipfast.siglip_loss, reference.siglip_loss),
    "distillation": (distillation(clipfast.distillation_loss), distillation(reference.distillation_loss)),
}


@pytest.fixture(params=LOSSES)
def losses(request: pytest.FixtureRequest) -> tuple[Loss, Loss]:
    """clipfast's loss and the reference's, skipped where the test's backend has a reason against it."""
    if "backend" in request.fixturenames:
        skip_without(request.getfixturevalue("backend"), request.param)
    return LOSSES[request.param]


def skip_without(backend: str, name: str) -> None:
    needs = {"contrastive": (), "siglip": (SIGMOID,), "distillation": (DISTILLATION,)}[name]
    if reasons := reasons_against(backend, torch.float32, *needs):
        pytest.skip("; ".join(reasons))


def assert_right(loss: Loss, formula: Loss, x: Tensor, y: Tensor, scale: float = 5.0, **options: Any) -> None:
    """Value and gradients in float32 against the formula in float64."""
    exact = evaluate(formula, x.double().clone(), y.double().clone(), scale, -1.0, scalar_dtype=torch.float64)
    got = evaluate(loss, x, y, scale, -1.0, **options)
    for name in ("loss", "dx", "dy", "dscale", "dbias"):
        bound = 1e-5 * max(1.0, getattr(exact, name).abs().max().item())
        assert error(getattr(got, name), getattr(exact, name)) <= bound, name


# Tensors that are not plain memory.


def test_lazy_negation(backend: str, losses: tuple[Loss, Loss]) -> None:
    x, y = (torch.randn(8, 4, dtype=torch.complex64).conj().imag for _ in range(2))
    assert x.is_neg()
    assert_right(*losses, x, y, backend=backend)


def test_zero_tensors(backend: str, losses: tuple[Loss, Loss]) -> None:
    zeros = torch._efficientzerotensor((8, 4))
    x = torch.randn(8, 4, requires_grad=True)
    scalars = torch.tensor(5.0), torch.tensor(-1.0)
    for pair in ((x, zeros), (zeros, x)):
        got = losses[0](*pair, *scalars, backend=backend)
        exact = losses[1](*(t.clone() for t in pair), *scalars)
        torch.testing.assert_close(got, exact)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (got, exact)))


@pytest.mark.parametrize(
    "make", [lambda _: torch._efficientzerotensor(()), lambda v: torch._neg_view(torch.tensor(-v))]
)
def test_a_scale_and_a_bias_that_are_not_plain_memory(
    backend: str, losses: tuple[Loss, Loss], make: Callable[[float], Tensor]
) -> None:
    x, y = features("random", 8, 8, 4)
    x.requires_grad_()
    got = losses[0](x, y, make(5.0), make(-1.0), backend=backend)
    exact = losses[1](x, y, make(5.0).clone(), make(-1.0).clone())
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (got, exact)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("make", [lambda t: torch._efficientzerotensor(t.shape), lambda t: torch._neg_view(-t)])
def test_an_upstream_gradient_that_is_not_plain_memory(
    backend: str, make: Callable[..., Tensor], smoothing: float
) -> None:
    leaves = [t.requires_grad_() for t in (*features("random", 8, 8, 4), torch.tensor(5.0))]
    upstream = make(torch.randn(2, 8))
    options = {"label_smoothing": smoothing, "reduction": "none", "backend": backend}
    got = torch.autograd.grad(clipfast.contrastive_loss(*leaves, **options), leaves, upstream)
    exact = torch.autograd.grad(reference.contrastive_losses(*leaves, label_smoothing=smoothing), leaves, upstream)
    torch.testing.assert_close(got, exact)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (torch._to_functional_tensor, "image_features: got a functional tensor"),
        (lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged), "image_features: got a nested"),
        (lambda t: torch.nested.as_nested_tensor(t[None]), "image_features: got a nested tensor"),
    ],
    ids=["functional", "nested jagged", "nested strided"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_tensors_without_memory_of_their_own_are_refused(make: Callable[[Tensor], Tensor], text: str) -> None:
    x, y = features("random", 8, 8, 4)
    with pytest.raises(TypeError, match=text):
        clipfast.contrastive_loss(make(x), y, 5.0)
    with pytest.raises(TypeError, match=text):
        clipfast.siglip_loss(make(x), y, 5.0, 0.0)
    with pytest.raises(TypeError, match=text):
        clipfast.distillation_loss(make(x), y, 5.0, x, y, 5.0)
    with pytest.raises(TypeError, match=text.replace("image", "teacher_image")):
        clipfast.distillation_loss(x, y, 5.0, make(x), y, 5.0)
    with pytest.raises(TypeError, match=text):
        clipfast.retrieval_metrics(make(x), y)


def test_meta_tensors_are_refused() -> None:
    x, y = (t.to("meta") for t in features("random", 8, 8, 4))
    calls: tuple[Callable[[], object], ...] = (
        lambda: clipfast.contrastive_loss(x, y, 5.0),
        lambda: clipfast.siglip_loss(x, y, 5.0, 0.0),
        lambda: clipfast.distillation_loss(x, y, 5.0, x, y, 5.0),
        lambda: clipfast.retrieval_metrics(x, y),
    )
    for call in calls:
        with pytest.raises(ValueError, match="torch: a meta tensor holds no numbers"):
            call()
    assert all(clipfast.backends("meta").values())


# Defaults that are not the features' own.


@contextmanager
def defaults(kind: Any) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if isinstance(kind, torch.dtype):
            torch.set_default_dtype(kind)
        else:
            torch.set_default_device(kind)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


DEFAULTS = pytest.mark.parametrize("kind", ["meta", torch.float64, torch.bfloat16], ids=str)


@DEFAULTS
@pytest.mark.parametrize("normalize", [False, True])
def test_defaults_change_nothing(backend: str, losses: tuple[Loss, Loss], kind: Any, normalize: bool) -> None:
    leaves = [t.requires_grad_() for t in (*features("unnormalized", 8, 8, 6), torch.tensor(5.0), torch.tensor(-1.0))]

    def results() -> list[Tensor]:
        loss = losses[0](*leaves, normalize=normalize, backend=backend)
        return [loss, *torch.autograd.grad(loss, leaves)]

    expected = results()
    with defaults(kind):
        got = results()
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)


@pytest.mark.needs("ids", "ranks")
@DEFAULTS
@pytest.mark.parametrize("same_id", ["ignore", "positive"])
def test_defaults_change_no_option(backend: str, kind: Any, same_id: str) -> None:
    leaves = [t.requires_grad_() for t in (*features("unnormalized", 8, 11, 6), torch.tensor(5.0))]
    ids = {"image_ids": torch.arange(8) // 2, "text_ids": torch.arange(11) // 2}
    options: dict[str, Any] = {"label_smoothing": 0.1, "return_metrics": True, "same_id": same_id, **ids}

    def results() -> list[Tensor]:
        loss, metrics = clipfast.contrastive_loss(*leaves, 0.5, backend=backend, **options)
        return [loss, *torch.autograd.grad(loss, leaves), *metrics.values()]

    expected = results()
    with defaults(kind):
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


@pytest.mark.needs("ranks")
@DEFAULTS
def test_defaults_change_no_retrieval(backend: str, kind: Any) -> None:
    x, y = features("trained", 30, 30, 6)
    expected = clipfast.retrieval_metrics(x, y, backend=backend)
    with defaults(kind):
        assert clipfast.retrieval_metrics(x, y, backend=backend) == expected


# Derivatives beyond reverse mode.


def test_functional_gradient(backend: str) -> None:
    losses = LOSSES["contrastive"]
    arguments = (*features("random", 8, 8, 4), torch.tensor(5.0), torch.tensor(-1.0))
    loss = functools.partial(losses[0], backend=backend)
    got, exact = (torch.func.grad(f, argnums=(0, 1, 2, 3))(*arguments) for f in (loss, losses[1]))
    torch.testing.assert_close(got, exact)


def test_vmap(backend: str, losses: tuple[Loss, Loss]) -> None:
    """Also of the gradient, where there is one: SigLIP's and distillation's are formed with the loss, and refused."""
    x, y, s, b = torch.randn(3, 8, 4), torch.randn(8, 4), torch.tensor([1.0, 2.0, 3.0]), torch.tensor(-1.0)
    loss = functools.partial(losses[0], backend=backend)
    transforms: list[Callable[[Loss], Any]] = [lambda f: f]
    if losses is LOSSES["contrastive"]:
        transforms.append(lambda f: torch.func.grad(f, argnums=(0, 1, 2)))
    for transform in transforms:
        got, exact = (torch.func.vmap(transform(f), in_dims=(0, None, 0, None))(x, y, s, b) for f in (loss, losses[1]))
        torch.testing.assert_close(got, exact)


def _forward_ad(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("name", ["siglip", "distillation"])
def test_a_functional_gradient_of_what_is_formed_with_the_loss_names_the_reference(backend: str, name: str) -> None:
    skip_without(backend, name)
    arguments = (*features("random", 8, 8, 4), torch.tensor(5.0), torch.tensor(-1.0))
    with pytest.raises(RuntimeError, match=r"clipfast\.reference"):
        torch.func.grad(functools.partial(LOSSES[name][0], backend=backend))(*arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func's own
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: torch.func.hessian(f)(x),
        lambda f, x: torch.func.linearize(f, x),
        lambda f, x: torch.func.jacrev(torch.func.grad(f))(x),
        lambda f, x: torch.autograd.functional.hessian(f, x),
        _forward_ad,
    ],
    ids=["jvp", "jacfwd", "hessian", "linearize", "jacrev of grad", "autograd hessian", "forward_ad"],
)
def test_other_derivatives_name_the_reference(
    backend: str, losses: tuple[Loss, Loss], derivative: Callable[..., Any]
) -> None:
    x, y = features("random", 8, 8, 4)
    with pytest.raises(RuntimeError, match=r"clipfast\.reference"):
        derivative(lambda x: losses[0](x, y, torch.tensor(5.0), torch.tensor(-1.0), backend=backend), x)


# Beyond a dtype's range.


@pytest.mark.parametrize("scale", [3.5e38, 10**400, -(10**400)], ids=["float32", "positive", "negative"])
def test_a_scale_beyond_every_range(backend: str, losses: tuple[Loss, Loss], scale: float) -> None:
    x, y = (t.requires_grad_() for t in features("random", 8, 8, 4))
    infinite = torch.tensor(float("-inf") if scale < 0 else float("inf"))
    loss = losses[0](x, y, scale, torch.tensor(0.0), backend=backend)
    exact = losses[1](x, y, infinite, torch.tensor(0.0))
    torch.testing.assert_close(loss, exact, equal_nan=True)
    gradients, exact_gradients = (torch.autograd.grad(value, (x, y)) for value in (loss, exact))
    for a, b in zip(gradients, exact_gradients, strict=True):
        assert not a.isfinite().any()
        assert not b.isfinite().any()


def test_a_gradient_of_the_scale_beyond_float32(backend: str, losses: tuple[Loss, Loss]) -> None:
    x = 1e6 * torch.eye(8)
    exact = evaluate(losses[1], x.double(), x.double(), 1e-12, upstream=1e32, scalar_dtype=torch.float64)
    got = evaluate(losses[0], x, x, 1e-12, upstream=1e32, backend=backend)
    assert exact.dscale.float().isinf()
    assert got.dscale == exact.dscale.float()
    for value, truth in ((got.dx, exact.dx), (got.dy, exact.dy)):
        torch.testing.assert_close(value, truth.float(), rtol=1e-4, atol=1e-6 * truth.abs().max().item())


def test_float16_with_smoothed_labels_has_no_spurious_inf(backend: str) -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(3, 4, generator=g).half() for _ in range(2))
        options: dict[str, Any] = {"label_smoothing": 1.0, "upstream": 1e4}
        exact = evaluate(
            reference.contrastive_loss, x.double(), y.double(), -20.0, scalar_dtype=torch.float64, **options
        )
        got = evaluate(clipfast.contrastive_loss, x, y, -20.0, backend=backend, **options)
        # A backend that multiplies halves rounds G to them, as in the oracle: 2 upstream / n of it in a row or column.
        rounded = operand_rounding(x.dtype, x.device) if x.dtype in half_operands(backend) else 0.0
        coordinate = max(x.abs().max().item(), y.abs().max().item())
        for value, truth in ((got.dx, exact.dx), (got.dy, exact.dy)):
            assert torch.equal(value.isinf(), truth.half().isinf())
            atol = 1.0 + rounded * 2e4 / 3 * 20.0 * coordinate
            torch.testing.assert_close(value, truth.half(), rtol=2e-3, atol=atol)


@pytest.mark.needs("ids")
def test_smoothed_labels_and_a_text_whose_every_image_is_ignored(backend: str) -> None:
    x, y = features("random", 1, 4, 5)
    options = {"label_smoothing": 1.0, "image_ids": torch.tensor([7]), "text_ids": torch.tensor([7, 7, 3, 7])}
    exact = evaluate(reference.contrastive_loss, x.double(), y.double(), 5.0, scalar_dtype=torch.float64, **options)
    got = evaluate(clipfast.contrastive_loss, x, y, 5.0, backend=backend, **options)
    for name in ("loss", "dx", "dy", "dscale", "dbias"):
        assert error(getattr(got, name), getattr(exact, name)) <= 1e-5, name


# Retrieval and words.


@pytest.mark.needs("ranks")
@pytest.mark.parametrize("normalize", [False, True])
def test_retrieval_under_autocast(backend: str, normalize: bool) -> None:
    x, y = features("trained", 300, 300, 8)
    expected = clipfast.retrieval_metrics(x, y, normalize=normalize, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert clipfast.retrieval_metrics(x, y, normalize=normalize, backend=backend) == expected


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"normalize": "no"}, "normalize: got str; accepted is True or False"),
        ({"ks": (1.5,)}, "ks: got float; accepted is an integer from 1"),
        ({"ks": (True,)}, "ks: got bool; accepted is an integer from 1"),
        ({"ks": (float("nan"),)}, "ks: got float; accepted is an integer from 1"),
        ({"ks": 5}, "ks: got int; accepted is a sequence of integers from 1"),
    ],
)
def test_retrieval_refuses(options: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        clipfast.retrieval_metrics(*features("random", 8, 8, 4), **options)


def test_repr_shows_the_options() -> None:
    text = repr(clipfast.ContrastiveLoss(label_smoothing=0.1, direction="image_to_text", backend="torch"))
    for part in ("label_smoothing=0.1", "direction='image_to_text'", "backend='torch'", "rank=0"):
        assert part in text
    assert "same_id='positive'" in repr(clipfast.SigLipLoss(same_id="positive"))


# torch looks at the gradients of the tensors that were saved.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_autograd_as_one_graph(losses: tuple[Loss, Loss]) -> None:
    leaves = [t.requires_grad_() for t in (*features("random", 8, 8, 4), torch.tensor(5.0), torch.tensor(-1.0))]
    expected = torch.autograd.grad(losses[0](*leaves), leaves)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        losses[0](*leaves).backward()
    torch.testing.assert_close(tuple(t.grad for t in leaves), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_scale_of_integers(backend: str, losses: tuple[Loss, Loss], dtype: torch.dtype) -> None:
    x, y = features("random", 8, 8, 4)
    got = losses[0](x, y, torch.tensor(5, dtype=dtype), 0.0, backend=backend)
    assert torch.equal(got, losses[0](x, y, 5.0, 0.0, backend=backend))


@pytest.mark.parametrize("direction", ["both", "image_to_text", "text_to_image"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_bias_for_each_candidate(backend: str, direction: str, normalize: bool) -> None:
    """As open_clip's ClipLoss adds it: element j to the logits of candidate j, of either direction."""
    leaves = [
        t.double().requires_grad_() for t in (*features("unnormalized", 8, 8, 4), torch.tensor(5.0), torch.randn(8))
    ]

    def dense(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        x, y = (reference.l2_normalize(t) if normalize else t for t in (x, y))
        labels = torch.arange(8)
        parts = {
            "image_to_text": torch.nn.functional.cross_entropy(scale * x @ y.T + bias, labels),
            "text_to_image": torch.nn.functional.cross_entropy(scale * y @ x.T + bias, labels),
        }
        return torch.stack(list(parts.values())).mean() if direction == "both" else parts[direction]

    options: dict[str, Any] = {"direction": direction, "normalize": normalize, "backend": backend}
    got = clipfast.contrastive_loss(*(t.float() for t in leaves), **options)
    torch.testing.assert_close(got.double(), dense(*leaves), atol=1e-5, rtol=1e-5)
    exact = torch.autograd.grad(dense(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), exact, atol=2e-5, rtol=1e-5)
