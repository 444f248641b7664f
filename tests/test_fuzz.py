"""A few of the random cases that `make fuzz` runs by the thousand (tests/fuzz.py), and one that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz
import pytest
from broken_worker import broken_worker

import clipfast


@pytest.mark.parametrize("first", range(0, 300, 50))
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_random_cases(first: int) -> None:
    for seed in range(first, first + 50):
        try:
            fuzz.run(seed)
        except Exception as error:  # noqa: PERF203
            raise AssertionError(fuzz.reproduction(seed)) from error


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 41 is a batch of three with label smoothing and ids, in float64."""
    ours = fuzz.ours

    def wrong(*given: Any) -> Any:
        loss, gradients, metrics = ours(*given)
        return loss, {name: gradient + 1e-3 for name, gradient in gradients.items()}, metrics

    monkeypatch.setattr(fuzz, "ours", wrong)
    with pytest.raises(AssertionError, match=r"dx: .*, exactly .*, bound"):
        fuzz.run(41)


def test_the_program_reports_and_ends() -> None:
    program = [sys.executable, str(Path(fuzz.__file__)), "--cases", "3", "--seed", "7"]
    path = os.pathsep.join([str(Path(clipfast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    output = subprocess.run(program, capture_output=True, text=True, check=True, env=environment).stdout
    assert output == "3 cases from seed 7: none wrong\n"


def test_a_process_that_dies_or_hangs_is_followed_by_another() -> None:
    found = [(seed, why) for seed, why in fuzz.faults(range(6), broken_worker, seconds=5) if why]
    assert found == [(1, "the process died with exit code 11"), (3, "hangs for 5 s")]
