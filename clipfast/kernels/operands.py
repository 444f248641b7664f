"""The host side's smallest pieces: how the kernels take features, and on which device they are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast import tuning
from clipfast.block import Block
from clipfast.tuning import Config

VECTOR_BLOCK = 256  # rows per program of the O(n) kernels

# Of every launch: multiply and add in one instruction, which Triton 3.10 leaves off where nobody asks for it.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Operands:
    """x and y as the product takes them."""

    x: Tensor  # [n, d]
    y: Tensor  # [m, d]
    precision: str

    @classmethod
    def of(cls, x: Tensor, y: Tensor, precision: str | None) -> Operands:
        if x.dtype == torch.float32:
            precision = precision or tuning.float32_product(tuning.describe(x.device))
            if precision == "bf16":
                return cls(x.bfloat16(), y.bfloat16(), "ieee")
        elif tuning.describe(x.device).interpreted:
            precision = "widened"
        return cls(x, y, precision or "ieee")

    @property
    def d(self) -> int:
        return self.x.shape[1]

    @property
    def strides(self) -> tuple[int, ...]:
        return *self.x.stride(), *self.y.stride()

    def choose(self, kernel: str, *others: Operands) -> Config:
        """A configuration for these operands, and for others that the kernel multiplies in the same tiles."""
        operands = self, *others
        aligned_rows = all(_has_aligned_rows(t) for both in operands for t in (both.x, both.y))
        itemsize, d = (max(of) for of in zip(*((both.x.dtype.itemsize, both.d) for both in operands), strict=True))
        return tuning.choose(kernel, tuning.describe(self.x.device), itemsize, d, aligned_rows).config

    def tiles(self, config: Config) -> tuple[Any, Any]:
        if not config.tma:
            return self.x, self.y
        return tuple(
            TensorDescriptor(t, list(t.shape), list(t.stride()), [block, config.block_d])
            for t, block in ((self.x, config.block_m), (self.y, config.block_n))
        )

    def options(self, config: Config) -> dict[str, Any]:
        return {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "EVEN_D": self.d % config.block_d == 0,
            "PRECISION": self.precision,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **FUSED,
        }

    def swapped(self) -> Operands:
        return Operands(self.y, self.x, self.precision)


def h_tile(h: Tensor, config: Config) -> TensorDescriptor | None:  # [rows, cols], each row aligned
    """How the kernels store half a tile of H where the configuration has tensor descriptors."""
    return (
        TensorDescriptor(h, list(h.shape), list(h.stride()), [config.block_m, config.block_n // 2])
        if config.tma
        else None
    )


def nearest_offset(block: Block) -> int:
    """The diagonal's offset as 32 bits hold it: beyond the block all are alike."""
    return min(max(block.diag_offset, -block.n), block.m)


def pair(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor] | None:  # [n], [m]
    """Two vectors as a kernel takes them; None if there are none."""
    return None if first is None or second is None else (first.contiguous(), second.contiguous())


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'.

    NumPy, which the interpreter computes with, would warn of infinities that a GPU takes as they come.
    """
    return torch.cuda.device(device) if device.type == "cuda" else numpy.errstate(all="ignore")


def launches(kernel: Any, programs: int, options: dict[str, Any]) -> Callable[..., None]:
    """Launches of a kernel that differ only in where tensors lie and in numbers that it is not specialized on.

    All tensors must be aligned alike. Only the first launch looks the compiled kernel up by its arguments, which takes
    Triton longer than to launch it.
    """
    constants = [options[name] for name in kernel.arg_names if name in options]
    compiled = None

    def launch(*arguments: Any) -> None:
        nonlocal compiled
        if isinstance(compiled, CompiledKernel):  # the interpreter has none
            compiled[programs, 1, 1](*arguments, *constants)
        else:
            compiled = kernel[(programs,)](*arguments, **options)

    return launch


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def _has_aligned_rows(t: Tensor) -> bool:
    """Whether t's rows are contiguous, and each aligned to 16 bytes, as a tensor descriptor needs them."""
    return t.stride(1) == 1 and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 and t.stride(0) > 0
