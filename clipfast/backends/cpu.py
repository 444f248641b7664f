"""The compiled C++ kernels (csrc/) on CPU tensors. Pointers and strides go in, so torch is no build requirement."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.block import (
    IGNORE,
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
    getenv = _cpu.getenv  # Python's own takes some functions, each of which is to be found in memory
    _INSTRUCTION_SETS = dict(_cpu.instruction_sets())
except ImportError as error:
    getenv = os.environ.get
    _INSTRUCTION_SETS = {}
    _MISSING = _why_missing(error)

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
    factors = int(NORMS in problem.needs)  # an address that is not read
    x, y = (_cpu.Matrix(0, rows, problem.d, problem.d, 1, factors) for rows in (problem.n, problem.m))
    block = _cpu.Block(dtype=_name(problem.dtype), product=_product(problem.dtype), x=x, y=y)
    return _cpu.workspace_bytes(
        instruction_set(),
        block,
        ranks=RANKS in problem.needs,
        symmetric=SYMMETRIC in problem.needs,
        sigmoid=SIGMOID in problem.needs,
        distillation=DISTILLATION in problem.needs,
        threads=torch.get_num_threads(),
    )


def kept_size(n: int, m: int) -> int:
    """How many numbers of the accumulation dtype the kept logits of an [n, m] block take."""
    return int(_cpu.KEPT_HEAD) + n * (m + int(_cpu.KEPT_PADDING))


def forward(block: Block, matches: Matches | None = None) -> Statistics:
    n, m = block.n, block.m
    row_lse, col_lse, positive = _vector(n), _vector(m), _vector(n)
    row_above = col_above = None
    thresholds = _cpu.Matches()
    if matches is not None:
        rows, cols = (t.contiguous() for t in matches)
        row_above, col_above = _vector(n, torch.int32), _vector(m, torch.int32)
        thresholds = _cpu.Matches(rows.data_ptr(), cols.data_ptr())
    kept = _vector(kept_size(n, m), block.scale.dtype) if block.keep else None
    statistics = Statistics(row_lse, col_lse, positive, row_above, col_above, kept)
    out = _cpu.Statistics(*_addresses(statistics))
    _run(_cpu.forward, block, thresholds, out)
    return statistics


def matches(block: Block) -> Matches:
    best = Matches(_vector(block.n), _vector(block.m))
    _run(_cpu.matches, block, _cpu.Matches(*_addresses(best)))
    return best


def backward(block: Block, weights: Weights, dtype: torch.dtype) -> Gradients:
    weights = _contiguous(weights)
    gradients = _empty_gradients(block, dtype)
    _run(_cpu.backward, block, _cpu.Weights(*_addresses(weights)), _outputs(gradients))
    return gradients


def sigmoid(block: Block, unit: float, gradients: bool, dtype: torch.dtype) -> SigmoidPass:
    row_loss = _vector(block.n)
    formed = _empty_gradients(block, dtype) if gradients else None
    dbias = _run(_cpu.sigmoid, block, unit, row_loss.data_ptr(), _outputs(formed) if formed else None)
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
    _run(
        _cpu.distillation,
        block,
        _cpu.Weights(*_addresses(weights)),
        _block(teacher),
        _cpu.Weights(*_addresses(teacher_weights)),
        _cpu.Crosses(row_cross.data_ptr(), col_cross.data_ptr()),
        _outputs(formed) if formed else None,
    )
    if formed:
        formed = Gradients(formed.dx.to(dtype), formed.dy.to(dtype), formed.dscale)
    return DistillationPass(row_cross, col_cross, formed)


def symmetric(block: Block, dtype: torch.dtype) -> tuple[Tensor, Gradients, Tensor]:
    gradients = _empty_gradients(block, dtype)
    loss, dbias = torch.empty_like(block.scale), torch.empty_like(block.scale)
    _run(_cpu.symmetric, block, loss.data_ptr(), _outputs(gradients, dbias))
    return loss, gradients, dbias


def symmetric_cross_entropy(statistics: Statistics, dtype: torch.dtype) -> Tensor:  # []
    row_lse, col_lse, positive, *_ = statistics
    loss = torch.empty((), dtype=dtype, device="cpu")
    _cpu.symmetric_cross_entropy(
        row_lse.data_ptr(), col_lse.data_ptr(), positive.data_ptr(), positive.shape[0], loss.data_ptr(), _name(dtype)
    )
    return loss


def symmetric_gradients(
    block: Block, statistics: Statistics, gradient: Tensor, dtype: torch.dtype
) -> tuple[Gradients, Tensor]:
    gradients, dbias = _empty_gradients(block, dtype), torch.empty_like(block.scale)
    of_block = _cpu.Statistics(*_addresses(statistics))
    _run(_cpu.symmetric_gradients, block, of_block, gradient.item(), _outputs(gradients, dbias))
    return gradients, dbias


def _run(run: Callable[..., Any], block: Block, *arguments: Any) -> Any:
    """One of the kernels' passes over the block."""
    if block.row_ids is not None and block.col_ids is not None:
        # They take ids side by side, and these may have been cut out of others.
        block = block._replace(row_ids=block.row_ids.contiguous(), col_ids=block.col_ids.contiguous())
    return run(getenv(ENVIRONMENT_VARIABLE) or _BEST, _block(block), *arguments, torch.get_num_threads())


def _block(block: Block) -> _cpu.Block:
    """The block's addresses; it does not keep the tensors."""
    x, y, dtype = _matrix(block.x, block.x_factor), _matrix(block.y, block.y_factor), block.x.dtype
    scale, bias, row_ids, col_ids = _addresses((block.scale, block.bias, block.row_ids, block.col_ids))
    ignores = block.same_id == IGNORE
    # By position, which takes a third of the time.
    return _cpu.Block(_name(dtype), _product(dtype), x, y, scale, bias, block.diag_offset, row_ids, col_ids, ignores)


def _matrix(rows: Tensor, factors: Tensor | None) -> _cpu.Matrix:  # [n, d], [n]
    address = 0 if factors is None else factors.data_ptr()
    (count, d), (row_stride, col_stride) = rows.shape, rows.stride()
    return _cpu.Matrix(rows.data_ptr(), count, d, row_stride, col_stride, address)


def _empty_gradients(block: Block, dtype: torch.dtype) -> Gradients:
    if dtype not in gradient_dtypes(block.x.dtype):
        dtype = accumulation_dtype(block.x.dtype)
    dx, dy = (torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in (block.x, block.y))
    return Gradients(dx, dy, torch.empty_like(block.scale))


def _outputs(gradients: Gradients, dbias: Tensor | None = None) -> _cpu.Gradients:
    """Where the kernels put them."""
    dx, dy, dscale, by_bias = _addresses((*gradients, dbias))
    return _cpu.Gradients(dx, dy, _name(gradients.dx.dtype), dscale, by_bias)


def _vector(size: int, dtype: torch.dtype = torch.float64) -> Tensor:  # [size]
    return torch.empty(size, dtype=dtype, device="cpu")


def _contiguous(weights: Weights) -> Weights:
    return Weights(*(None if t is None else t.contiguous() for t in weights))  # type: ignore[arg-type]


def _addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


@functools.cache
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
