"""The host side of the Triton passes reads nothing of the device's and waits for nothing, so that graphs can hold it.

On meta tensors, which have no memory to read, under launches that do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_triton_compile import in_a_process
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_case import DTYPES

from clipfast import distillation, projected, sigmoid, softmax, tuning
from clipfast.kernels import launch
from clipfast.projected import Projection

N, M, D = 1100, 1300, 32
META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """No operation may take or give a tensor of another device: to copy one may wait, and graphs cannot hold it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for value in tree_leaves((args, kwargs or {}, result)):
            assert not isinstance(value, Tensor) or value.device == META, function
        return result


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that would run; they are given tensors of the device, and numbers."""
    names: list[str] = []

    def note(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        for value in tree_leaves((arguments, options)):
            value = getattr(value, "base", value)  # of a tensor descriptor
            assert value is None or isinstance(value, int | float | str) or value.device == META
        names.append(kernel.fn.__name__)

    monkeypatch.setattr(type(launch.gradient_kernel), "run", note)
    monkeypatch.setattr(tuning, "describe", lambda device: tuning.Device("sm_90", 132, 227 << 10))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # refuses meta
    for name in ("backward", "sigmoid", "distillation"):
        monkeypatch.setattr(launch, name, functools.partial(getattr(launch, name), workspace=1))
    with OneDevice():
        yield names


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def features(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return empty(N, D, dtype=dtype), empty(M, D, dtype=dtype)


def ids_or_none(wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    return (empty(N, dtype=torch.int32), empty(M, dtype=torch.int32)) if wanted else (None, None)


PLAIN = softmax.Options(False, 0.0, "both", "mean", "ignore", False, "triton")
OPTIONS: dict[str, tuple[bool, dict[str, Any]]] = {  # with ids, and others
    "plain": (False, {}),
    "kept": (False, {"keep": True, "normalize": True}),
    "one direction": (False, {"normalize": True, "direction": "image_to_text", "reduction": "none"}),
    "smoothing, metrics": (False, {"label_smoothing": 0.1, "metrics": True}),
    "ignore, metrics": (True, {"normalize": True, "metrics": True}),
    "positive, smoothing": (True, {"same_id": "positive", "label_smoothing": 0.1}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", tuning.STRATEGIES)
@pytest.mark.parametrize("options", OPTIONS)
def test_softmax(
    options: str, strategy: str, dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "backward", functools.partial(launch.backward, strategy=strategy))
    ids, chosen = OPTIONS[options]
    inputs = *features(dtype), empty(), empty(), *ids_or_none(ids)
    loss, statistics = softmax.forward(*inputs, PLAIN._replace(**chosen))
    softmax.backward(loss, *inputs, statistics, PLAIN._replace(**chosen))
    assert {"statistics_kernel", "merge_kernel", "prepare_kernel", "share_kernel", "finish_kernel"} <= set(launched)
    assert launched.count("gradient_kernel") == (9 if strategy == "chunks" else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metrics", [False, True])
def test_projected_softmax(metrics: bool, dtype: torch.dtype, launched: list[str]) -> None:
    options = PLAIN._replace(normalize=True, metrics=metrics)
    sides = [Projection(empty(k, 24, dtype=dtype), empty(24, D, dtype=dtype), empty(D, dtype=dtype)) for k in (N, M)]
    others = empty(), empty(), None, None
    loss, statistics, rows = projected.forward(*sides, *others, dtype, options)
    projected.backward(loss, *sides, *others, rows, statistics, (True,) * 4, options)
    assert {"statistics_kernel", "gradient_kernel"} <= set(launched)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same_id", [None, "ignore", "positive"])
@pytest.mark.parametrize("gradients", [False, True])
def test_sigmoid(gradients: bool, same_id: str | None, dtype: torch.dtype, launched: list[str]) -> None:
    inputs = *features(dtype), empty(), empty(), *ids_or_none(same_id is not None)
    sigmoid.forward(*inputs, gradients, sigmoid.Options(True, same_id or "ignore", "triton"))
    assert launched.count("sigmoid_kernel") == 9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_distillation(gradients: bool, dtype: torch.dtype, launched: list[str]) -> None:
    options = distillation.Options(True, "triton")
    distillation.forward(*features(dtype), empty(), *features(dtype), empty(), gradients, options)
    assert launched.count("distillation_kernel") == 9


READS: tuple[Callable[[Tensor], Any], ...] = (
    bool,
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    lambda value: value[value > 0],
    lambda value: value + torch.ones(()),
    lambda value: torch.ones(()).to(value.device),
)


@pytest.mark.parametrize("read", READS)
def test_what_waits_would_be_seen(read: Callable[[Tensor], Any]) -> None:
    with OneDevice(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        read(empty())


@pytest.mark.skipif(tuning.triton_version() < (3, 9), reason="the benchmark's driver is for Triton 3.9")
def test_only_the_first_launch_of_a_pass_is_looked_up() -> None:
    """That is the better part of what a chunk costs the processor (benchmarks/host.py)."""
    counts = in_a_process(
        """
from unittest import mock
from triton.runtime.jit import JITFunction
from benchmarks import host
with host.absent() as launches:
    for name, run in host.passes(1100, workspace=1).items():
        with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as looked_up:
            launches.clear()
            run()
        kernels = [of.args[0].__name__ for of in looked_up.call_args_list]
        print(name, kernels.count(f"{name}_kernel"), launches.count(f"{name}_kernel"))
"""
    )
    assert counts.splitlines() == ["gradient 1 9", "sigmoid 1 9", "distillation 1 9"]
