"""The search for tile shapes: `python -m benchmarks gpu --tune` times them and prints lines for clipfast/tuning.py."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import date
from typing import Any

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from clipfast import tuning
from clipfast.block import Block, Weights
from clipfast.tuning import KERNELS, Config, Device

N, WIDTH = 16384, 768
DTYPES = {2: torch.bfloat16, 4: torch.float32}
ROUNDS = 7


def candidates(kernel: str, device: Device, itemsize: int) -> Iterator[Config]:
    """What may run on the device, the shipped configurations first."""
    shipped = [
        c for c in tuning.CONFIGS if (c.kernel, c.architecture, c.itemsize) == (kernel, device.architecture, itemsize)
    ]
    outs = (64, 128, 256) if kernel == "accumulate" else (0,)
    tma = (True, False) if device.architecture in ("sm_90", "sm_100") and kernel != "accumulate" else (False,)
    grid = (
        Config(kernel, device.architecture, itemsize, m, n, d, warps, stages, tma=loads, block_out=out)
        for m, n, d, warps, stages, loads, out in itertools.product(
            (64, 128, 256), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4), tma, outs
        )
    )
    for config in dict.fromkeys([*shipped, *grid]):
        if not tuning.reason_against(config, device, itemsize, WIDTH, aligned_rows=True):
            yield config


def tune(device: torch.device, seconds: float) -> list[Config]:
    """The fastest configuration of each kernel and operand size, printed as lines for CONFIGS.

    A time is that of forward (statistics) or backward at n = m = 16384, d = 768; the matrix products of backward's
    chunks are in it, the same for all. What does not compile, or finds no registers or shared memory, is passed over.

    Args:
        device: the GPU.
        seconds: for all; each kernel and operand size has an equal share, and what does not fit is not tried.
    """
    described = tuning.describe(device)
    hardware = torch.cuda.get_device_name(device)
    searches = list(itertools.product(KERNELS, DTYPES))
    best = []
    for index, (kernel, itemsize) in enumerate(searches):
        deadline = time.monotonic() + seconds / len(searches)
        step = steps(kernel, DTYPES[itemsize], device)
        timed: list[tuple[float, Config]] = []
        for config in tqdm(list(candidates(kernel, described, itemsize)), desc=f"{index + 1}/{len(searches)} {kernel}"):
            if time.monotonic() > deadline:
                break
            milliseconds = median_time(step, config)
            if milliseconds is not None:
                timed.append((milliseconds, config))
        milliseconds, config = min(timed, key=lambda pair: pair[0])
        products = 1 if kernel == "statistics" else 3
        rate = products * 2 * N * N * WIDTH / milliseconds / 1e9
        best.append(replace(config, source=f"{hardware}, {date.today()}: {rate:.0f} TFLOP/s at n = {N}, d = {WIDTH}"))
        tqdm.write(line(best[-1]))
    return best


def steps(kernel: str, dtype: torch.dtype, device: torch.device) -> Callable[[Config], object]:
    """What runs a kernel with a configuration, in TF32 for float32."""
    from clipfast.kernels import launch

    x, y = (normalize(torch.randn(N, WIDTH, device=device), dim=1).to(dtype) for _ in range(2))
    block = Block(x, y, torch.tensor(14.3, device=device), torch.zeros((), device=device))
    precision = "tf32" if dtype == torch.float32 else "ieee"
    if kernel == "statistics":
        return lambda config: launch.forward(block, config=config, precision=precision)
    row_lse, col_lse, *_ = launch.forward(block, precision=precision)
    weight = torch.full_like(row_lse, 1 / (2 * N))
    weights = Weights(row_lse, weight, col_lse, weight, -2 * weight)
    strategy = "chunks" if kernel == "gradient" else "registers"

    def backward(config: Config) -> object:
        options: dict[str, Any] = {"config": config, "precision": precision, "strategy": strategy}
        return launch.backward(block, weights, **options)

    return backward


def median_time(step: Callable[[Config], object], config: Config) -> float | None:
    """Milliseconds, or None if the configuration cannot run."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        step(config)
    except (CompilationError, OutOfResources, PTXASError, RuntimeError):
        return None
    marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        step(config)
        mark.record()
    torch.cuda.synchronize()
    return float(sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))[ROUNDS // 2])


def line(config: Config) -> str:
    """As it stands in CONFIGS: values up to num_stages by position, what differs from the defaults by name."""
    values = [(f.name, getattr(config, f.name), f.default) for f in fields(config)]
    positional = [repr(value) for _, value, _ in values[:8]]
    named = [f"{name}={value!r}" for name, value, default in values[8:] if value != default]
    return f"    Config({', '.join([*positional, *named])}),"
