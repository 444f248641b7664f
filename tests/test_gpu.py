"""The backends on a GPU at real sizes: `pytest -m gpu` (traps 3-8, 13-15)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_three_way, error, evaluate, features, ours, reasons_against
from torch import Tensor

import clipfast
from clipfast import dispatch, operators, reference, tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA or ROCm GPU here"),
]

HALVES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}  # in the Frobenius norm
NAMES = ("loss", "dx", "dy", "dscale", "dbias")


@pytest.fixture(params=dispatch.names())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that cannot run the test's dtypes on the GPU is skipped with its own reason."""
    dtypes = [value for value in request.node.callspec.params.values() if isinstance(value, torch.dtype)]
    for dtype in dtypes or [torch.float32]:
        if reasons := reasons_against(request.param, dtype, device="cuda"):
            pytest.skip("; ".join(reasons))
    return str(request.param)


@pytest.fixture(params=tuning.STRATEGIES)
def strategy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The triton backend with each of its backward passes."""
    if reasons := dispatch.backends("cuda")["triton"]:
        pytest.skip("; ".join(reasons))
    from clipfast.kernels import launch

    monkeypatch.setattr(launch, "backward", functools.partial(launch.backward, strategy=request.param))
    return str(request.param)


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield str(request.param)
    torch.set_float32_matmul_precision(before)


def placed(
    kind: str, n: int, m: int, d: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> tuple[Tensor, Tensor]:
    x, y = features(kind, n, m, d, dtype)
    return x.to(device), y.to(device)


def require_memory(count: int) -> None:
    available = torch.cuda.get_device_properties(0).total_memory
    if available < count:
        pytest.skip(f"needs {count >> 30} GiB of GPU memory, here are {available >> 30}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(4096, 512), (4096, 768), (4096, 1024), (4096, 1280), (16384, 512)])
def test_halves(backend: str, n: int, d: int, dtype: torch.dtype) -> None:
    require_memory(60 * n * n)
    assert_three_way(*placed("trained", n, n, d, dtype), 100.0, backend=backend)


@pytest.mark.parametrize(("n", "d"), [(4096, 512), (4096, 768), (2048, 1280)])
def test_float32(backend: str, precision: str, n: int, d: int) -> None:
    assert_three_way(*placed("trained", n, n, d, torch.float32), 100.0, backend=backend)


def test_float64_goes_to_the_torch_backend() -> None:
    x, y = placed("trained", 2048, 2048, 512, torch.float64)
    assert clipfast.explain(2048, 512, torch.float64, "cuda").chosen == "torch"
    assert_three_way(x, y, 14.3, backend="torch")
    with pytest.raises(ValueError, match="triton: float64 goes to the torch backend"):
        clipfast.contrastive_loss(x, y, 14.3, backend="triton")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 8), (1, 2, 7), (13, 13, 100), (127, 257, 384), (257, 257, 1)])
def test_odd_shapes(backend: str, n: int, m: int, d: int, dtype: torch.dtype) -> None:
    assert_three_way(*placed("unnormalized", n, m, d, dtype), 14.3, bias=-0.5, backend=backend)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_scales(backend: str, scale: float) -> None:
    """At 1000 a tile's logits are too far apart for one shift."""
    assert_three_way(*placed("unnormalized", 1000, 1000, 64, torch.float32), scale, backend=backend)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_normalize_with_extra_texts(backend: str, dtype: torch.dtype, smoothing: float) -> None:
    x, y = placed("unnormalized", 3000, 5000, 768, dtype)

    def normalized(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        rows = reference.l2_normalize(x), reference.l2_normalize(y)
        return reference.contrastive_loss(*rows, s, b, label_smoothing=smoothing)

    exact = evaluate(normalized, x.double(), y.double(), 14.3, scalar_dtype=torch.float64)
    got = ours(x, y, 14.3, normalize=True, label_smoothing=smoothing, backend=backend)
    assert error(got.loss, exact.loss) <= TOLERANCE[dtype]
    for name in ("dx", "dy"):
        value, truth = getattr(got, name).double(), getattr(exact, name)
        assert (value - truth).norm() <= TOLERANCE[dtype] * truth.norm(), name


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_both_strategies(strategy: str, normalize: bool, dtype: torch.dtype) -> None:
    x, y = placed("trained", 4096, 5000, 768, dtype)
    exact = ours(x.double(), y.double(), 14.3, normalize=normalize, backend="torch")
    got = ours(x, y, 14.3, normalize=normalize, backend="triton")
    for name in ("dx", "dy"):
        value, truth = getattr(got, name).double(), getattr(exact, name)
        assert (value - truth).norm() <= TOLERANCE[dtype] * truth.norm(), name
    assert error(got.dscale, exact.dscale) <= 1e-4 * exact.dscale.abs()


def test_float16_gradient_of_a_huge_batch(backend: str) -> None:
    """A uniform softmax over 65536 texts, over 65536 again, is 2e-10: 0 in float16."""
    n = 65536
    require_memory(16 << 30)
    x, y = placed("random", n, n, 256, torch.float16)
    exact = ours(x.double(), y.double(), 14.3, backend="torch")
    got = ours(x, y, 14.3, upstream=1024.0, backend=backend)
    for name in ("dx", "dy"):
        value, truth = getattr(got, name).double() / 1024, getattr(exact, name)
        assert (value - truth).norm() <= 1e-2 * truth.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_runs_are_bitwise_equal(backend: str, dtype: torch.dtype) -> None:
    x, y = placed("random", 8192, 9000, 512, dtype)
    runs = [ours(x, y, 14.3, normalize=True, label_smoothing=0.1, backend=backend) for _ in range(2)]
    assert all(torch.equal(getattr(runs[0], name), getattr(runs[1], name)) for name in NAMES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_input_comes_out_as_in_the_dense_formula(backend: str, value: float) -> None:
    x, y = placed("random", 300, 400, 64, torch.float32)
    y[350, 3] = value
    dense, got = evaluate(reference.contrastive_loss, x, y, 14.3), ours(x, y, 14.3, backend=backend)
    for name in ("loss", "dx", "dy", "dscale"):
        assert torch.equal(getattr(got, name).isnan(), getattr(dense, name).isnan()), name


def step(x: Tensor, y: Tensor, scale: Tensor, backend: str, **options: Any) -> tuple[Tensor, ...]:
    loss = clipfast.contrastive_loss(x, y, scale, backend=backend, **options)
    return loss, *torch.autograd.grad(loss, (x, y, scale))


def leaves(n: int, d: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (t.requires_grad_() for t in placed("trained", n, n, d, dtype, device))
    return x, y, torch.tensor(14.3, device=device, requires_grad=True)


def step_with_ids(x: Tensor, y: Tensor, scale: Tensor, backend: str, same_id: str) -> tuple[Tensor, ...]:
    ids = torch.arange(len(x), device=x.device) // 3
    options: dict[str, Any] = {"image_ids": ids, "text_ids": ids, "same_id": same_id, "return_metrics": True}
    loss, metrics = clipfast.contrastive_loss(x, y, scale, backend=backend, label_smoothing=0.1, **options)
    return loss, *metrics.values(), *torch.autograd.grad(loss, (x, y, scale))


def sigmoid_step(x: Tensor, y: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, ...]:
    loss = clipfast.siglip_loss(x, y, scale, -10.0, normalize=True, backend=backend)
    return loss, *torch.autograd.grad(loss, (x, y, scale))


def distillation_step(x: Tensor, y: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, ...]:
    loss = clipfast.distillation_loss(x, y, scale, y.detach(), x.detach(), 10.0, backend=backend)
    return loss, *torch.autograd.grad(loss, (x, y, scale))


def projected_step(x: Tensor, y: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, ...]:
    d = x.shape[1]
    loss = clipfast.projected_contrastive_loss(x, y, x.detach()[:d], y.detach()[:d], scale, backend=backend)
    return loss, *torch.autograd.grad(loss, (x, y, scale))


STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "plain": step,
    "norms": functools.partial(step, normalize=True),
    "kept logits": functools.partial(step, keep_bytes=1 << 40),
    "ignored ids": functools.partial(step_with_ids, same_id="ignore"),
    "positive ids": functools.partial(step_with_ids, same_id="positive"),
    "sigmoid": sigmoid_step,
    "distillation": distillation_step,
    "projected": projected_step,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_cuda_graph(backend: str, name: str, dtype: torch.dtype) -> None:
    """A captured step of several chunks, replayed on other inputs, gives what an eager one does."""
    n, d, of = 6000, 512, STEPS[name]
    inputs = leaves(n, d, dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        of(*inputs, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = of(*inputs, backend)
    with torch.no_grad():
        for tensor, other in zip(inputs[:2], placed("random", n, n, d, dtype), strict=True):
            tensor.copy_(other)
    graph.replay()
    for got, expected in zip(captured, of(*inputs, backend), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_nothing_waits_for_the_device(backend: str, normalize: bool) -> None:
    inputs = leaves(1024, 512)
    step(*inputs, backend, normalize=normalize, label_smoothing=0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs, backend, normalize=normalize, label_smoothing=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_peak_memory_is_as_predicted(backend: str, dtype: torch.dtype) -> None:
    n, d = 16384, 512
    x, y = (t.requires_grad_() for t in placed("random", n, n, d, dtype))
    explanation = clipfast.explain(n, d, dtype, "cuda", backend=backend)
    step(x, y, torch.tensor(14.3, device="cuda", requires_grad=True), backend)  # cuBLAS takes its own workspace once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(x, y, torch.tensor(14.3, device="cuda", requires_grad=True), backend)
    peak = torch.cuda.max_memory_allocated() - before
    vectors = 16 * 8 * n
    assert peak <= 1.1 * (explanation.workspace_bytes + explanation.gradient_bytes) + vectors
    assert peak < explanation.dense_logits_bytes / 2


def test_side_stream_and_other_thread(backend: str) -> None:
    inputs = leaves(2048, 512)
    expected = step(*inputs, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    results: list[tuple[Tensor, ...]] = []

    def work() -> None:
        with torch.cuda.stream(side):
            results.append(step(*inputs, backend))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results[0], expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    expected, got = (step(*leaves(1024, 512, device), backend) for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("test", ["test_schema", "test_autograd_registration", "test_faketensor"])
def test_opcheck(backend: str, test: str, normalize: bool) -> None:
    x, y, scale = leaves(64, 32)
    bias = torch.tensor(0.5, device="cuda", requires_grad=True)
    arguments = (x, y, scale, bias, None, None, normalize, 0.1, "both", "mean", "ignore", False, backend)
    torch.library.opcheck(operators.contrastive_loss.operator, arguments, test_utils=test)


def test_compiles_as_one_graph_with_a_dynamic_batch(backend: str) -> None:
    loss = functools.partial(clipfast.contrastive_loss, normalize=True, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n in (500, 900):
        inputs = leaves(n, 256)
        for got, expected in zip(
            torch.autograd.grad(compiled(*inputs), inputs), step(*inputs, backend, normalize=True)[1:], strict=True
        ):
            assert torch.equal(got, expected)


def test_auto_takes_triton_on_a_gpu_that_can() -> None:
    if reasons := dispatch.backends("cuda")["triton"]:
        pytest.skip("; ".join(reasons))
    assert clipfast.explain(4096, 512, torch.bfloat16, "cuda").chosen == "triton"
