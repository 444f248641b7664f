"""A quick look at the speed of a few fixed cases: `pytest benchmarks/test_speed.py`. Nothing is asserted on a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.baselines import Candidate, candidates
from benchmarks.cases import Case, inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = (Case("float32", 64), Case("float32", 1024), Case("bfloat16", 1024))
CHOSEN = [c for c in candidates(DEVICE) if c.name.startswith("clipfast") or c.name == "open_clip formula"]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("candidate", CHOSEN, ids=lambda candidate: candidate.name)
def test_forward_and_backward(benchmark: Any, candidate: Candidate, case: Case) -> None:
    sets, loss = inputs(case, DEVICE), candidate.loss()

    def step() -> None:
        torch.autograd.backward(loss(*next(sets)))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
