"""What holds whatever the numbers: NaN, strides, autograd's rules, memory, determinism (traps 3, 5, 7-10, 14, 20)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from oracle import assert_three_way, error, evaluate, features, ours, truth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import clipfast
from clipfast import reference

NAMES = ("loss", "dx", "dy", "dscale", "dbias")


def bitwise(a: object, b: object) -> bool:
    return all(
        torch.equal(getattr(a, name).nan_to_num(), getattr(b, name).nan_to_num())
        and torch.equal(getattr(a, name).isnan(), getattr(b, name).isnan())
        for name in NAMES
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["x", "y", "extra"])
@pytest.mark.parametrize(("n", "scale"), [(2, 14.3), (70, 14.3), (70, 20.0)])  # rounded to float32 down and up
def test_not_finite_input_comes_out_as_in_the_dense_formula(
    backend: str, n: int, scale: float, place: str, value: float
) -> None:
    x, y = features("random", n, n + 3, 8)
    {"x": x[1], "y": y[1], "extra": y[n + 1]}[place][3] = value
    dense, got = (
        evaluate(reference.contrastive_loss, x, y, scale),
        ours(x, y, scale, backend=backend),
    )
    for name in ("loss", "dx", "dy", "dscale"):
        expected, actual = getattr(dense, name), getattr(got, name)
        assert torch.equal(actual.isnan(), expected.isnan()), name
        assert torch.equal(actual.isinf(), expected.isinf()), name


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 60.0), (torch.float64, 500.0)], ids=str)
@pytest.mark.parametrize("of_column", [False, True])
@pytest.mark.parametrize(("n", "m"), [(97, 97), (193, 200)])
def test_a_positive_alone_among_large_logits(
    backend: str, n: int, m: int, of_column: bool, dtype: torch.dtype, scale: float
) -> None:
    """The last one, in a tile that has no negative of its row or column, and others' far above all of its own."""
    x, y = (0.05 * torch.randn(rows, 8, dtype=dtype) for rows in (n, m))
    a, b = (y, x) if of_column else (x, y)
    a[:, 0] += 1
    a[n - 1] += torch.tensor([-1, 1, 0, 0, 0, 0, 0, 0])
    b[:, 1] -= 1
    b[n - 1, 0] += 1
    assert_three_way(x, y, scale, backend=backend)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["x", "y", "extra"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_not_finite_input_that_is_normalized(backend: str, dtype: torch.dtype, place: str, value: float) -> None:
    """Its norm is not finite either, and the row is NaN."""
    x, y = features("random", 70, 73, 8, dtype)
    {"x": x[1], "y": y[1], "extra": y[71]}[place][3] = value
    dense = evaluate(normalize_then_loss, x.float(), y.float(), 14.3)
    got = ours(x, y, 14.3, normalize=True, backend=backend)
    for name in ("loss", "dx", "dy", "dscale"):
        expected, actual = getattr(dense, name), getattr(got, name)
        assert torch.equal(actual.isnan(), expected.isnan()), name
        assert torch.equal(actual.isinf(), expected.isinf()), name


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e30])
def test_extreme_scale_comes_out_as_in_the_dense_formula(backend: str, scale: float) -> None:
    x, y = features("random", 40, 40, 8)
    dense, got = evaluate(reference.contrastive_loss, x, y, scale), ours(x, y, scale, backend=backend)
    assert torch.equal(got.loss.isfinite(), dense.loss.isfinite())
    assert torch.equal(got.dx.isfinite(), dense.dx.isfinite())


def test_one_pair_has_no_loss_and_no_gradient(backend: str) -> None:
    x, y = features("random", 1, 1, 16)
    got = ours(x, y, 100.0, bias=-10.0, backend=backend)
    for name in NAMES:
        assert not getattr(got, name).any(), name


def strided(tensor: Tensor, padding: float = float("nan")) -> Iterator[Tensor]:
    """The same values under other strides, with padding between them."""
    n, d = tensor.shape
    yield tensor.T.contiguous().T
    padded = tensor.new_full((2 * n + 1, d + 5), padding)
    padded[1::2, 2:-3] = tensor
    yield padded[1::2, 2:-3]
    sparse = tensor.new_full((n, 3 * d), padding)
    sparse[:, ::3] = tensor
    yield sparse[:, ::3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_strides_and_nan_padding(backend: str, dtype: torch.dtype) -> None:
    x, y = features("trained", 67, 71, 19, dtype)
    exact = truth(x, y, 14.3)
    plain = ours(x, y, 14.3, backend=backend)
    for x_strided, y_strided in zip(strided(x), strided(y), strict=True):
        got = ours(x_strided, y_strided, 14.3, backend=backend)
        for name in NAMES:
            bound = error(getattr(plain, name), getattr(exact, name)) + 1e-6 * getattr(exact, name).abs().max()
            assert error(getattr(got, name), getattr(exact, name)) <= 2 * bound + 1e-9, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_padding_is_not_read(backend: str, dtype: torch.dtype) -> None:
    """NaN between the rows and columns changes no bit against zeros there."""
    x, y = features("trained", 67, 71, 19, dtype)
    zeros, nans = (zip(strided(x, value), strided(y, value), strict=True) for value in (0.0, float("nan")))
    for of_zeros, of_nans in zip(zeros, nans, strict=True):
        assert bitwise(ours(*of_zeros, 14.3, backend=backend), ours(*of_nans, 14.3, backend=backend))


def test_expanded_inputs(backend: str) -> None:
    x, y = (t[:1].expand(30, -1) for t in features("random", 30, 30, 12))
    exact, got = truth(x, y, 14.3), ours(x, y, 14.3, backend=backend)
    for name in NAMES:
        assert error(getattr(got, name), getattr(exact, name)) <= 1e-5, name


@pytest.fixture(scope="module")
def in_fresh_memory() -> list[dict[str, str]]:
    """Results by backend and instruction set, where fresh memory is filled with NaN and huge numbers, and where not."""
    program = """
import json, os, sys
import torch
from conftest import INSTRUCTION_SETS, OTHERS
from oracle import features, ours, reasons_against
from clipfast.backends import cpu
if sys.argv[1] == "fill":
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
found = {}
for backend in [*INSTRUCTION_SETS, *OTHERS]:
    name, _, instruction_set = backend.partition("-")
    if instruction_set and not cpu.instruction_sets()[instruction_set] or reasons_against(name, torch.float32):
        continue
    os.environ[cpu.ENVIRONMENT_VARIABLE] = instruction_set
    results = [ours(*features("trained", 131, 140, 37, t), 14.3, backend=name) for t in (torch.float32, torch.bfloat16)]
    values = [t for r in results for t in (r.loss, r.dx, r.dy, r.dscale)]
    found[backend] = str([value.double().tolist() for value in values])
print(json.dumps(found))
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, mode],
            env=os.environ | {"PYTHONPATH": os.path.dirname(__file__), "MALLOC_PERTURB_": perturb},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for mode, perturb in (("fill", "128"), ("plain", "0"))
    ]
    return [json.loads(output) for output in outputs]


def test_fresh_memory_is_not_read(
    backend: str, request: pytest.FixtureRequest, in_fresh_memory: list[dict[str, str]]
) -> None:
    """The C library fills fresh memory with huge numbers here, and PyTorch with NaN; no bit of the result changes."""
    filled, plain = (found[request.node.callspec.params["backend"]] for found in in_fresh_memory)
    assert filled == plain


def test_scaled_and_expanded_upstream_gradient(backend: str) -> None:
    x, y = (t.requires_grad_() for t in features("trained", 20, 20, 6))
    loss = clipfast.contrastive_loss(x, y, 14.3, backend=backend)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (expanded,) = torch.autograd.grad(loss.expand(4, 8)[:, ::2], x, torch.full((4, 4), 0.25), retain_graph=True)
    torch.testing.assert_close(expanded, 4 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_touch_the_logits(backend: str, dtype: torch.dtype) -> None:
    x, y = (t.requires_grad_() for t in features("trained", 100, 100, 64, dtype))
    scale = torch.tensor(100.0, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        loss = clipfast.contrastive_loss(x, y, scale, label_smoothing=0.1, backend=backend)
        return loss, *torch.autograd.grad(loss, (x, y, scale))

    outside = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    for a, b in zip(outside, inside, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def test_autocast_encoder_trains(backend: str) -> None:
    """Encoders under autocast give bfloat16 features; their parameters stay float32 and get float32 gradients."""
    tower = torch.nn.Linear(32, 16)
    images, texts = features("trained", 24, 24, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = clipfast.contrastive_loss(tower(images), tower(texts), 14.3, normalize=True, backend=backend)
    assert loss.dtype == torch.float32
    loss.backward()
    assert tower.weight.grad is not None
    assert tower.weight.grad.dtype == torch.float32


def normalize_then_loss(x: Tensor, y: Tensor, s: Tensor, b: Tensor, **options: float) -> Tensor:
    return reference.contrastive_loss(reference.l2_normalize(x), reference.l2_normalize(y), s, b, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normalize(backend: str, dtype: torch.dtype, smoothing: float) -> None:
    x, y = features("unnormalized", 33, 40, 21, dtype)
    exact = evaluate(
        normalize_then_loss, x.double(), y.double(), 14.3, scalar_dtype=torch.float64, label_smoothing=smoothing
    )
    got = ours(x, y, 14.3, normalize=True, label_smoothing=smoothing, backend=backend)
    for name in ("loss", "dx", "dy", "dscale"):
        bound = 8 * torch.finfo(dtype).eps * max(1.0, getattr(exact, name).abs().max().item())
        assert error(getattr(got, name), getattr(exact, name)) <= bound, name


def test_normalize_keeps_a_zero_row_zero(backend: str) -> None:
    x, y = features("unnormalized", 8, 8, 5)
    x[2] = 0
    exact = evaluate(normalize_then_loss, x.double(), y.double(), 14.3, scalar_dtype=torch.float64, label_smoothing=0.1)
    got = ours(x, y, 14.3, normalize=True, label_smoothing=0.1, backend=backend)
    for name in ("loss", "dscale"):
        assert error(getattr(got, name), getattr(exact, name)) <= 1e-5, name
    assert exact.dx[2].abs().max() > 1e9
    for name in ("dx", "dy"):
        rows, exact_rows = getattr(got, name), getattr(exact, name)
        assert ((rows - exact_rows).norm(dim=1) <= 1e-5 * exact_rows.norm(dim=1) + 1e-7).all(), name


@pytest.mark.parametrize("length", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normalize_takes_rows_of_any_length(backend: str, dtype: torch.dtype, length: float) -> None:
    """float16 holds neither 1 / (|x| |y|) nor the gradient by it for each of these."""
    x, y = (t * length for t in features("unnormalized", 33, 40, 21, dtype))
    x[::2] /= 4
    exact = evaluate(normalize_then_loss, x.double(), y.double(), 14.3, scalar_dtype=torch.float64)
    got = ours(x, y, 14.3, normalize=True, backend=backend)
    eps = torch.finfo(dtype).eps
    assert error(got.loss, exact.loss) <= 8 * eps
    for name in ("dx", "dy"):
        assert error(getattr(got, name), getattr(exact, name)) <= 8 * eps * max(1, 1 / length), name


class Watch(TorchDispatchMode):
    """Changes nothing; under it the loss is an operator and not an autograd function (clipfast.autograd.loss)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


@pytest.fixture(params=[nullcontext, Watch], ids=["function", "operator"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.param():
        yield


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_in_place_edit_before_backward_raises(backend: str, which: int, normalize: bool) -> None:
    leaves = [t.requires_grad_() for t in (*features("random", 9, 9, 4), torch.tensor([14.3]))]
    inputs = [leaf * 1 for leaf in leaves]
    loss = clipfast.contrastive_loss(*inputs, normalize=normalize, backend=backend)
    inputs[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("path")
def test_retain_graph_gives_the_same_twice(backend: str) -> None:
    leaves = [t.requires_grad_() for t in (*features("random", 90, 90, 33), torch.tensor(14.3))]
    loss = clipfast.contrastive_loss(*leaves, label_smoothing=0.1, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_double_backward_says_that_it_is_not_supported(backend: str, which: int, normalize: bool) -> None:
    leaves = [t.requires_grad_() for t in (*features("random", 5, 5, 4), torch.tensor(14.3))]
    loss = clipfast.contrastive_loss(*leaves, normalize=normalize, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaves[which], create_graph=True)
    with pytest.raises(RuntimeError, match=r"clipfast does not support double backward.*clipfast\.reference"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_frozen_tower(backend: str, frozen: int) -> None:
    tensors = features("trained", 31, 31, 10)
    exact = truth(*tensors, 14.3)
    live = tensors[1 - frozen].requires_grad_()
    clipfast.contrastive_loss(*tensors, 14.3, backend=backend).backward()
    assert tensors[frozen].grad is None
    assert live.grad is not None
    assert error(live.grad, (exact.dy, exact.dx)[frozen]) <= 1e-6


def test_frozen_towers_and_a_scale_that_learns(backend: str) -> None:
    x, y = features("trained", 31, 31, 10)
    scale = torch.tensor(14.3, requires_grad=True)
    clipfast.contrastive_loss(x, y, scale, backend=backend).backward()
    assert scale.grad is not None
    assert error(scale.grad, truth(x, y, 14.3).dscale) <= 1e-6
    assert not clipfast.contrastive_loss(x, y, scale.detach(), backend=backend).requires_grad


def test_tensors_made_in_inference_mode(backend: str) -> None:
    """They compute a loss; for a gradient they would have to be saved, which PyTorch refuses."""
    with torch.inference_mode():
        x, y = features("trained", 31, 31, 10)
    loss = clipfast.contrastive_loss(x, y, 14.3, backend=backend)
    assert error(loss, truth(x.clone(), y.clone(), 14.3).loss) <= 1e-6
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        clipfast.contrastive_loss(x, y, torch.tensor(14.3, requires_grad=True), backend=backend)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend: str, mode: type) -> None:
    x, y = features("trained", 31, 31, 10)
    with mode():
        loss = clipfast.contrastive_loss(x.requires_grad_(), y, 14.3, backend=backend)
    assert not loss.requires_grad
    assert error(loss, truth(x.detach(), y, 14.3).loss) <= 1e-6


@pytest.mark.parametrize(
    "scale",
    [
        14.3,
        14,
        torch.tensor(14.3),
        torch.tensor([14.3], requires_grad=True),
        torch.tensor(14.3, dtype=torch.float64, requires_grad=True),
        torch.tensor(14.3, dtype=torch.bfloat16, requires_grad=True),
    ],
    ids=["float", "int", "0-D", "[1]", "float64", "bfloat16"],
)
def test_forms_of_logit_scale(backend: str, scale: Tensor | float) -> None:
    x, y = features("trained", 31, 31, 10)
    if isinstance(scale, Tensor):
        scale = scale.detach().clone().requires_grad_(scale.requires_grad)
    loss = clipfast.contrastive_loss(x.requires_grad_(), y, scale, scale, backend=backend)
    value = scale.item() if isinstance(scale, Tensor) else scale
    exact = truth(x.detach(), y, value)
    assert loss.shape == ()
    assert error(loss, exact.loss) <= 1e-6
    loss.backward()
    if isinstance(scale, Tensor) and scale.requires_grad:
        assert scale.grad is not None
        assert (scale.grad.shape, scale.grad.dtype) == (scale.shape, scale.dtype)
        assert error(scale.grad, exact.dscale) <= 1e-6 + torch.finfo(scale.dtype).eps * exact.dscale.abs()


def test_scale_is_not_clamped(backend: str) -> None:
    x, y = features("random", 31, 31, 10)
    assert error(ours(x, y, 200.0, backend=backend).loss, truth(x, y, 200.0).loss) <= 1e-4
    assert error(ours(x, y, -3.0, backend=backend).dx, truth(x, y, -3.0).dx) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(backend: str, dtype: torch.dtype) -> None:
    x, y = features("random", 300, 333, 65, dtype)
    assert bitwise(ours(x, y, 14.3, backend=backend), ours(x, y, 14.3, backend=backend))


def test_number_of_threads_changes_roundings_at_most(backend: str) -> None:
    x, y = features("random", 300, 333, 65)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(ours(x, y, 14.3, backend=backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert backend != "cpu" or bitwise(results[0], other)
        for name in NAMES:
            scale = getattr(results[0], name).abs().max().item()
            assert error(getattr(other, name), getattr(results[0], name)) <= 1e-5 * scale + 1e-9, name
