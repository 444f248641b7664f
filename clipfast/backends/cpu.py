"""The compiled C++ kernels (csrc/) on CPU tensors. Pointers and strides go in, so torch is no build requirement."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from clipfast.block import Block, Gradients, Matches, Statistics, Weights
from clipfast.problem import Problem

try:
    from clipfast import _cpu

    _MISSING = ""
    _INSTRUCTION_SETS = dict(_cpu.instruction_sets())
except ImportError as error:
    _INSTRUCTION_SETS = {}
    _MISSING = (
        f"the compiled extension clipfast._cpu is missing ({error}); clipfast was imported from "
        f"{Path(__file__).parents[1]}: reinstall it with a C++17 compiler on the machine (pip install . , or "
        "pip install -e . to import from the source tree)"
    )

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
    reasons += [f"has no {need} yet" for need in sorted(problem.needs)]
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


def forward(block: Block, matches: Matches | None = None) -> Statistics:
    row_lse, col_lse, positive = (
        torch.empty(size, dtype=torch.float64, device="cpu") for size in (block.n, block.m, block.n)
    )
    _cpu.forward(
        instruction_set(),
        _block(block),
        row_lse.data_ptr(),
        col_lse.data_ptr(),
        positive.data_ptr(),
        torch.get_num_threads(),
    )
    return Statistics(row_lse, col_lse, positive)


def backward(block: Block, weights: Weights, dtype: torch.dtype) -> Gradients:
    row_lse, row_weight, col_lse, col_weight, positive_weight = (t.contiguous() for t in weights[:5])
    dx, dy = block.x.new_empty(block.x.shape), block.y.new_empty(block.y.shape)
    dscale = _cpu.backward(
        instruction_set(),
        _block(block),
        row_lse.data_ptr(),
        row_weight.data_ptr(),
        col_lse.data_ptr(),
        col_weight.data_ptr(),
        positive_weight.data_ptr(),
        dx.data_ptr(),
        dy.data_ptr(),
        torch.get_num_threads(),
    )
    return Gradients(dx.to(dtype), dy.to(dtype), block.scale.new_full((), dscale))


def symmetric_cross_entropy(statistics: Statistics) -> Tensor:  # []
    row_lse, col_lse, positive, *_ = statistics
    loss = _cpu.symmetric_cross_entropy(row_lse.data_ptr(), col_lse.data_ptr(), positive.data_ptr(), positive.shape[0])
    return row_lse.new_full((), loss)


def symmetric_cross_entropy_weights(statistics: Statistics, gradient: Tensor) -> Weights:
    row_lse, col_lse, positive, *_ = statistics
    row_weight, col_weight, positive_weight = (torch.empty_like(t) for t in (row_lse, col_lse, positive))
    _cpu.symmetric_cross_entropy_weights(
        row_lse.data_ptr(),
        col_lse.data_ptr(),
        positive.data_ptr(),
        row_lse.shape[0],
        col_lse.shape[0],
        gradient.item(),
        row_weight.data_ptr(),
        col_weight.data_ptr(),
        positive_weight.data_ptr(),
    )
    return Weights(row_lse, row_weight, col_lse, col_weight, positive_weight)


def _block(block: Block) -> _cpu.Block:
    x_row_stride, x_col_stride = block.x.stride()
    y_row_stride, y_col_stride = block.y.stride()
    return _cpu.Block(
        dtype=_name(block.x.dtype),
        product=_product(block.x.dtype),
        n=block.n,
        m=block.m,
        d=block.d,
        x=block.x.data_ptr(),
        x_row_stride=x_row_stride,
        x_col_stride=x_col_stride,
        y=block.y.data_ptr(),
        y_row_stride=y_row_stride,
        y_col_stride=y_col_stride,
        scale=block.scale.item(),
        bias=block.bias.item(),
        diag_offset=block.diag_offset,
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
