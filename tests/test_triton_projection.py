"""The projection kernel in Triton's interpreter: three ways, odd shapes, strides, padding; and what is launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import error, reasons_against
from torch import Tensor

import clipfast
from clipfast.norms import MIN_NORM, norm_factors

if reasons := reasons_against("triton", torch.float32):
    pytest.skip("; ".join(reasons), allow_module_level=True)

from clipfast.kernels import projection
from clipfast.tuning import Config

SMALL = Config("projection", "interpreter", 0, 32, 16, 16, 4, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "width", "d"), [(1, 1, 1), (32, 16, 16), (70, 33, 45), (40, 48, 17)])
def test_rows_and_factors(n: int, width: int, d: int, bias: bool, dtype: torch.dtype) -> None:
    features, weight = torch.randn(n, width).to(dtype), (torch.randn(d, width) / width**0.5).to(dtype).T
    b = torch.randn(2 * d).to(dtype)[::2] if bias else None
    rows, factors = projection.project(features, weight, b, config=SMALL)
    exact = features.double() @ weight.double() + (0 if b is None else b.double())
    plain = features @ weight + (0 if b is None else b)
    eps = torch.finfo(dtype).eps
    assert (rows.dtype, factors.dtype) == (dtype, torch.float32)
    # The interpreter cuts float32 off where a GPU rounds it to bfloat16.
    assert error(rows, exact) <= 2 * error(plain, exact) + 2 * eps * exact.abs().max()
    assert error(factors * norm_factors(rows).reciprocal(), torch.ones(n)) <= 1e-6  # of the rows as they are stored


def test_padding_that_is_nan_and_rows_without_length() -> None:
    memory = torch.full((40, 30), torch.nan)
    features, weight = memory[:33, :20], torch.full((20, 64), torch.nan)[:, :19]
    features.copy_(torch.randn(33, 20)), weight.copy_(torch.randn(20, 19))
    features[4] = 0
    rows, factors = projection.project(features, weight, None, config=SMALL)
    assert error(rows, features.double() @ weight.double()) <= 1e-5
    assert factors[4] == pytest.approx(1 / MIN_NORM)
    features[7, 3] = torch.nan
    _, factors = projection.project(features, weight, None, config=SMALL)
    assert factors.isnan().nonzero().flatten().tolist() == [7]


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels' names, as they are launched."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    call = GridExecutor.__call__

    def noting(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.fn.__name__)
        return call(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", noting)
    return names


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each side in front of the loss's own; none for norms or their gradient."""
    names, shapes = launched(monkeypatch), ((40, 24), (40, 32), (24, 16), (32, 16))
    images, texts, w_i, w_t = (torch.randn(shape, requires_grad=True) for shape in shapes)
    x, y = images.detach()[:, :16].clone().requires_grad_(), texts.detach()[:, :16].clone().requires_grad_()
    options: dict[str, Any] = {"backend": "triton", "keep_bytes": 0}

    def of(loss: Tensor) -> tuple[list[str], list[str]]:
        forward = names.copy()
        names.clear()
        loss.backward()
        backward = names.copy()
        names.clear()
        return forward, backward

    alone = of(clipfast.contrastive_loss(x, y, 14.3, normalize=True, **options))
    whole = of(clipfast.projected_contrastive_loss(images, texts, w_i, w_t, 14.3, **options))
    assert whole == (["projection_kernel"] * 2 + alone[0], alone[1])
