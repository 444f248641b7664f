"""Sizes at which 32-bit offsets break and logits would not fit (traps 3, 12)."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch
from oracle import error, features, ours
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import clipfast
from benchmarks.environment import PeakMemory, SavedStorages
from clipfast import dispatch
from clipfast.backends import torch as torch_backend
from clipfast.problem import Problem


@pytest.fixture
def fast_backend(backend: str) -> str:
    """Every backend that computes a large problem in reasonable time."""
    if reasons := dispatch.get(backend).reasons_against_auto(Problem(1, 1, 1, torch.float32, torch.device("cpu"))):
        pytest.skip("; ".join(reasons))
    return backend


def repeated(count: int, *tensors: Tensor) -> list[Tensor]:
    """So that every logsumexp grows by log(count), and with it the loss."""
    return [tensor.repeat(count, 1) for tensor in tensors]


def test_more_logits_than_32_bits_count(fast_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "CHUNK_BYTES", 1 << 20)  # saves a third of the time
    base = features("trained", 1009, 1009, 4)
    x, y = repeated(46, *base)
    assert len(x) * len(y) > 2**31
    expected = ours(*base, 14.3, backend=fast_backend).loss + math.log(46)
    assert error(clipfast.contrastive_loss(x, y, 14.3, backend=fast_backend), expected) <= 1e-6 * expected


def test_gradients_of_more_logits_than_32_bits_count() -> None:
    base = features("trained", 1009, 1009, 4)
    expected, got = ours(*base, 14.3), ours(*repeated(46, *base), 14.3)
    assert error(got.dscale, expected.dscale) <= 1e-5 * expected.dscale.abs()
    for name in ("dx", "dy"):
        exact = getattr(expected, name) / 46
        assert error(getattr(got, name), exact.repeat(46, 1)) <= 1e-5 * exact.abs().max(), name


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """The same values, those of one dimension 2^27 elements from each other; memory between them is never touched."""
    strides = [1, 1]
    strides[dim], strides[1 - dim] = 2**27 + 1, 3
    size = (tensor.shape[dim] - 1) * strides[dim] + 3 * tensor.shape[1 - dim]
    assert size > 2**31
    view = torch.empty(size, dtype=tensor.dtype).as_strided(tensor.shape, strides)
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("which", [0, 1])
def test_offsets_beyond_32_bits(backend: str, which: int, dim: int, dtype: torch.dtype) -> None:
    inputs = list(features("trained", 19, 19, 19, dtype))
    expected = ours(*inputs, 14.3, backend=backend)
    inputs[which] = far_apart(inputs[which], dim)
    got = ours(*inputs, 14.3, backend=backend)
    for name in ("loss", "dx", "dy", "dscale"):
        value, exact = getattr(got, name), getattr(expected, name)
        assert error(value, exact) <= 4 * torch.finfo(value.dtype).eps * exact.abs().max(), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from Linux's /proc")
def test_peak_memory_is_a_fraction_of_the_logits(fast_backend: str) -> None:
    """Of this process, with gradients and all temporaries; what the allocator keeps for itself comes on top."""
    n, d, memory = 10240, 8, PeakMemory("cpu")
    for rows in (64, n):  # threads and libraries first
        x, y = (t.requires_grad_() for t in features("random", rows, rows, d))
        memory.start()
        clipfast.contrastive_loss(x, y, 14.3, backend=fast_backend).backward()
        peak = memory.stop()
    assert peak < clipfast.explain(n, d, backend=fast_backend).dense_logits_bytes / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_workspace_of_the_torch_backend_is_as_predicted(dtype: torch.dtype) -> None:
    n, m, d = 4096, 5000, 64
    x, y = (t.requires_grad_() for t in features("random", n, m, d, dtype))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        clipfast.contrastive_loss(x, y, 14.3, keep_bytes=0, backend="torch").backward()
    events = profiler.profiler.kineto_results.events()
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    explanation = clipfast.explain(n, d, dtype, m=m, keep_bytes=0, backend="torch")
    predicted = explanation.workspace_bytes + explanation.gradient_bytes
    assert 0.9 * predicted <= max(held) <= predicted + 150 * (n + m)


def saved_bytes(x: Tensor, y: Tensor, backend: str, **options: Any) -> int:
    """Bytes of the distinct storages that autograd saves for the backward pass."""
    with SavedStorages() as saved:
        clipfast.contrastive_loss(x, y, torch.tensor(14.3, requires_grad=True), backend=backend, **options)
    return saved.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_saved_bytes_are_linear_in_the_batch(backend: str, normalize: bool, dtype: torch.dtype) -> None:
    counts = []
    for n in (256, 512, 1024):
        x, y = (t.requires_grad_() for t in features("random", n, n, 64, dtype))
        counts.append(saved_bytes(x, y, backend, normalize=normalize, keep_bytes=0))
        assert counts[-1] < 3 * (x.nbytes + y.nbytes)
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normalize_saves_no_copy(backend: str, dtype: torch.dtype) -> None:
    x, y = (t.requires_grad_() for t in features("unnormalized", 256, 300, 64, dtype))
    assert saved_bytes(x, y, backend, normalize=True) == saved_bytes(x, y, backend)


def test_saved_bytes_at_large_batches() -> None:
    """d = 512, n to 32768: under 3x the inputs and linear; predicted by explain()."""
    counts = {}
    for n in (8192, 16384, 32768):
        x, y = (torch.randn(n, 512, requires_grad=True) for _ in range(2))
        counts[n] = saved_bytes(x, y, "auto")
        assert counts[n] < 3 * (x.nbytes + y.nbytes)
        # The loss's own vectors over the batch are a few doubles a row.
        assert 0 <= counts[n] - clipfast.explain(n, 512).saved_bytes <= 64 * n
    assert counts[32768] - counts[16384] == 2 * (counts[16384] - counts[8192])
