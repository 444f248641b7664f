"""Tile configurations of the Triton kernels: frozen data per architecture and d, and the choice among them.

No figure here was measured. Each configuration was compiled for its architecture without spills, within its shared
memory and with its matrix instructions (python -m benchmarks compile-report); the order among them is a guess until
a search has been run on the device (python -m benchmarks gpu), which prints the lines that belong here.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace
from importlib import metadata

import torch

from clipfast.products import float32_precision

# "ranks" is the statistics kernel with ids or ranks, and the matches that they are counted by; "kept" is the one that
# stores its products, with or without these.
KERNELS = ("statistics", "ranks", "kept", "gradient", "accumulate", "sigmoid", "distillation", "projection")

# Bytes of H at a time in the backward pass. H, its rows of x and y, and the totals that it is added to stay in an L2
# cache of 40 MB or more.
WORKSPACE_BYTES = 32 << 20

# "chunks": store H and let the vendor's matrix product use it (3 P); "registers": multiply on in registers, one tower
# at a time (4 P while d fits BLOCK_OUT), from features again also where products were kept. Neither was measured.
STRATEGY = "chunks"
STRATEGIES = ("chunks", "registers")

# Of a multiprocessor. Less than half of the registers are for products: exponentials are as many.
REGISTER_BYTES = 256 << 10
RESERVED_SHARED_BYTES = 1 << 10  # beside what a program asks for, on NVIDIA's

LOAD_STEP = 16  # the divisor of sizes and strides that Triton specializes on

UNMEASURED = "compiled, not measured"


@dataclass(frozen=True)
class Config:
    """One kernel's tile shape and launch, for one architecture."""

    kernel: str
    architecture: str
    itemsize: int  # of the operands: 2 or 4
    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    tma: bool = False  # loads through tensor descriptors
    aligned: bool = False  # keeps few enough pointers in registers only where loads are of 16 bytes
    max_d: int = 0  # 0: any d
    block_out: int = 0  # accumulate: columns of dx per program
    per_processor: int = 1  # programs per multiprocessor
    min_triton: tuple[int, ...] = ()  # an older one spills registers
    source: str = UNMEASURED

    @property
    def shared_bytes(self) -> int:
        """The operands that are under way; the compiler adds a little."""
        return max(1, self.num_stages) * (self.block_m + self.block_n) * self.block_d * self.itemsize

    @property
    def tile_scratch(self) -> int:
        """float32 numbers per program for a tile of a wide range; distillation has the teacher's as well."""
        return (2 if self.kernel == "distillation" else 1) * self.block_m * self.block_n

    @property
    def row_warps(self) -> int:
        """How many warps share the rows of a tile in turns of 16, as the products of sm_90's matrix instructions lie.

        0 where they lie otherwise: a thread's own parts would have to be gathered first.
        """
        if self.architecture in ("sm_80", "sm_100", "gfx942", "interpreter") or self.itemsize == 4:
            return 0
        return min(self.num_warps, self.block_m // 16)


@dataclass(frozen=True)
class Device:
    """What the choice of a configuration depends on."""

    architecture: str
    processors: int
    shared_bytes: int  # per program

    @property
    def interpreted(self) -> bool:
        return self.architecture == "interpreter"


@dataclass(frozen=True)
class Choice:
    config: Config
    rejected: tuple[tuple[Config, str], ...]  # those before it, each with the reason against it


INTERPRETER = Device("interpreter", processors=6, shared_bytes=1 << 30)


@functools.cache
def describe(device: torch.device) -> Device:
    """The device as the table knows it: a newer GPU of a family counts as the family's entry."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device("gfx942", properties.multi_processor_count, 64 << 10)
    # Consumer Blackwell (12.x) has neither tcgen05 nor wgmma.
    architecture = {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(properties.major, "sm_80")
    return Device(architecture, properties.multi_processor_count, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@functools.cache
def triton_version() -> tuple[int, ...]:
    """Of the installed Triton, as (major, minor); empty if there is none."""
    # ROCm's and nightly builds of torch bring triton under other distribution names.
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return tuple(int(part) for part in metadata.version(distribution).split(".")[:2])
    return ()


def reason_against(config: Config, device: Device, itemsize: int, d: int, aligned_rows: bool) -> str:
    """Why this configuration does not serve; empty if it does. Aligned rows: contiguous, each at 16 bytes."""
    if config.architecture != device.architecture:
        return f"is for {config.architecture}, the device is {device.architecture}"
    if triton_version() < config.min_triton:
        oldest, found = (".".join(map(str, version)) for version in (config.min_triton, triton_version()))
        return f"spills registers below Triton {oldest}, this is {found or 'none'}"
    if config.itemsize not in (0, itemsize):
        return f"is for operands of {config.itemsize} bytes, these have {itemsize}"
    if config.max_d and d > config.max_d:
        return f"is for d up to {config.max_d}, d is {d}"
    if config.tma and not aligned_rows:
        return "loads through tensor descriptors, which need unit stride along d and rows aligned to 16 bytes"
    if config.aligned and not (aligned_rows and d % LOAD_STEP == 0):
        return f"loads 16 bytes at a time, which needs aligned rows of a multiple of {LOAD_STEP} elements"
    if config.shared_bytes > device.shared_bytes:
        return f"needs {config.shared_bytes} bytes of shared memory, the device has {device.shared_bytes}"
    if (count := config.per_processor) > 1:
        needed = count * (config.shared_bytes + RESERVED_SHARED_BYTES) - RESERVED_SHARED_BYTES
        if needed > device.shared_bytes:
            return f"needs {needed} bytes of shared memory for {count} programs, the device has {device.shared_bytes}"
        if 2 * count * 4 * config.block_m * config.block_n > REGISTER_BYTES:
            return f"the tiles of {count} programs do not fit the {REGISTER_BYTES} bytes of registers"
    return ""


def reason_against_strategy(strategy: str, device: Device, triton_version: tuple[int, ...]) -> str:
    """Why a strategy is not to run with this Triton; empty if it may."""
    if strategy == "registers" and device.architecture == "sm_90" and triton_version < (3, 9):
        return (
            "multiplies H on from registers, and the ptxas 12.9 of Triton below 3.9 may corrupt sm_90's products whose "
            "left operand is in registers (triton#11781)"
        )
    return ""


@functools.lru_cache(maxsize=1024)
def choose(kernel: str, device: Device, itemsize: int, d: int, aligned_rows: bool = True) -> Choice:
    """The first configuration of the table without a reason against it."""
    rejected: list[tuple[Config, str]] = []
    for config in CONFIGS:
        if config.kernel != kernel:
            continue
        reason = reason_against(config, device, itemsize, d, aligned_rows)
        if not reason:
            return Choice(config, tuple(rejected))
        rejected.append((config, reason))
    raise LookupError(f"no configuration of the {kernel} kernel for {device}: {rejected}")


def without_products(config: Config) -> Config:
    """For products that were kept: each of more warps holds less, where Triton below 3.9 spills."""
    return replace(config, num_warps=8) if triton_version() < (3, 9) else config


@functools.lru_cache(maxsize=1024)
def program_grid(n: int, m: int, config: Config, processors: int) -> tuple[int, int]:
    """How many programs share the rows and the columns, (programs_m, programs_n).

    Of all grids that the device can run at once, the one whose busiest program has the fewest tiles; of those, the one
    with the smallest buffers, which hold programs_n values for each row and programs_m for each column.
    """
    blocks_m, blocks_n = -(-n // config.block_m), -(-m // config.block_n)
    limit = processors * config.per_processor
    best: tuple[int, int, int, int] | None = None
    for programs_m in range(1, min(limit, blocks_m) + 1):
        programs_n = min(blocks_n, limit // programs_m)
        tiles = -(-blocks_m // programs_m) * -(-blocks_n // programs_n)
        candidate = (tiles, programs_n * n + programs_m * m, programs_m, programs_n)
        best = candidate if best is None else min(best, candidate)
    assert best is not None
    return best[2], best[3]


def persistent_programs(n: int, m: int, config: Config, processors: int) -> int:
    """How many programs share the tiles of a chunk."""
    return min(-(-n // config.block_m) * -(-m // config.block_n), processors * config.per_processor)


def padded(cols: int) -> int:
    """Elements from one row of H, or of kept products, to the next, so that every row starts aligned."""
    return -(-cols // 64) * 64


def kept_size(n: int, m: int) -> int:
    """How many float32 numbers the products of an [n, m] block take that stay between the passes."""
    return n * padded(m)


@functools.lru_cache(maxsize=1024)
def chunk_shape(n: int, m: int, itemsize: int, workspace: int) -> tuple[int, int]:
    """Rows and columns of H at a time, near square, in at most `workspace` bytes; multiples of CHUNK_STEP or all.

    Square, because adding to dy costs a pass over the columns' totals per chunk of rows: with whole rows of H in so
    little memory it would cost more than the product.
    """
    elements = workspace // itemsize
    side = _step_down(math.isqrt(elements))
    if n <= side:
        return n, min(m, _step_down(elements // n))
    if m <= side:
        return min(n, _step_down(elements // padded(m))), m
    return side, side


CHUNK_STEP = 512  # a multiple of every BLOCK_M and BLOCK_N


def _step_down(count: int) -> int:
    return max(CHUNK_STEP, count // CHUNK_STEP * CHUNK_STEP)


def float32_product(device: Device) -> str:
    """How the product of float32 features is computed, as PyTorch is told.

    "highest" is real float32. "high" is TF32 where the device has it, else three bfloat16 products, the two that
    torch's documentation names. "medium" is one bfloat16 product: the caller rounds the features.
    """
    precision = float32_precision("cuda")
    if precision == "highest" or device.interpreted:
        return "ieee"
    return "bf16" if precision == "medium" else "tf32"


# Where the first of a device's is for Triton 3.9 on, an older one spills it: the next holds fewer numbers per thread.
CONFIGS: tuple[Config, ...] = (
    Config("statistics", "sm_80", 2, 128, 128, 32, 8, 4, aligned=True),
    Config("statistics", "sm_80", 2, 128, 64, 32, 8, 4),
    Config("gradient", "sm_80", 2, 128, 64, 32, 8, 4),
    Config("accumulate", "sm_80", 2, 64, 64, 64, 8, 2, block_out=128),
    Config("ranks", "sm_80", 2, 128, 64, 32, 8, 3),
    Config("kept", "sm_80", 2, 128, 64, 32, 8, 3, min_triton=(3, 9)),
    Config("kept", "sm_80", 2, 128, 32, 32, 8, 3),
    Config("sigmoid", "sm_80", 2, 128, 128, 32, 8, 3),
    Config("distillation", "sm_80", 2, 128, 64, 32, 8, 2, aligned=True),
    Config("distillation", "sm_80", 2, 64, 64, 32, 8, 3),
    Config("projection", "sm_80", 2, 128, 128, 32, 8, 3),
    Config("statistics", "sm_80", 4, 32, 64, 32, 8, 3),
    Config("gradient", "sm_80", 4, 128, 64, 32, 8, 3),
    Config("accumulate", "sm_80", 4, 64, 32, 32, 8, 1, block_out=64),
    Config("ranks", "sm_80", 4, 128, 32, 32, 8, 3),
    Config("kept", "sm_80", 4, 32, 64, 32, 8, 3),
    Config("sigmoid", "sm_80", 4, 128, 64, 32, 8, 3, min_triton=(3, 9)),
    Config("sigmoid", "sm_80", 4, 64, 64, 32, 8, 3),
    Config("distillation", "sm_80", 4, 64, 32, 32, 8, 2),
    Config("projection", "sm_80", 4, 64, 64, 32, 8, 3),
    Config("statistics", "sm_90", 2, 128, 128, 64, 4, 3, tma=True, per_processor=2, min_triton=(3, 9)),
    Config("statistics", "sm_90", 2, 128, 128, 64, 8, 3, tma=True),
    Config("statistics", "sm_90", 2, 256, 128, 64, 8, 3, tma=True, min_triton=(3, 9)),
    Config("statistics", "sm_90", 2, 128, 64, 64, 8, 3),
    Config("gradient", "sm_90", 2, 128, 128, 64, 4, 3, tma=True, per_processor=2),
    Config("gradient", "sm_90", 2, 256, 128, 64, 8, 3, tma=True, min_triton=(3, 9)),
    Config("gradient", "sm_90", 2, 128, 64, 32, 8, 3),
    Config("accumulate", "sm_90", 2, 64, 64, 64, 8, 2, block_out=128),
    Config("ranks", "sm_90", 2, 128, 64, 64, 4, 3, tma=True, per_processor=2, min_triton=(3, 9)),
    Config("ranks", "sm_90", 2, 64, 64, 64, 4, 3, tma=True, per_processor=2),
    Config("ranks", "sm_90", 2, 64, 64, 64, 8, 3),
    Config("kept", "sm_90", 2, 64, 64, 64, 8, 2, tma=True),
    Config("kept", "sm_90", 2, 64, 64, 64, 8, 3),
    Config("sigmoid", "sm_90", 2, 128, 128, 64, 4, 3, tma=True, per_processor=2, min_triton=(3, 9)),
    Config("sigmoid", "sm_90", 2, 128, 64, 64, 8, 3, tma=True),
    Config("sigmoid", "sm_90", 2, 128, 64, 64, 8, 3),
    Config("distillation", "sm_90", 2, 128, 128, 64, 8, 3, tma=True, min_triton=(3, 9)),
    Config("distillation", "sm_90", 2, 128, 64, 64, 8, 3, tma=True),
    Config("distillation", "sm_90", 2, 128, 32, 64, 8, 3),
    Config("projection", "sm_90", 2, 64, 128, 64, 8, 3),
    Config("statistics", "sm_90", 4, 64, 64, 32, 8, 2),
    Config("gradient", "sm_90", 4, 128, 64, 16, 8, 3),
    Config("accumulate", "sm_90", 4, 64, 64, 32, 8, 1, block_out=64),
    Config("ranks", "sm_90", 4, 64, 32, 32, 8, 3),
    Config("kept", "sm_90", 4, 64, 64, 32, 8, 2),
    Config("sigmoid", "sm_90", 4, 128, 64, 32, 8, 3, min_triton=(3, 9)),
    Config("sigmoid", "sm_90", 4, 128, 64, 16, 8, 4),
    Config("distillation", "sm_90", 4, 64, 32, 32, 8, 2),
    Config("projection", "sm_90", 4, 64, 64, 32, 8, 3, min_triton=(3, 9)),
    Config("projection", "sm_90", 4, 64, 64, 16, 8, 2),
    Config("statistics", "sm_100", 2, 128, 64, 64, 8, 4, tma=True),
    Config("statistics", "sm_100", 2, 128, 64, 32, 8, 3),
    Config("gradient", "sm_100", 2, 128, 128, 64, 8, 3, tma=True),
    Config("gradient", "sm_100", 2, 128, 64, 64, 8, 3),
    Config("accumulate", "sm_100", 2, 64, 64, 64, 8, 2, block_out=256, min_triton=(3, 9)),
    Config("accumulate", "sm_100", 2, 64, 64, 64, 8, 2, block_out=128),
    Config("ranks", "sm_100", 2, 128, 64, 64, 8, 3, tma=True),
    Config("ranks", "sm_100", 2, 64, 64, 64, 8, 3),
    Config("kept", "sm_100", 2, 128, 64, 64, 8, 3, tma=True),
    Config("kept", "sm_100", 2, 64, 64, 64, 8, 3),
    Config("sigmoid", "sm_100", 2, 128, 64, 64, 4, 3, tma=True, per_processor=2, min_triton=(3, 9)),
    Config("sigmoid", "sm_100", 2, 128, 64, 32, 4, 3, per_processor=2),
    Config("distillation", "sm_100", 2, 64, 64, 32, 8, 2, aligned=True),
    Config("distillation", "sm_100", 2, 64, 32, 32, 8, 2),
    Config("projection", "sm_100", 2, 128, 128, 64, 8, 3),
    Config("statistics", "sm_100", 4, 64, 64, 16, 8, 3),
    Config("gradient", "sm_100", 4, 64, 64, 32, 8, 3),
    Config("accumulate", "sm_100", 4, 64, 64, 16, 8, 1, block_out=64),
    Config("ranks", "sm_100", 4, 64, 32, 32, 8, 3),
    Config("kept", "sm_100", 4, 64, 32, 32, 8, 2),
    Config("sigmoid", "sm_100", 4, 128, 64, 32, 8, 3, min_triton=(3, 9)),
    Config("sigmoid", "sm_100", 4, 64, 64, 16, 8, 2),
    Config("distillation", "sm_100", 4, 64, 32, 32, 8, 2),
    Config("projection", "sm_100", 4, 64, 64, 32, 8, 3),
    Config("statistics", "gfx942", 2, 128, 64, 32, 8, 2),
    Config("gradient", "gfx942", 2, 128, 128, 32, 8, 2),
    Config("accumulate", "gfx942", 2, 64, 64, 64, 8, 1, block_out=256),
    Config("ranks", "gfx942", 2, 128, 64, 32, 8, 2),
    Config("kept", "gfx942", 2, 128, 64, 32, 8, 2),
    Config("sigmoid", "gfx942", 2, 64, 128, 32, 8, 2),
    Config("distillation", "gfx942", 2, 64, 64, 32, 8, 1),
    Config("projection", "gfx942", 2, 128, 128, 32, 8, 2),
    Config("statistics", "gfx942", 4, 64, 64, 32, 8, 1),
    Config("gradient", "gfx942", 4, 64, 64, 32, 8, 1),
    Config("accumulate", "gfx942", 4, 64, 64, 32, 8, 1, block_out=64),
    Config("ranks", "gfx942", 4, 64, 64, 32, 8, 1),
    Config("kept", "gfx942", 4, 64, 64, 32, 8, 1),
    Config("sigmoid", "gfx942", 4, 64, 64, 32, 8, 1),
    Config("distillation", "gfx942", 4, 64, 32, 32, 8, 1),
    Config("projection", "gfx942", 4, 64, 64, 32, 8, 1),
    Config("statistics", "interpreter", 0, 128, 128, 128, 4, 1),
    Config("ranks", "interpreter", 0, 128, 128, 128, 4, 1),
    Config("kept", "interpreter", 0, 128, 128, 128, 4, 1),
    Config("gradient", "interpreter", 0, 128, 128, 128, 4, 1),
    Config("accumulate", "interpreter", 0, 128, 128, 128, 4, 1, block_out=256),
    Config("sigmoid", "interpreter", 0, 128, 128, 128, 4, 1),
    Config("distillation", "interpreter", 0, 128, 128, 128, 4, 1),
    Config("projection", "interpreter", 0, 128, 128, 128, 4, 1),
)
