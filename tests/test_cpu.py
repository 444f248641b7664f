"""The compiled backend by itself: instruction sets (trap 22), exponentials, forks. The others test what it computes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from oracle import BFLOAT16_UNITS, Result, error, features, ours, same_dtype, truth

import clipfast
from clipfast.backends import cpu

if not cpu.instruction_sets():
    pytest.skip("; ".join(clipfast.backends()["cpu"]), allow_module_level=True)

AVAILABLE = [name for name, here in cpu.instruction_sets().items() if here]


def exp2(instruction_set: str, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    cpu._cpu.exp2(instruction_set, x.dtype.name, x.ctypes.data, out.ctypes.data, len(x))
    return out


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_is_within_two_units_in_the_last_place(instruction_set: str, dtype: type) -> None:
    lowest = np.log2(np.finfo(dtype).tiny)
    x = np.concatenate([np.linspace(lowest, 0, 400_001), np.linspace(-1, 1, 20_001), np.arange(lowest, 100)])
    x = x.astype(dtype)
    exact = np.exp2(x.astype(np.longdouble))
    error = np.abs(exp2(instruction_set, x) - exact) / exact
    assert error.max() <= 2 * np.finfo(dtype).eps


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_at_the_ends(instruction_set: str, dtype: type) -> None:
    x = np.array([0, -1, 3, -np.inf, -1e30, np.inf, np.nan], dtype)
    np.testing.assert_array_equal(exp2(instruction_set, x), np.array([1, 0.5, 8, 0, 0, np.inf, np.nan], dtype))


@pytest.fixture
def _matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def relative_errors(kind: str, precision: str, compute: Callable[..., Result] = ours) -> dict[str, float]:
    x, y = features(kind, 256, 256, 512)
    exact = truth(x, y, 14.3)
    torch.set_float32_matmul_precision(precision)
    got = compute(x, y, 14.3)
    values = {name: getattr(exact, name) for name in ("loss", "dx", "dy", "dscale")}
    return {name: error(getattr(got, name), value) / value.abs().max().item() for name, value in values.items()}


@pytest.mark.usefixtures("_matmul_precision")
@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_matmul_precision(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode "high" keeps 16 bits of each factor or more, "medium" 8.

    On trained pairs 16 bits do less harm than what the dense formula in real float32 loses to cancellation.
    """
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, instruction_set)
    dense = relative_errors("trained", "highest", same_dtype)
    for name, value in relative_errors("trained", "high").items():
        assert value <= dense[name] + 2**-23, name
    for name, value in relative_errors("random", "high").items():
        assert value <= 2**-16, name
    for name, value in relative_errors("random", "medium").items():
        assert value <= 2**-7, name


@pytest.mark.usefixtures("_matmul_precision")
@pytest.mark.parametrize("instruction_set", [name for name in AVAILABLE if name in BFLOAT16_UNITS])
def test_medium_precision_multiplies_bfloat16(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 features that are bfloat16 numbers give what bfloat16 features give, gradients rounded last."""
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, instruction_set)
    torch.set_float32_matmul_precision("medium")
    x, y = features("trained", 70, 90, 100, torch.bfloat16)
    halves, singles = (ours(*pair, 14.3, backend="cpu") for pair in ((x, y), (x.float(), y.float())))
    assert torch.equal(singles.loss, halves.loss)
    assert torch.equal(singles.dscale, halves.dscale)
    assert torch.equal(singles.dx.bfloat16(), halves.dx)
    assert torch.equal(singles.dy.bfloat16(), halves.dy)


@pytest.mark.usefixtures("_matmul_precision")
@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize(("of_backend", "precision"), [("ieee", "highest"), ("tf32", "high"), ("bf16", "medium")])
def test_precision_set_for_a_backend(
    instruction_set: str, of_backend: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's newer way, in which torch.get_float32_matmul_precision() may raise, and CUDA's does not matter here."""
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, instruction_set)
    pair = features("random", 70, 90, 100)
    torch.set_float32_matmul_precision(precision)
    expected = ours(*pair, 14.3, backend="cpu")
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = of_backend
    for of_cuda in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = of_cuda
        got = ours(*pair, 14.3, backend="cpu")
        for name, value in vars(expected).items():
            assert torch.equal(getattr(got, name), value), name


def test_an_instruction_set_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu.ENVIRONMENT_VARIABLE, raising=False)
    assert cpu.instruction_set() == AVAILABLE[0]
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, AVAILABLE[-1])
    assert cpu.instruction_set() == AVAILABLE[-1]


def test_an_instruction_set_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features("random", 4, 4, 3)
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, "mmx")
    with pytest.raises(ValueError, match=r"CLIPFAST_CPU_ISA: got 'mmx'; accepted are .*'portable'"):
        clipfast.contrastive_loss(x, y, 1.0)
    monkeypatch.setitem(cpu._INSTRUCTION_SETS, "mmx", False)
    with pytest.raises(ValueError, match=r"CLIPFAST_CPU_ISA: this processor has no 'mmx'; it has '"):
        clipfast.contrastive_loss(x, y, 1.0, backend="cpu")


def _loss_in_a_child(connection: multiprocessing.connection.Connection) -> None:
    connection.send(clipfast.contrastive_loss(*features("random", 300, 300, 64), 14.3, backend="cpu").item())


def test_a_forked_process_computes_too() -> None:
    """As the worker of a DataLoader does, after its parent has used threads."""
    expected = clipfast.contrastive_loss(*features("random", 300, 300, 64), 14.3, backend="cpu").item()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_loss_in_a_child, args=(theirs,))
    child.start()
    assert ours.poll(60)
    assert ours.recv() == expected
    child.join()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_does_not_grow_with_the_batch(dtype: torch.dtype) -> None:
    """Logits would take 16 GiB. What grows is at most one float32 copy of a half-precision gradient."""
    workspace = clipfast.explain(65536, 512, dtype, backend="cpu").workspace_bytes
    gradient = 65536 * 512 * 4 if dtype != torch.float32 else 0
    assert workspace - gradient < 64 << 20
