"""Every backend against float64 truth and the same-dtype formula (traps 4, 6, 7, 8; design.md section 5)."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from oracle import SCALES, assert_three_way, error, features, ours, reasons_against, same_dtype, truth
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS = ("random", "trained", "matched", "opposed", "collapsed", "unnormalized")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 16, 64, 1024])
def test_scales_and_cosines(backend: str, n: int, kind: str, scale: float) -> None:
    assert_three_way(*features(kind, n, n, 64), scale, backend=backend)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 112.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "trained", "unnormalized"])
def test_dtypes(backend: str, kind: str, dtype: torch.dtype, scale: float) -> None:
    assert_three_way(*features(kind, 193, 193, 512, dtype), scale, backend=backend)


@pytest.mark.parametrize("d", [1, 7, 100, 384, 512, 640, 768, 1024, 1152, 1280])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 2), (2, 131), (13, 13), (127, 257), (257, 257)])
def test_shapes(backend: str, n: int, m: int, d: int) -> None:
    assert_three_way(*features("trained", n, m, d), 14.3, bias=-0.5, backend=backend)


@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("second", DTYPES, ids=str)
def test_mixed_dtypes(backend: str, first: torch.dtype, second: torch.dtype) -> None:
    x, y = features("trained", 37, 41, 24)
    assert_three_way(x.to(first), y.to(second), 14.3, backend=backend)
    got = ours(x.to(first), y.to(second), 14.3, backend=backend)
    assert (got.dx.dtype, got.dy.dtype) == (first, second)
    assert got.loss.dtype == (torch.float64 if torch.float64 in (first, second) else torch.float32)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [61, 73])
def test_label_smoothing(backend: str, m: int, dtype: torch.dtype, smoothing: float) -> None:
    assert_three_way(
        *features("trained", 61, m, 40, dtype), 14.3, bias=0.25, label_smoothing=smoothing, backend=backend
    )


def open_clip_formula(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip 3.3.0, ClipLoss.forward in one process: two products, two matrices of logits."""
    logits_per_image = scale * x @ y.T
    logits_per_text = scale * y @ x.T
    labels = torch.arange(len(x))
    # bias is not part of it; adding 0 * bias gives it the gradient 0.
    return (cross_entropy(logits_per_image, labels) + cross_entropy(logits_per_text, labels)) / 2 + 0 * bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_open_clip_formula(backend: str, kind: str, scale: float, dtype: torch.dtype) -> None:
    x, y = features(kind, 512, 512, 512, dtype)
    assert_three_way(x, y, scale, backend=backend, formula=open_clip_formula)


def test_well_trained_rows_keep_their_gradient(backend: str) -> None:
    """1 - P_ii is 1e-7, at the resolution of float32: the eager formula loses it, clipfast keeps four digits."""
    x, y = features("matched", 64, 64, 512)
    exact, got, dense = truth(x, y, 20.0), ours(x, y, 20.0, backend=backend), same_dtype(x, y, 20.0)
    assert 1e-9 < exact.loss < 1e-6
    for name in ("loss", "dx", "dy", "dscale"):
        magnitude = getattr(exact, name).abs().max().item()
        assert error(getattr(got, name), getattr(exact, name)) <= 1e-4 * magnitude, name
        assert error(getattr(dense, name), getattr(exact, name)) > 1e-2 * magnitude, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_scale_keeps_its_gradient_in_a_narrow_cone(backend: str, dtype: torch.dtype) -> None:
    """Cosines of untrained encoders lie close together (Liang et al. 2022, "Mind the Gap"), near 0.9 here.

    What the positives take from dscale and what the others add are hundreds of times what is left: it is right only
    where neither G nor a product of it was rounded to half precision on the way.
    """
    x, y = (normalize(f + 3 * features("random", 1, 1, 64)[0], dim=1) for f in features("random", 192, 192, 64))
    x, y = x.to(dtype), y.to(dtype)
    exact, got, dense = truth(x, y, 14.3), ours(x, y, 14.3, backend=backend), same_dtype(x, y, 14.3)
    assert error(got.dscale, exact.dscale) <= 1e-3 * exact.dscale.abs()
    if dtype == torch.bfloat16:
        assert error(dense.dscale, exact.dscale) > 1e-2 * exact.dscale.abs()


def test_float16_gradient_survives_a_large_batch(backend: str) -> None:
    """A uniform softmax over m = 65536 is 1.5e-5, and over n again it would be 0 in float16."""
    assert_three_way(*features("random", 512, 65536, 16, torch.float16), 1.0, backend=backend)


@pytest.mark.parametrize("upstream", [65536.0, -0.5, 0.0])
def test_upstream_gradient(backend: str, upstream: float) -> None:
    x, y = features("trained", 50, 50, 16)
    exact, got = truth(x, y, 14.3, upstream=upstream), ours(x, y, 14.3, upstream=upstream, backend=backend)
    for name in ("dx", "dy", "dscale"):
        assert error(getattr(got, name), getattr(exact, name)) <= 1e-5 * abs(upstream), name


@hypothesis.settings(
    max_examples=400,
    deadline=None,
    derandomize=True,  # a failure is then the change's
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    n=st.integers(1, 150),
    extra=st.integers(0, 150),
    d=st.integers(1, 80),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(0.0, 112.0, width=32),
    smoothing=st.sampled_from([0.0, 0.1]),
)
@hypothesis.example(n=1, extra=2, d=1, kind="random", dtype=torch.float32, scale=1e-45, smoothing=0.0)
@hypothesis.example(n=1, extra=1, d=1, kind="random", dtype=torch.float16, scale=47.0, smoothing=0.0)
@hypothesis.example(
    n=1, extra=1, d=1, kind="random", dtype=torch.float32, scale=52.0, smoothing=0.0
)  # weights of 1e-46
def test_any_shape(
    backend: str, n: int, extra: int, d: int, kind: str, dtype: torch.dtype, scale: float, smoothing: float
) -> None:
    hypothesis.assume(not reasons_against(backend, dtype))
    assert_three_way(*features(kind, n, n + extra, d, dtype), scale, label_smoothing=smoothing, backend=backend)
