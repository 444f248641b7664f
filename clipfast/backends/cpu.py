"""The compiled C++ kernels (csrc/) on CPU tensors, which they read by DLPack, so torch is no build requirement."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.block import (
    Block,
    DistillationPass,
    Gradients,
    Matches,
    SigmoidPass,
    Statistics,
    Weights,
    gradient_dtypes,
)
from clipfast.problem import DISTILLATION, NORMS, RANKS, SIGMOID, SYMMETRIC, Problem, accumulation_dtype
from clipfast.products import float32_precision


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
    # Python's own, and torch's, take some functions, each of which is to be found in memory.
    environment, item = _cpu.getenv, _cpu.item
    _INSTRUCTION_SETS = dict(_cpu.instruction_sets())
except ImportError as error:
    _INSTRUCTION_SETS = {}
    _MISSING = _why_missing(error)
    item = Tensor.item

    def environment(*names: str) -> tuple[str | None, ...]:
        return tuple(map(os.environ.get, names))


_BEST = next((name for name, here in _INSTRUCTION_SETS.items() if here), "")

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
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if not name:
        return _BEST
    available = [name for name, here in _INSTRUCTION_SETS.items() if here]
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
    return True


def workspace_bytes(problem: Problem) -> int:
    instruction_set()
    needs = {need: need in problem.needs for need in (NORMS, RANKS, SYMMETRIC, SIGMOID, DISTILLATION)}
    name, sizes = str(problem.dtype).removeprefix("torch."), (problem.n, problem.m, problem.d)
    return _cpu.workspace_bytes(name, _precision(problem.dtype), *sizes, **needs, threads=torch.get_num_threads())


def kept_size(n: int, m: int) -> int:
    """How many numbers of the accumulation dtype the kept logits of an [n, m] block take."""
    return int(_cpu.KEPT_HEAD) + n * (m + int(_cpu.KEPT_PADDING))


def forward(block: Block, matches: Matches | None = None) -> Statistics:
    n, m = block.n, block.m
    row_above = col_above = None
    if matches is not None:
        matches = Matches(*(t.contiguous() for t in matches))
        row_above, col_above = _vector(n, torch.int32), _vector(m, torch.int32)
    kept = _vector(kept_size(n, m), block.scale.dtype) if block.keep else None
    statistics = Statistics(_vector(n), _vector(m), _vector(n), row_above, col_above, kept)
    _run(_cpu.forward, block, matches, statistics)
    return statistics


def matches(block: Block) -> Matches:
    best = Matches(_vector(block.n), _vector(block.m))
    _run(_cpu.matches, block, best)
    return best


def backward(block: Block, weights: Weights, dtype: torch.dtype) -> Gradients:
    gradients = _empty_gradients(block, dtype)
    _run(_cpu.backward, block, _contiguous(weights), gradients)
    return gradients


def sigmoid(block: Block, unit: float, gradients: bool, dtype: torch.dtype) -> SigmoidPass:
    row_loss = _vector(block.n)
    formed = _empty_gradients(block, dtype) if gradients else None
    dbias = _run(_cpu.sigmoid, block, unit, row_loss, formed)
    return SigmoidPass(row_loss, formed, row_loss.new_full((), dbias) if formed else None)


def distillation(
    block: Block, weights: Weights, teacher: Block, teacher_weights: Weights, gradients: bool, dtype: torch.dtype
) -> DistillationPass:
    # The kernels form both logits alike.
    common = torch.promote_types(block.x.dtype, teacher.x.dtype)
    block, teacher = (b._replace(x=b.x.to(common), y=b.y.to(common)) for b in (block, teacher))
    weights, teacher_weights = _contiguous(weights), _contiguous(teacher_weights)
    row_cross, col_cross = _vector(block.n), _vector(block.m)
    formed = _empty_gradients(block, dtype) if gradients else None
    _run(_cpu.distillation, block, weights, teacher, teacher_weights, row_cross, col_cross, formed)
    if formed:
        formed = Gradients(formed.dx.to(dtype), formed.dy.to(dtype), formed.dscale)
    return DistillationPass(row_cross, col_cross, formed)


def symmetric(block: Block, dtype: torch.dtype) -> tuple[Tensor, Gradients, Tensor]:
    gradients = _empty_gradients(block, dtype)
    loss, dbias = torch.empty_like(block.scale), torch.empty_like(block.scale)
    _run(_cpu.symmetric, block, loss, gradients, dbias)
    return loss, gradients, dbias


def symmetric_cross_entropy(statistics: Statistics, dtype: torch.dtype) -> Tensor:  # []
    loss = torch.empty((), dtype=dtype, device="cpu")
    _cpu.symmetric_cross_entropy(statistics, len(statistics.positive), loss)
    return loss


def symmetric_gradients(
    block: Block, statistics: Statistics, gradient: Tensor, dtype: torch.dtype
) -> tuple[Gradients, Tensor]:
    gradients, dbias = _empty_gradients(block, dtype), torch.empty_like(block.scale)
    _run(_cpu.symmetric_gradients, block, statistics, item(gradient), gradients, dbias)
    return gradients, dbias


def _run(run: Callable[..., Any], block: Block, *arguments: Any) -> Any:
    """One of the kernels' passes over the block."""
    if block.row_ids is not None and block.col_ids is not None:
        # They take ids side by side, and these may have been cut out of others.
        block = block._replace(row_ids=block.row_ids.contiguous(), col_ids=block.col_ids.contiguous())
    return run(block, _precision(block.x.dtype), torch.get_num_threads(), *arguments)


def _precision(dtype: torch.dtype) -> str:
    return float32_precision("cpu") if dtype == torch.float32 else ""


def _empty_gradients(block: Block, dtype: torch.dtype) -> Gradients:
    x, y = block.x, block.y
    if dtype == x.dtype and x.is_contiguous() and y.is_contiguous():  # the common case, and the shorter call
        return Gradients(torch.empty_like(x), torch.empty_like(y), torch.empty_like(block.scale))
    if dtype not in gradient_dtypes(x.dtype):
        dtype = accumulation_dtype(x.dtype)
    dx, dy = (torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in (x, y))
    return Gradients(dx, dy, torch.empty_like(block.scale))


def _vector(size: int, dtype: torch.dtype = torch.float64) -> Tensor:  # [size]
    return torch.empty(size, dtype=dtype, device="cpu")


def _contiguous(weights: Weights) -> Weights:
    return Weights(*(None if t is None else t.contiguous() for t in weights))  # type: ignore[arg-type]
