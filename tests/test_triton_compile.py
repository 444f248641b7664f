"""Every shipped Triton configuration compiles for its GPU, which need not be there (design.md section 8)."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import compile_report
from benchmarks.compile_report import Case
from clipfast.backends import triton
from clipfast.tuning import Config

SM_90 = Config("statistics", "sm_90", 2, 128, 128, 64, 8, 3)


def compiled(architecture: str, *plain: str) -> None:
    """In a process of its own: this one interprets kernels, and does not compile them."""
    command = [sys.executable, "-m", "benchmarks", "compile-report", *plain, "--architecture", architecture]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(f"{architecture} ") == len(compile_report.cases([architecture], bool(plain)))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("architecture", compile_report.DEVICES)
def test_every_configuration_may_ship(architecture: str) -> None:
    compiled(architecture, "--plain")


@pytest.mark.timeout(1800)
@pytest.mark.skipif(triton._triton_version() < (3, 9), reason="the family's shapes are those of Triton 3.9")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_configuration_of_the_family_may_ship() -> None:
    """On one architecture: the others take a quarter of an hour, by `python -m benchmarks compile-report`."""
    compiled("sm_90")


@pytest.mark.parametrize(
    ("stack", "shared", "instructions", "fault"),
    [
        (16, 227 << 10, 4, ""),
        (24, 1 << 10, 4, "a stack of 24 bytes"),
        (0, 228 << 10, 4, "233472 bytes of shared memory, of 232448"),
        (0, 1 << 10, 0, "no wgmma.mma_async"),
    ],
)
def test_what_may_not_ship(stack: int, shared: int, instructions: int, fault: str) -> None:
    assert compile_report.fault(Case(SM_90, torch.bfloat16, "ieee"), stack, shared, instructions) == fault


def test_real_float32_needs_no_matrix_instruction() -> None:
    assert compile_report.fault(Case(SM_90, torch.float32, "ieee"), 0, 1 << 10, 0) == ""
    assert compile_report.fault(Case(SM_90, torch.float32, "tf32"), 0, 1 << 10, 0) == "no wgmma.mma_async"
