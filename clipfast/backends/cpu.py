"""The compiled C++ kernels (csrc/) on CPU tensors. Pointers and strides go in, so torch is no build requirement."""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from clipfast.problem import Problem


def _why_missing(error: ImportError) -> str:
    """What is wrong, as the files say; Python's own text takes a missing extension for a circular import."""
    folder = Path(__file__).parents[1]
    if any(Path(folder, f"_cpu{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        why = f"is missing: it does not load from {folder}: {error}"
    elif others := sorted(path.name for path in folder.glob("_cpu.*")):
        why = f"is missing from {folder}, where clipfast was imported from: {others[0]} there is for another Python"
    else:
        why = f"is missing from {folder}, where clipfast was imported from"
    builds = {path.parent for entry in sys.path for path in Path(entry, "clipfast").glob("_cpu.*")} - {folder}
    if builds:
        why += f"; a build is installed in {min(builds)}: start Python outside of {folder.parent} to import that one"
    return (
        f"the compiled extension clipfast._cpu {why}; or reinstall it with a C++17 compiler there: pip install "
        "--no-cache-dir --force-reinstall --no-deps . (-e . to import from the source tree), for pip keeps a wheel "
        "that was built without a compiler and takes it for one that was built with it"
    )


try:
    from clipfast import _cpu

    _MISSING = ""
    _INSTRUCTION_SETS = dict(_cpu.instruction_sets())
except ImportError as error:
    _INSTRUCTION_SETS = {}
    _MISSING = _why_missing(error)

NAME = "cpu"

ENVIRONMENT_VARIABLE = "CLIPFAST_CPU_ISA"


def instruction_sets() -> dict[str, bool]:
    """The instruction sets that kernels exist for, best first, and whether this processor has them."""
    return dict(_INSTRUCTION_SETS)


def instruction_set() -> str:
    """The one in use: the best that this processor has, or the one that CLIPFAST_CPU_ISA names.

    Raises:
        ValueError: the name is unknown, or this processor does not have it.
    """
    available = [name for name, here in _INSTRUCTION_SETS.items() if here]
    name = os.environ.get(ENVIRONMENT_VARIABLE) or available[0]
    if name not in _INSTRUCTION_SETS:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: got {name!r}; accepted are {', '.join(map(repr, _INSTRUCTION_SETS))}"
        )
    if name not in available:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: this processor has no {name!r}; it has {', '.join(map(repr, available))}"
        )
    return name


def unsupported_reasons(problem: Problem) -> tuple[str, ...]:
    reasons = []
    if _MISSING:
        reasons.append(_MISSING)
    else:
        instruction_set()
    if problem.device.type != "cpu":
        reasons.append(f"runs on CPU tensors only, the inputs are on {problem.device}")
    return tuple(reasons)


def reasons_against_auto(problem: Problem) -> tuple[str, ...]:
    return ()


def folds_norms(dtype: torch.dtype) -> bool:
    return False


def workspace_bytes(problem: Problem) -> int:
    return _cpu.workspace_bytes(
        instruction_set(),
        _name(problem.dtype),
        _product(problem.dtype),
        problem.n,
        problem.m,
        problem.d,
        torch.get_num_threads(),
    )


def forward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    diag_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    row_lse, col_lse, positive = (torch.empty(t.shape[0], dtype=torch.float64) for t in (x, y, x))
    _cpu.forward(
        instruction_set(),
        _block(x, y, scale, bias, diag_offset),
        row_lse.data_ptr(),
        col_lse.data_ptr(),
        positive.data_ptr(),
        torch.get_num_threads(),
    )
    return row_lse, col_lse, positive


def backward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    bias: Tensor,  # []
    row_lse: Tensor,  # [n]
    col_lse: Tensor,  # [m]
    row_weight: Tensor,  # [n]
    col_weight: Tensor,  # [m]
    positive_weight: Tensor,  # [n]
    diag_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    row_lse, col_lse, row_weight, col_weight, positive_weight = (
        t.contiguous() for t in (row_lse, col_lse, row_weight, col_weight, positive_weight)
    )
    dx, dy = x.new_empty(x.shape), y.new_empty(y.shape)
    dscale = _cpu.backward(
        instruction_set(),
        _block(x, y, scale, bias, diag_offset),
        row_lse.data_ptr(),
        row_weight.data_ptr(),
        col_lse.data_ptr(),
        col_weight.data_ptr(),
        positive_weight.data_ptr(),
        dx.data_ptr(),
        dy.data_ptr(),
        torch.get_num_threads(),
    )
    return dx, dy, scale.new_full((), dscale)


def symmetric_cross_entropy(row_lse: Tensor, col_lse: Tensor, positive: Tensor) -> Tensor:  # [n], [m], [n] -> []
    loss = _cpu.symmetric_cross_entropy(row_lse.data_ptr(), col_lse.data_ptr(), positive.data_ptr(), positive.shape[0])
    return row_lse.new_full((), loss)


def symmetric_cross_entropy_weights(
    row_lse: Tensor,  # [n]
    col_lse: Tensor,  # [m]
    positive: Tensor,  # [n]
    gradient: Tensor,  # []
) -> tuple[Tensor, Tensor, Tensor]:  # [n], [m], [n]
    weights = torch.empty_like(row_lse), torch.empty_like(col_lse), torch.empty_like(positive)
    _cpu.symmetric_cross_entropy_weights(
        row_lse.data_ptr(),
        col_lse.data_ptr(),
        positive.data_ptr(),
        row_lse.shape[0],
        col_lse.shape[0],
        gradient.item(),
        *(weight.data_ptr() for weight in weights),
    )
    return weights


def _block(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, diag_offset: int) -> _cpu.Block:
    n, d = x.shape
    x_row_stride, x_col_stride = x.stride()
    y_row_stride, y_col_stride = y.stride()
    return _cpu.Block(
        dtype=_name(x.dtype),
        product=_product(x.dtype),
        n=n,
        m=y.shape[0],
        d=d,
        x=x.data_ptr(),
        x_row_stride=x_row_stride,
        x_col_stride=x_col_stride,
        y=y.data_ptr(),
        y_row_stride=y_row_stride,
        y_col_stride=y_col_stride,
        scale=scale.item(),
        bias=bias.item(),
        diag_offset=diag_offset,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _product(dtype: torch.dtype) -> str:
    """How features may be multiplied; for float32 it is what torch.set_float32_matmul_precision says.

    The kernels know which of the kinds pay on the instruction set in use, and take a more exact one where they do not.
    """
    if dtype == torch.bfloat16:
        return "bfloat16"
    if dtype == torch.float32:
        return {"highest": "exact", "high": "bfloat16x3", "medium": "bfloat16"}[torch.get_float32_matmul_precision()]
    return "exact"
