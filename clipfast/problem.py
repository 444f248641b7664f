"""What a backend is asked to compute: its size and place, its dtypes, where its positives are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MIN_NORM = 1e-12  # of a row that is normalized; the floor of torch.nn.functional.normalize

HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF_DTYPES, torch.float64)

NEEDS = (IDS, NORMS, RANKS, SYMMETRIC, SIGMOID, DISTILLATION) = (
    "ids", "norms", "ranks", "symmetric", "sigmoid", "distillation"
)  # fmt: skip


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every sum, statistic and logit: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients that wait for their upstream gradient: float16 has no range for a thing over n."""
    return torch.float32 if dtype == torch.float16 else dtype


def statistics_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the O(n) statistics between the passes: float64, where the device has it.

    A logsumexp near 100 that is rounded to float32 would put a relative error of 4e-6 on every probability of its row.
    """
    return torch.float32 if device.type == "mps" else torch.float64


class Problem(NamedTuple):
    """One block of logits: x [n, d] against y [m, d], both of `dtype` on `device`, and what is wanted beyond softmaxes.

    `needs` holds some of NEEDS: "ids", "norms" (of rows that a block has factors for), "ranks" (metrics), "symmetric"
    (the loss and its gradients in one pass), "sigmoid" (SigLIP), "distillation".
    """

    n: int
    m: int
    d: int
    dtype: torch.dtype
    device: torch.device
    needs: frozenset[str] = frozenset()

    @property
    def input_bytes(self) -> int:
        return (self.n + self.m) * self.d * self.dtype.itemsize


def positive_rows(n: int, m: int, diag_offset: int) -> tuple[int, int]:
    """The range of rows whose positive, in column `row + diag_offset`, lies inside an [n, m] block."""
    first = max(0, -diag_offset)
    return first, max(first, min(n, m - diag_offset))


def round_statistics(lse: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A logsumexp in `dtype` and a weight that makes up for the rounding.

    weight' exp(L - lse') = weight exp(L - lse) up to one rounding of weight'. Where the weight is 0, lse' = inf makes
    every exponential 0, so that an infinite logit in a column that the loss does not use does no harm.
    """
    unused = weight == 0
    rounded = lse.to(dtype)
    correction = rounded - lse
    # Beyond any rounding of a meaningful logit it is float64's own rounding of a huge one.
    correction = torch.where(correction.abs() > 64, 0, correction)
    return torch.where(unused, torch.inf, rounded), torch.where(unused, 0, weight * correction.exp()).to(dtype)
