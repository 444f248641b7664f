"""What a backend is asked to compute, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF_DTYPES, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every sum, statistic and logit: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """One block of logits: x [n, d] against y [m, d], both of `dtype` on `device`."""

    n: int
    m: int
    d: int
    dtype: torch.dtype
    device: torch.device

    @property
    def input_bytes(self) -> int:
        return (self.n + self.m) * self.d * self.dtype.itemsize

    @property
    def saved_bytes(self) -> int:
        """Bytes that autograd keeps for the backward pass: x, y, scale, bias and the two logsumexps."""
        return self.input_bytes + (self.n + self.m + 2) * accumulation_dtype(self.dtype).itemsize


def positive_rows(n: int, m: int, diag_offset: int) -> tuple[int, int]:
    """The range of rows whose positive, in column `row + diag_offset`, lies inside an [n, m] block."""
    first = max(0, -diag_offset)
    return first, max(first, min(n, m - diag_offset))
