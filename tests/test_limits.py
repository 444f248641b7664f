"""Sizes at which 32-bit offsets break and logits would not fit (traps 3, 12)."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from oracle import error, features, ours
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import clipfast
from benchmarks.environment import PeakMemory
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
        clipfast.contrastive_loss(x, y, 14.3, backend="torch").backward()
    events = profiler.profiler.kineto_results.events()
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    explanation = clipfast.explain(n, d, dtype, m=m, backend="torch")
    predicted = explanation.workspace_bytes + explanation.gradient_bytes
    assert 0.9 * predicted <= max(held) <= predicted + 150 * (n + m)
