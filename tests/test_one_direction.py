"""The rows' cross-entropy alone, which losses of one direction are made of, judged as the symmetric loss is."""

from __future__ import annotations

import functools

import pytest
import torch
from oracle import assert_three_way, error, evaluate, features
from torch import Tensor

from clipfast import dispatch, operators, reference
from clipfast.functional import contrastive_loss

dense_image_to_text = functools.partial(reference.contrastive_loss, direction="image_to_text")
image_to_text_loss = functools.partial(contrastive_loss, direction="image_to_text")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("loss", "dx", "dy", "dscale", "dbias")


def assert_one_direction(x: Tensor, y: Tensor, scale: float, *, backend: str, label_smoothing: float = 0.0) -> None:
    dense = dense_image_to_text
    assert_three_way(
        x,
        y,
        scale,
        bias=-0.5,
        backend=backend,
        formula=dense,
        exact_formula=dense,
        loss_fn=image_to_text_loss,
        label_smoothing=label_smoothing,
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 14.3, 100.0, 112.0])
@pytest.mark.parametrize("kind", ["random", "trained", "opposed", "unnormalized"])
@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 2), (61, 183)])
def test_scales_and_shapes(backend: str, n: int, m: int, kind: str, scale: float) -> None:
    assert_one_direction(*features(kind, n, m, 40), scale, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("m", [61, 73])
def test_dtypes_and_label_smoothing(backend: str, m: int, smoothing: float, dtype: torch.dtype) -> None:
    x, y = features("trained", 61, m, 40, dtype)
    assert_one_direction(x, y, 14.3, label_smoothing=smoothing, backend=backend)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_normalized(backend: str, smoothing: float) -> None:
    def dense(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        rows = reference.l2_normalize(x), reference.l2_normalize(y)
        return dense_image_to_text(*rows, s, b, label_smoothing=smoothing)

    def ours(x: Tensor, y: Tensor, s: Tensor, b: Tensor, backend: str) -> Tensor:
        return image_to_text_loss(x, y, s, b, normalize=True, label_smoothing=smoothing, backend=backend)

    x, y = features("unnormalized", 53, 90, 40)
    assert_three_way(x, y, 14.3, backend=backend, formula=dense, exact_formula=dense, loss_fn=ours)


def test_both_directions_make_the_symmetric_loss(backend: str) -> None:
    x, y = features("trained", 70, 70, 24)
    exact = evaluate(reference.contrastive_loss, x.double(), y.double(), 14.3, scalar_dtype=torch.float64)

    def mean_of_both(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return (image_to_text_loss(x, y, s, b, backend=backend) + image_to_text_loss(y, x, s, b, backend=backend)) / 2

    got = evaluate(mean_of_both, x, y, 14.3)
    for name in NAMES:
        assert error(getattr(got, name), getattr(exact, name)) <= 1e-6, name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["x", "y", "extra"])
def test_not_finite_input_comes_out_as_in_the_dense_formula(backend: str, place: str, value: float) -> None:
    """One broken row leaves the gradients of the others finite: no column's statistics pass through."""
    x, y = features("random", 70, 73, 8)
    {"x": x[1], "y": y[1], "extra": y[71]}[place][3] = value
    dense = evaluate(dense_image_to_text, x, y, 14.3)
    got = evaluate(image_to_text_loss, x, y, 14.3, backend=backend)
    for name in ("loss", "dx", "dy", "dscale"):
        expected, actual = getattr(dense, name), getattr(got, name)
        assert torch.equal(actual.isnan(), expected.isnan()), name
        assert torch.equal(actual.isinf(), expected.isinf()), name


@pytest.mark.parametrize(
    "test", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck(backend: str, test: str) -> None:
    x, y = (t.requires_grad_() for t in features("trained", 5, 7, 4))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (14.3, 0.5))
    arguments = (x, y, scale, bias, None, None, True, 0.1, "image_to_text", "mean", "ignore", False, backend)
    torch.library.opcheck(operators.contrastive_loss.operator, arguments, test_utils=test)


def test_compiles_as_one_graph(backend: str) -> None:
    x, y = features("trained", 9, 20, 6)
    torch.compiler.reset()
    compiled = torch.compile(image_to_text_loss, fullgraph=True, backend="aot_eager")
    eager, got = (evaluate(loss, x, y, 14.3, backend=backend) for loss in (image_to_text_loss, compiled))
    for name in NAMES:
        assert error(getattr(got, name), getattr(eager, name)) <= 1e-6, name


def test_arguments_are_checked_as_those_of_both_directions() -> None:
    x, y = features("random", 4, 3, 5)
    with pytest.raises(ValueError, match="text_features: got 3 rows; accepted are at least the 4 rows"):
        image_to_text_loss(x, y, 1.0)
    with pytest.raises(ValueError, match=f"'fast' is unknown; accepted are 'auto', '{dispatch.names()[0]}'"):
        image_to_text_loss(y, x, 1.0, backend="fast")
