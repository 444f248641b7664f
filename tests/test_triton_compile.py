"""Every shipped Triton configuration compiles for its GPU, which need not be there (design.md section 8)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import compile_report
from benchmarks.compile_report import Case, Compiled
from clipfast import tuning
from clipfast.tuning import Config

ROOT = Path(__file__).parents[1]
# Where the family's are compiled as well, the plain kernels' are among them.
PLAIN = [name for name in compile_report.DEVICES if name != "sm_90" or tuning.triton_version() < (3, 9)]
SM_90 = Config("statistics", "sm_90", 2, 128, 128, 64, 8, 3)


def in_a_process(program: str) -> str:
    """What a program prints where kernels are compiled: this process interprets them."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def compiled(architecture: str, *plain: str) -> None:
    """In a process of its own: this one interprets kernels, and does not compile them."""
    command = [sys.executable, "-m", "benchmarks", "compile-report", *plain, "--architecture", architecture]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith(f"{architecture} ")]
    assert len(rows) == len(compile_report.cases([architecture], bool(plain)))
    if architecture != "gfx942":
        uncounted = [row for row in rows if row.split()[-2] == "-" and " ieee" not in row]
        # Without exponentials or products, by which the path is found.
        without = " matches | projection | gradient .* kept "
        assert not [row for row in uncounted if not re.search(without, row)], "no common path was found"
    if architecture == "sm_90":
        assert "of the tensor peak at 4 P" in done.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("architecture", PLAIN)
def test_every_configuration_may_ship(architecture: str) -> None:
    compiled(architecture, "--plain")


@pytest.mark.timeout(1800)
@pytest.mark.skipif(tuning.triton_version() < (3, 9), reason="the family's shapes are those of Triton 3.9")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_configuration_of_the_family_may_ship() -> None:
    """On one architecture: the others take a quarter of an hour, by `python -m benchmarks compile-report`."""
    compiled("sm_90")


@pytest.mark.timeout(900)
@pytest.mark.skipif(tuning.triton_version() >= (3, 9), reason="compiled with all others")
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", ["ranks", "sigmoid", "distillation"])
def test_the_family_may_ship_with_an_older_triton(kernel: str, architecture: str) -> None:
    """Also what takes the place of a first configuration that it spills; of either kind of float32, what holds most."""
    faults = in_a_process(
        "from benchmarks import compile_report as r\n"
        "if __name__ == '__main__':\n"
        f"    chosen = [c for c in r.cases(['{architecture}']) if c.config.kernel == '{kernel}']\n"
        "    most = [case for case in chosen if case.config.itemsize == 2 or case.d == r.WIDTHS[1]]\n"
        "    rows = [r.compile_case(case) for case in most if case.option != 'positive' or case.config.itemsize == 2]\n"
        "    print([str(row) for row in rows if row.fault])"
    )
    assert faults == "[]\n"


@pytest.mark.skipif(tuning.triton_version() < (3, 9), reason="the bars are for Triton 3.9")
def test_the_first_configurations_keep_their_bars() -> None:
    """Slots per logit, which no later change may lose unseen: more is a fault, with which no configuration may ship."""
    barred = [case for case in compile_report.cases(["sm_90"]) if case.bar]
    assert [(case.config.kernel, case.factors, case.bar) for case in barred] == [
        ("statistics", False, 9.5),
        ("statistics", True, 11.5),
        ("gradient", False, 9.5),
        ("gradient", True, 12.0),
        ("ranks", False, 17.5),
        ("ranks", True, 20.5),
        ("sigmoid", False, 15.5),
        ("sigmoid", True, 19.0),
        ("distillation", False, 24.0),
        ("distillation", True, 31.0),
    ]


@pytest.mark.skipif(tuning.triton_version() < (3, 9), reason="the bars are for Triton 3.9")
@pytest.mark.parametrize(
    ("slots", "fault"), [(9.5, ""), (9.51, "9.51 slots per logit, of 9.5"), (None, "no common path, of 9.5")]
)
def test_a_lost_bar_is_a_fault(slots: float | None, fault: str) -> None:
    case = next(case for case in compile_report.cases(["sm_90"], plain=True) if case.bar)
    assert Compiled(case, 128, 0, 1 << 10, 4, slots=slots).fault == fault
    assert Compiled(replace(case, d=101), 128, 0, 1 << 10, 4).fault == ""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_launch_asks_for_fused_products_and_sums() -> None:
    """Which Triton 3.10 leaves off otherwise: on either vendor's GPUs, where they are off where nobody asks."""
    done = in_a_process(
        "from unittest import mock; from triton.runtime.jit import JITFunction; from benchmarks import compile_report\n"
        "run, asked = JITFunction.run, []\n"
        "def noting(self, *a, **k): asked.append(k.get('enable_fp_fusion')); return run(self, *a, **k)\n"
        "first = {(c.config.architecture, c.config.kernel): c for c in compile_report.cases(['sm_80', 'gfx942'])}\n"
        "with mock.patch.object(JITFunction, 'run', noting):\n"
        "    kernels = [compile_report.compiled_kernel(case) for case in first.values()]\n"
        "print(all(asked), all(kernel.metadata.enable_fp_fusion for kernel in kernels))"
    )
    assert done == "True True\n"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_prediction_has_a_row_for_each_assumption() -> None:
    """At one d and one rate of L2; docs/hopper-model.md has them all."""
    done = in_a_process(
        "from benchmarks import prediction as p; p.WIDTHS, p.BANDWIDTHS = (512,), (64.0,); print(*p.rows())"
    )
    assert re.fullmatch(
        r"(\| (no|yes) \| 64 \| 512 \| [\d.]+ / [\d.]+ \| \d+% / \d+% \| \d+% \(\d+% to \d+%\) \|\s*){2}", done
    )


@pytest.mark.parametrize(
    ("stack", "shared", "instructions", "spills", "fault"),
    [
        (16, 227 << 10, 4, None, ""),
        (24, 1 << 10, 4, None, "a stack of 24 bytes"),
        (96, 1 << 10, 4, 0, ""),
        (96, 1 << 10, 4, 1, "a stack of 96 bytes"),
        (104, 1 << 10, 4, 0, "a stack of 104 bytes"),
        (0, 228 << 10, 4, None, "233472 bytes of shared memory, of 232448"),
        (0, 1 << 10, 0, None, "no wgmma.mma_async"),
    ],
)
def test_what_may_not_ship(stack: int, shared: int, instructions: int, spills: int | None, fault: str) -> None:
    case = Case(SM_90, torch.bfloat16, "ieee")
    assert Compiled(case, 128, stack, shared, instructions, spills=spills).fault == fault


def test_real_float32_needs_no_matrix_instruction() -> None:
    assert Compiled(Case(SM_90, torch.float32, "ieee"), 128, 0, 1 << 10, 0).fault == ""
    assert Compiled(Case(SM_90, torch.float32, "tf32"), 128, 0, 1 << 10, 0).fault == "no wgmma.mma_async"
