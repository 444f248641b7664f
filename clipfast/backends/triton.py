"""Triton kernels on NVIDIA and AMD GPUs; with TRITON_INTERPRET=1 the same kernels on CPU tensors, slowly, for tests.

triton is imported when the first problem is computed, not before.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from clipfast import tuning
from clipfast.block import Block, DistillationPass, Gradients, Matches, SigmoidPass, Statistics, Weights
from clipfast.problem import DISTILLATION, IDS, SIGMOID, Problem
from clipfast.products import float32_precision

NAME = "triton"

INTERPRETER_VARIABLE = "TRITON_INTERPRET"
MIN_TRITON = (3, 5)
MIN_CAPABILITY = (8, 0)
ROCM_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950")
MAX_ROWS = 2**31 - 1024  # row numbers are 32-bit in the kernels, up to the end of the last tile; offsets are 64-bit


def unsupported_reasons(problem: Problem) -> tuple[str, ...]:
    reasons = list(_missing(problem.device))
    if problem.dtype == torch.float64:
        reasons.append("float64 goes to the torch backend: these kernels accumulate in float32")
    for name, rows in (("n", problem.n), ("m", problem.m)):
        if rows > MAX_ROWS:
            reasons.append(f"{name} = {rows} is more than the {MAX_ROWS} rows that its kernels can number")
    return tuple(reasons)


def reasons_against_auto(problem: Problem) -> tuple[str, ...]:
    return ("interprets its kernels, slowly, because TRITON_INTERPRET is set",) if _interpreted() else ()


def folds_norms(dtype: torch.dtype) -> bool:
    # G is stored with the factors in it, and float16 has no range for them.
    return dtype != torch.float16


def workspace_bytes(problem: Problem) -> int:
    operand_bytes = _operand_bytes(problem)
    passes = [_statistics_bytes(problem, kernel) for kernel in ("statistics", "ranks", "kept")]
    vectors = 4 * (6 if IDS in problem.needs else 4) * (problem.n + problem.m)
    passes.append(vectors + _share_bytes(problem, "gradient") + _chunk_bytes(problem, "gradient"))
    if SIGMOID in problem.needs:
        passes.append(_chunk_bytes(problem, "sigmoid"))
    if DISTILLATION in problem.needs:
        passes.append(2 * (vectors + _share_bytes(problem, "distillation")) + _chunk_bytes(problem, "distillation"))
    rounded = operand_bytes < problem.dtype.itemsize
    return max(passes) + (operand_bytes * (problem.n + problem.m) * problem.d if rounded else 0)


def _operand_bytes(problem: Problem) -> int:
    """Of an element of what is multiplied."""
    rounded = tuning.float32_product(tuning.describe(problem.device)) == "bf16"
    return 2 if problem.dtype == torch.float32 and rounded else problem.dtype.itemsize


def _statistics_bytes(problem: Problem, kernel: str) -> int:
    n, m, device = problem.n, problem.m, tuning.describe(problem.device)
    config = tuning.choose(kernel, device, _operand_bytes(problem), problem.d).config
    programs_m, programs_n = tuning.program_grid(n, m, config, device.processors)
    return 4 * (4 * programs_n * n + 4 * programs_m * m + n + programs_m * programs_n * config.tile_scratch)


def _share_bytes(problem: Problem, kernel: str) -> int:
    """Both sides' shares, and their blocks' shifts."""
    n, m = problem.n, problem.m
    config = tuning.choose(kernel, tuning.describe(problem.device), _operand_bytes(problem), problem.d).config
    return 4 * (n + m) + 8 * (-(-n // config.block_m) + -(-m // config.block_n)) + 4


def _chunk_bytes(problem: Problem, kernel: str) -> int:
    """H of a chunk, the totals of its products, and what the kernel keeps beside them."""
    n, m, device, itemsize = problem.n, problem.m, tuning.describe(problem.device), _operand_bytes(problem)
    config = tuning.choose(kernel, device, itemsize, problem.d).config
    rows, cols = tuning.chunk_shape(n, m, itemsize, tuning.WORKSPACE_BYTES)
    programs = tuning.persistent_programs(rows, cols, config, device.processors)
    totals = 4 * (rows + m) * problem.d if problem.dtype != torch.float32 else 0
    partial = (4 * -(-cols // config.block_n) + 16) * rows if kernel in ("sigmoid", "distillation") else 0
    if kernel == "distillation":
        programs_m, programs_n = tuning.program_grid(rows, cols, config, device.processors)
        programs = programs_m * programs_n
        partial += (4 * programs_m + 16) * cols
    return rows * tuning.padded(cols) * itemsize + totals + programs * (16 + 4 * config.tile_scratch) + partial


def kept_size(n: int, m: int) -> int:
    """How many numbers of the accumulation dtype the kept products of an [n, m] block take."""
    return tuning.kept_size(n, m)


def keeping(dtype: torch.dtype) -> tuple[bool, str]:
    """Whether logits are kept where nobody asks for it, and why.

    By the figures of an H100: 8 bytes of traffic per logit, at 3.35 TB/s, against 2 d operations, at 800 TFLOP/s in
    halves, 400 in TF32 and 60 in float32.
    """
    exact = dtype == torch.float32 and (_interpreted() or float32_precision("cuda") == "highest")
    longer = "longer" if exact else "hardly longer"
    return exact, f"to form a logit takes {longer} than its 8 bytes of traffic, by arithmetic that nobody has measured"


def forward(block: Block, matches: Matches | None = None) -> Statistics:
    from clipfast.kernels import launch

    return launch.forward(block, matches)


def backward(block: Block, weights: Weights, dtype: torch.dtype) -> Gradients:
    from clipfast.kernels import launch

    return launch.backward(block, weights, dtype)


def matches(block: Block) -> Matches:
    from clipfast.kernels import launch

    return launch.matches(block)


def project(features: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:  # [n, d], [n]
    from clipfast.kernels import projection

    return projection.project(features, weight, bias)


def sigmoid(block: Block, unit: float, gradients: bool, dtype: torch.dtype) -> SigmoidPass:
    from clipfast.kernels import launch

    return launch.sigmoid(block, unit, gradients, dtype)


def distillation(
    block: Block, weights: Weights, teacher: Block, teacher_weights: Weights, gradients: bool, dtype: torch.dtype
) -> DistillationPass:
    from clipfast.kernels import launch

    return launch.distillation(block, weights, teacher, teacher_weights, gradients, dtype)


def _missing(device: torch.device) -> tuple[str, ...]:
    """Why no problem at all runs on this device."""
    return _reasons_once(device, _interpreted())


@functools.cache
def _reasons_once(device: torch.device, interpreted: bool) -> tuple[str, ...]:
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed: pip install clipfast[triton]",)
    reasons = []
    version = tuning.triton_version() or MIN_TRITON
    if version < MIN_TRITON:
        reasons.append(f"triton {_dotted(version)} is too old: {_dotted(MIN_TRITON)} or newer is needed")
    if interpreted:
        if device.type != "cpu":
            reasons.append(f"TRITON_INTERPRET is set, which takes CPU tensors only; the inputs are on {device}")
    elif not torch.cuda.is_available():
        reasons.append("no CUDA or ROCm GPU is available to torch (TRITON_INTERPRET=1 runs the kernels on CPU tensors)")
    elif device.type != "cuda":
        reasons.append(f"runs on GPU tensors only, the inputs are on {device}")
    else:
        reasons += _device_reasons(device)
    return tuple(reasons)


# torch.compile can trace neither. What is installed does not change, and what is kept changes no result. This is what
# torch.compiler.assume_constant_result does, which would import the compiler, 900 modules.
_missing._dynamo_marked_constant = keeping._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _device_reasons(device: torch.device) -> tuple[str, ...]:
    if torch.version.hip:
        architecture = _rocm_architecture(device)
        if architecture not in ROCM_ARCHITECTURES:
            return (f"{device} is {architecture}; accepted are {', '.join(ROCM_ARCHITECTURES)}",)
    else:
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return (f"{device} has compute capability {_dotted(capability)}; {_dotted(MIN_CAPABILITY)} is needed",)
    return ()


def _rocm_architecture(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]


def _interpreted() -> bool:
    return os.environ.get(INTERPRETER_VARIABLE, "0").lower() in ("1", "true", "yes", "on")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
