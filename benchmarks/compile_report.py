"""`python -m benchmarks compile-report`: what every Triton configuration compiles to, without its GPU.

The kernels are launched as clipfast launches them, but for a target that is not there: each launch compiles and stops.
So signatures, alignments and constants are the real ones. Registers, stack and shared memory come from the binary, the
matrix instructions from its assembly. Of NVIDIA's, `machine_code` counts the issue slots per logit; for sm_90 `cycles`
says what part of the tensor peak they leave, which is a model.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks import cycles, machine_code
from benchmarks.cycles import Timed
from clipfast import tuning
from clipfast.block import IGNORE, SAME_IDS, Block, Matches, Weights
from clipfast.tuning import Config, Device

# One multiprocessor's shared memory that a program can have (CUDA C++ programming guide, table of compute capabilities;
# AMD CDNA 3 instruction set, LDS), and how many there are (A100, H100, B200, MI300X).
DEVICES = {
    "sm_80": Device("sm_80", 108, 163 << 10),
    "sm_90": Device("sm_90", 132, 227 << 10),
    "sm_100": Device("sm_100", 148, 227 << 10),
    "gfx942": Device("gfx942", 304, 64 << 10),
}
MATRIX_INSTRUCTIONS = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
MAX_STACK = 16  # bytes; above it, registers were spilled,
MAX_STACK_OFF_PATH = 96  # which may be where few tiles go
# Issue slots per logit, at most, without and with norms: of the table's first configuration for sm_90 and halves, as
# Triton 3.9 and later compile it.
BARS = {
    ("statistics", ""): (9.5, 11.5),
    ("gradient", ""): (9.5, 12.0),
    ("ranks", "ranks"): (17.5, 20.5),
    ("sigmoid", ""): (15.5, 19.0),
    ("distillation", ""): (24.0, 31.0),
}
WIDTHS = (512, 101)  # d with aligned rows, and without, where pointers take the most registers
ROWS = 512

# What else a kernel's code depends on, or which other kernel runs with its configuration.
PLAIN_KERNELS = ("statistics", "gradient", "accumulate")
MODELLED = ("statistics", "gradient")  # by `cycles`, on sm_90 in halves
OPTIONS = {
    "statistics": ("",),
    "ranks": (IGNORE, "ranks", "ranks and ids", "matches and ids"),
    "kept": ("", "ranks and ids"),
    "gradient": ("", *SAME_IDS, "kept"),
    "accumulate": ("", *SAME_IDS),
    "sigmoid": ("", "loss alone", *SAME_IDS),
    "distillation": ("", "loss alone"),
    "projection": ("",),
}


@dataclass(frozen=True)
class Case:
    """A configuration with what else its code depends on."""

    config: Config
    dtype: torch.dtype
    precision: str  # of float32's product; "ieee" for halves
    factors: bool = False  # with row norms
    d: int = WIDTHS[0]
    option: str = ""  # one of OPTIONS[config.kernel]

    @property
    def logits(self) -> int:
        """Of a tile, per thread."""
        return self.config.block_m * self.config.block_n // (machine_code.WARP * self.config.num_warps)

    @property
    def takes_up(self) -> bool:
        """Whether its products are those that the forward pass kept."""
        return self.option == "kept"

    @property
    def bar(self) -> float | None:
        """The most slots per logit that it may ship with; None for any."""
        kernel = self.config.kernel
        bars = BARS.get((kernel, self.option))
        if bars is None or self.d != WIDTHS[0] or tuning.triton_version() < (3, 9):
            return None
        first = tuning.choose(kernel, DEVICES["sm_90"], 2, WIDTHS[0]).config
        return bars[self.factors] if self.config == first else None

    def __str__(self) -> str:
        config = self.config
        tile = f"{config.block_m}x{config.block_n}x{config.block_d}"
        words = [config.architecture, config.kernel, str(self.dtype).removeprefix("torch."), tile]
        words += [self.precision] * (self.dtype == torch.float32) + ["tma"] * config.tma + ["norms"] * self.factors
        words += [f"d={self.d}"] * (self.d != WIDTHS[0]) + [self.option] * bool(self.option)
        return " ".join(words)


@dataclass(frozen=True)
class Compiled:
    """What a case became. Bytes are per thread (stack) and per program (shared)."""

    case: Case
    registers: int
    stack: int
    shared: int
    matrix_instructions: int
    programs: int = 0  # per multiprocessor; 0: not counted
    slots: float | None = None  # per logit, outside the loop over d; None: not counted
    spills: int | None = None  # instructions of the common path that move spilled registers
    timed: Timed | None = None  # by the model

    @property
    def fault(self) -> str:
        """Why it may not ship; empty if it may."""
        device = DEVICES[self.case.config.architecture]
        faults = []
        if self.stack > (MAX_STACK_OFF_PATH if self.spills == 0 else MAX_STACK):
            faults.append(f"a stack of {self.stack} bytes")
        if self.shared > device.shared_bytes:
            faults.append(f"{self.shared} bytes of shared memory, of {device.shared_bytes}")
        # Real float32 has no matrix instruction on NVIDIA, and what is kept is not multiplied again.
        without = (self.case.dtype, self.case.precision) == (torch.float32, "ieee") or self.case.takes_up
        if not self.matrix_instructions and not without:
            faults.append(f"no {MATRIX_INSTRUCTIONS[device.architecture]}")
        if self.case.bar and not (self.slots and self.slots <= self.case.bar):
            counted = "no common path" if self.slots is None else f"{self.slots:.2f} slots per logit"
            faults.append(f"{counted}, of {self.case.bar}")
        return "; ".join(faults)

    def __str__(self) -> str:
        config = self.case.config
        words = [f"{self.case!s:68} {config.num_warps:5} {config.num_stages:6} {self.registers:9} {self.stack:5}"]
        words.append(f"{self.shared:7} {self.matrix_instructions:6} {self.programs or '-':>8}")
        words.append("    -" if self.slots is None else f"{self.slots:5.1f}")
        words.append("    -" if self.timed is None else f"{self.timed.share_of_peak(self.case.d):5.0%}")
        return " ".join([*words, self.fault])


def cases(architectures: Sequence[str] = tuple(DEVICES), plain: bool = False) -> list[Case]:
    """Every shipped configuration, in bfloat16 with and without norms or both kinds of float32, for all rows it takes.

    Rows that are not aligned come with norms alone, which add to what is held; so do options, with those rows if taken.
    `plain`: of the plain softmax's kernels alone, and without options.
    """
    found = []
    for config in tuning.CONFIGS:
        if config.architecture not in architectures or (plain and config.kernel not in PLAIN_KERNELS):
            continue
        if tuning.triton_version() < config.min_triton:
            continue
        any_rows = not (config.tma or config.aligned)
        first, *options = OPTIONS[config.kernel]
        if config.itemsize == 2:
            kinds = [(torch.bfloat16, "ieee")]
            found += [Case(config, torch.bfloat16, "ieee", factors, option=first) for factors in (False, True)]
            found += [Case(config, torch.bfloat16, "ieee", True, WIDTHS[1], first)] * any_rows
        else:
            kinds = [(torch.float32, "ieee"), (torch.float32, "tf32")]
            widths = WIDTHS if any_rows else WIDTHS[:1]
            found += [Case(config, *kind, d=d, option=first) for d in widths for kind in kinds]
        if not plain:
            # What has a bar has one without norms, too.
            found += [Case(config, *kind, option=o) for o in options for kind in kinds if (config.kernel, o) in BARS]
            for option in options:
                shipped = tuning.without_products(config) if option == "kept" else config
                found += [Case(shipped, *kind, True, WIDTHS[any_rows], option) for kind in kinds]
    return found


def compile_case(case: Case) -> Compiled:
    kernel = compiled_kernel(case)
    device = DEVICES[case.config.architecture]
    resources = _amd_resources if device.architecture.startswith("gfx") else _nvidia_resources
    registers, stack, assembly = resources(kernel)
    instructions = len(re.findall(re.escape(MATRIX_INSTRUCTIONS[device.architecture]), assembly))
    compiled = Compiled(case, registers, stack, int(kernel.metadata.shared), instructions)
    return compiled if device.architecture.startswith("gfx") else _counted(compiled, kernel.asm["cubin"])


def compiled_kernel(case: Case) -> Any:
    """What Triton makes of it."""
    device = DEVICES[case.config.architecture]
    with _offline(device) as kernels, mock.patch.object(tuning, "describe", return_value=device):
        return kernels[_launch(case)]


def _counted(compiled: Compiled, cubin: bytes) -> Compiled:
    """With what its machine code says."""
    case, config = compiled.case, compiled.case.config
    limit = DEVICES[config.architecture].shared_bytes
    programs = machine_code.programs_per_processor(config.num_warps, compiled.registers, compiled.shared, limit)
    compiled = replace(compiled, programs=programs)
    try:
        path = machine_code.common_path(
            machine_code.disassemble(cubin), case.logits, cycles.PRODUCTS.get(config.kernel, 1)
        )
    except LookupError:
        return compiled
    compiled = replace(compiled, slots=path.slots / case.logits, spills=path.spills)
    if (config.architecture, config.itemsize, case.option) == ("sm_90", 2, "") and config.kernel in MODELLED:
        compiled = replace(compiled, timed=cycles.timed(path, config, case.d, programs))
    return compiled


def _launch(case: Case) -> str:
    """Launch what the case is about, and return that kernel's name."""
    from clipfast.kernels import launch, projection

    kernel = case.config.kernel
    options: dict[str, Any] = {"config": case.config, "precision": case.precision}
    x, y = (torch.zeros(ROWS, case.d, dtype=case.dtype) for _ in range(2))
    if kernel == "projection":
        # "norms" is a bias here, and the weight, W or W^T, is read along either dimension.
        weight = y[:, : case.d].T if case.factors else torch.zeros(case.d, ROWS, dtype=case.dtype)
        projection.project(x, weight, y[:, 0] if case.factors else None, **options)
        return "projection_kernel"
    vector = torch.zeros(ROWS, dtype=torch.float64)
    factor = torch.ones(ROWS) if case.factors else None
    keep = "kept" in (kernel, case.option)
    block = Block(x, y, torch.ones(()), torch.zeros(()), 0, factor, factor, keep=keep)
    if case.option in SAME_IDS or case.option.endswith("ids"):
        ids = torch.zeros(ROWS, dtype=torch.int32)
        block = block._replace(row_ids=ids, col_ids=ids, same_id=case.option if case.option in SAME_IDS else IGNORE)
    if case.option.startswith("matches"):
        launch.matches(block, **options)
        kernel = "matches"
    elif kernel in ("statistics", "ranks", "kept"):
        launch.forward(block, Matches(vector, vector) if "ranks" in case.option else None, **options)
        kernel = "statistics"
    elif kernel == "sigmoid":
        launch.sigmoid(block, 1.0, case.option != "loss alone", case.dtype, **options)
    elif kernel == "distillation":
        weights = Weights(*[vector] * 5)
        launch.distillation(block, weights, block, weights, case.option != "loss alone", case.dtype, **options)
    else:
        options["strategy"] = "chunks" if kernel == "gradient" else "registers"
        weights = Weights(*[vector] * (7 if block.adds_positives else 5))
        kept = torch.zeros(tuning.kept_size(ROWS, ROWS)) if keep else None
        launch.backward(block, weights._replace(kept=kept), **options)
    return f"{kernel}_kernel"


def compile_all(chosen: list[Case]) -> Iterator[Compiled]:
    """The cases' results in their order, compiled in as many processes as there are processors."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_case, chosen)


@contextmanager
def _offline(device: Device) -> Iterator[dict[str, Any]]:
    """Launches compile for `device`, which need not be there, and do not run; yields the compiled kernels by name."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    amd = device.architecture.startswith("gfx")
    capability = device.architecture if amd else int(device.architecture.removeprefix("sm_"))
    target = GPUTarget("hip" if amd else "cuda", capability, 64 if amd else 32)
    number = list(DEVICES).index(device.architecture)  # Triton keeps its compiled kernels per device number
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, warmup=True, **options)
        kernels[self.__name__] = kernel
        return kernel

    absent = mock.Mock(spec_set=("get_current_device", "get_current_stream", "get_current_target"))
    absent.get_current_device.return_value = number
    absent.get_current_target.return_value = target
    with mock.patch.object(driver, "_active", absent), mock.patch.object(JITFunction, "run", compile_only):
        yield kernels


def _nvidia_resources(kernel: Any) -> tuple[int, int, str]:
    """Registers per thread, bytes of stack, PTX."""
    return *machine_code.resources(kernel.asm["cubin"]), kernel.asm["ptx"]


def _amd_resources(kernel: Any) -> tuple[int, int, str]:
    """Vector registers per lane, bytes of scratch, assembly."""
    assembly = kernel.asm["amdgcn"]
    registers, stack = (
        int(re.findall(rf"\.{what}:\s+(\d+)", assembly)[-1]) for what in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, stack, assembly


def main(architectures: Sequence[str], plain: bool = False) -> None:
    """Print a line for each case.

    Raises:
        SystemExit: one may not ship, or there is nothing to compile with.
    """
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("triton is not installed: pip install clipfast[triton]")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set, so that nothing is compiled: unset it")
    chosen = cases(architectures, plain)
    tqdm.write(
        f"triton {metadata.version('triton')}; registers and stack bytes per thread, shared bytes per program, "
        "programs per multiprocessor, issue slots per logit outside the loop over d, a model's share of the tensor peak"
    )
    tqdm.write(
        f"{'case':68} {'warps':>5} {'stages':>6} {'registers':>9} {'stack':>5} {'shared':>7} {'matrix':>6} "
        f"{'programs':>8} {'slots':>5} {'peak':>5}"
    )
    rows = []
    for row in tqdm(compile_all(chosen), total=len(chosen), disable=None):
        tqdm.write(str(row))
        rows.append(row)
    for factors in (False, True):
        if line := verdict([row for row in rows if row.case.factors == factors]):
            tqdm.write(line)
    if faults := sum(bool(row.fault) for row in rows):
        raise SystemExit(f"{faults} of {len(chosen)} may not ship")


def verdict(rows: Sequence[Compiled]) -> str:
    """A line on the whole loss by the first configuration of both kernels; empty without them."""
    first = {r.case.config.kernel: (r.case, r.timed) for r in reversed(rows) if r.timed and r.case.d == WIDTHS[0]}
    if len(first) < 2:
        return ""
    (_, forward), (case, backward) = first["statistics"], first["gradient"]
    share = cycles.share_at_4p(forward, backward, case.d, DEVICES[case.config.architecture].processors)
    return (
        f"{case.config.architecture}, n = {cycles.N}, d = {case.d}, {'norms' if case.factors else 'no norms'}: "
        f"by a model {share:.0%} of the tensor peak at 4 P, "
        f"{share / cycles.VENDOR:.0%} of a vendor's product at {cycles.VENDOR:.0%}"
    )
