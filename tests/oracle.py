"""The three-way judgement: float64 truth, the same-dtype PyTorch formula, and clipfast."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import clipfast
from clipfast import dispatch, reference
from clipfast.backends import cpu
from clipfast.problem import HALF_DTYPES, Problem, accumulation_dtype

BFLOAT16_UNITS = ("amx", "avx512_bf16")  # instruction sets that multiply bfloat16 as it is
SCALES = (0.0, 1.0, 14.3, 100.0, 112.0)


@dataclass
class Result:
    loss: Tensor
    dx: Tensor
    dy: Tensor
    dscale: Tensor
    dbias: Tensor


def evaluate(
    loss_fn: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    scale: float,
    bias: float = 0.0,
    upstream: float = 1.0,
    scalar_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Result:
    """The loss and the gradients of all four inputs, times `upstream`."""
    x, y = (t.detach().requires_grad_() for t in (x, y))
    s, b = (torch.tensor(v, dtype=scalar_dtype, requires_grad=True) for v in (scale, bias))
    loss = loss_fn(x, y, s, b, **options)
    return Result(loss.detach(), *torch.autograd.grad(loss * upstream, (x, y, s, b)))


def truth(
    x: Tensor,
    y: Tensor,
    scale: float,
    bias: float = 0.0,
    exact_formula: Callable[..., Tensor] = reference.contrastive_loss,
    **options: Any,
) -> Result:
    # The scale that the others get is a float32.
    scale = torch.tensor(scale, dtype=accumulation_dtype(torch.promote_types(x.dtype, y.dtype))).item()
    return evaluate(exact_formula, x.double(), y.double(), scale, bias, scalar_dtype=torch.float64, **options)


def same_dtype(
    x: Tensor,
    y: Tensor,
    scale: float,
    bias: float = 0.0,
    formula: Callable[..., Tensor] = reference.contrastive_loss,
    **options: Any,
) -> Result:
    """The dense formula as eager PyTorch computes it in the inputs' own dtype."""
    promoted = torch.promote_types(x.dtype, y.dtype)
    return evaluate(
        lambda x, y, s, b, **o: formula(x.to(promoted), y.to(promoted), s, b, **o),
        x,
        y,
        scale,
        bias,
        scalar_dtype=accumulation_dtype(promoted),
        **options,
    )


def ours(
    x: Tensor,
    y: Tensor,
    scale: float,
    bias: float = 0.0,
    loss_fn: Callable[..., Tensor] = clipfast.contrastive_loss,
    **options: Any,
) -> Result:
    scalar_dtype = accumulation_dtype(torch.promote_types(x.dtype, y.dtype))
    return evaluate(loss_fn, x, y, scale, bias, scalar_dtype=scalar_dtype, **options)


def reasons_against(backend: str, dtype: torch.dtype, *needs: str, device: str = "cpu") -> tuple[str, ...]:
    """The backend's own reasons not to run on tensors of this dtype."""
    problem = Problem(1, 1, 1, dtype, torch.device(device), frozenset(needs))
    reasons: tuple[str, ...] = dispatch.get(backend).unsupported_reasons(problem)
    return reasons


def operand_rounding(dtype: torch.dtype, device: torch.device) -> float:
    """How far an element of G moves, relative to itself, as an operand of a product of this dtype."""
    if dtype not in HALF_DTYPES:
        return 0.0
    # Triton's interpreter cuts float32 off where a GPU rounds it to bfloat16.
    cut_off = dtype == torch.bfloat16 and device.type == "cpu"
    return torch.finfo(dtype).eps * (1.0 if cut_off else 0.5)


def error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact.double()).abs().max().item()


def half_operands(backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes that a backend multiplies as they are on CPU tensors, G rounded to them; others become float32."""
    if backend == "triton":
        return HALF_DTYPES
    return (torch.bfloat16,) if backend == "cpu" and cpu.instruction_set() in BFLOAT16_UNITS else ()


JUDGES: dict[tuple[Any, ...], tuple[Result, Result]] = {}
LARGE = 2**18  # logits


def judges(
    x: Tensor,
    y: Tensor,
    scale: float,
    bias: float,
    formula: Callable[..., Tensor],
    exact_formula: Callable[..., Tensor],
    **options: Any,
) -> tuple[Result, Result]:
    """Truth and the same-dtype formula; of large problems kept, since every backend is judged by the same."""

    def compute() -> tuple[Result, Result]:
        return truth(x, y, scale, bias, exact_formula, **options), same_dtype(x, y, scale, bias, formula, **options)

    if options or x.is_cuda or len(x) * len(y) < LARGE:
        return compute()
    key = [scale, bias, formula, exact_formula]
    for side in (x, y):
        data = side.contiguous().view(torch.uint8).numpy()
        key += [side.dtype, side.shape, hashlib.sha256(data).digest()]
    if tuple(key) not in JUDGES:
        JUDGES[tuple(key)] = compute()
    return JUDGES[tuple(key)]


def assert_three_way(
    x: Tensor,
    y: Tensor,
    scale: float,
    bias: float = 0.0,
    *,
    backend: str,
    formula: Callable[..., Tensor] = reference.contrastive_loss,
    exact_formula: Callable[..., Tensor] = reference.contrastive_loss,
    loss_fn: Callable[..., Tensor] = clipfast.contrastive_loss,
    gradient_sum: float = 2.0,
    **options: Any,
) -> None:
    """err(clipfast) <= 2 err(PyTorch, same dtype) + eps, for loss, dx, dy, dscale and dbias.

    eps is two roundings of the result in its own dtype, and what unavoidable roundings in the accumulation dtype do.
    They change every logit by eps |L|, hence every P by eps (|L| + 2) relative to itself (logit, exponential, weight),
    and sums of m terms add about eps sqrt(m) (Higham and Mary 2019, "A new approach to probabilistic rounding error
    analysis"), but eps m / 4 with d = 1, where normalized features are 1 or -1, terms are alike and round one way. For
    a gradient that is relative to sum |G|, `gradient_sum` in all and that over n in a row or column, times a feature
    and the scale (dx, dy), a cosine (dscale) or 1 (dbias). PyTorch's own error can happen to lie below that where all
    logits are alike. In float64 there is no truer truth: two computations of one formula are compared, within 8 eps.

    A backend that multiplies halves rounds G to the inputs' dtype (`operand_rounding`). So does the dense formula, but
    where all logits are alike its elements of G may be powers of two, which are exact.
    """
    exact, dense = judges(x, y, scale, bias, formula, exact_formula, **options)
    got = ours(x, y, scale, bias, loss_fn, backend=backend, **options)
    accumulator = accumulation_dtype(torch.promote_types(x.dtype, y.dtype))
    length = max(1.0, x.double().norm(dim=1).max().item(), y.double().norm(dim=1).max().item())
    largest_logit = scale * length**2 + abs(bias)
    feature = gradient_sum / len(x) * scale * length
    sum_rounding = len(y) / 4 if x.shape[1] == 1 else math.sqrt(len(y))
    rounded_gradient = 0.0
    if x.dtype == y.dtype and (x.is_cuda or x.dtype in half_operands(backend)):
        coordinate = max(x.double().abs().max().item(), y.double().abs().max().item())
        rounded_gradient = operand_rounding(x.dtype, x.device) * gradient_sum / len(x) * scale * coordinate
    terms = {
        "loss": gradient_sum / 2,
        "dx": feature,
        "dy": feature,
        "dscale": gradient_sum * length**2,
        "dbias": gradient_sum,
    }
    for name, term in terms.items():
        value, exact_value = getattr(got, name), getattr(exact, name)
        rounding = 2 * torch.finfo(value.dtype).eps * exact_value.abs().max().item()
        rounding += torch.finfo(value.dtype).smallest_normal * torch.finfo(value.dtype).eps  # its smallest number
        if value.dtype == torch.bfloat16:
            rounding += 2**-126  # its smallest normal number; the interpreter converts what is below wrongly
        rounding += torch.finfo(accumulator).eps * (largest_logit + 2 + sum_rounding) * term
        if accumulator == torch.float64:
            rounding *= 8
        if name in ("dx", "dy"):
            rounding += rounded_gradient
        bound = 2 * error(getattr(dense, name), exact_value) + rounding
        assert error(value, exact_value) <= bound, f"{name}: {error(value, exact_value):.3g} > {bound:.3g}"


def features(kind: str, n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Pairs of features: how x and y relate is what a test varies."""
    generator = torch.Generator().manual_seed(1000 * n + 10 * m + d)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(m, d, generator=generator, dtype=torch.float64)
    if kind == "unnormalized":
        return (3 * x / d**0.5).to(dtype), (2 * y / d**0.5 + 0.5 / d**0.5).to(dtype)
    if kind == "trained":
        y[:n] = x + 0.5 * y[:n]
    elif kind == "matched":
        y[:n] = x
    elif kind == "opposed":
        y[:n] = -x
    elif kind == "collapsed":
        x[:], y[:] = x[0].clone(), x[0].clone()
    elif kind != "random":
        raise ValueError(kind)
    return normalize(x, dim=1).to(dtype), normalize(y, dim=1).to(dtype)
