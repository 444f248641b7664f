"""`python -m benchmarks.tune SECONDS`: the search for tile shapes on a GPU, as lines for clipfast/tuning.py.

All candidates are compiled first, on all processors. Those that may ship are timed, the model's or the count's best
first, so that a search that is cut off has tried the likely ones.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import fields, replace
from datetime import date
from multiprocessing import get_context
from typing import Any

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from benchmarks.compile_report import Case, Compiled, compile_case
from clipfast import tuning
from clipfast.block import Block, Weights
from clipfast.tuning import Config, Device

N, WIDTH = 16384, 768
KINDS = {2: (torch.bfloat16, "ieee"), 4: (torch.float32, "tf32")}  # dtype and precision, by itemsize
SEARCHES = (("statistics", 2), ("gradient", 2), ("statistics", 4), ("gradient", 4), ("accumulate", 2))  # by value
PER_PROCESSOR = 2  # programs of a multiprocessor, at most
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
    """The fastest configuration of each kernel and operand size in SEARCHES, printed as lines for CONFIGS.

    A time is that of forward (statistics) or backward at n = m = 16384, d = 768; the matrix products of backward's
    chunks are in it, the same for all. What does not compile or may not ship, with norms or without, is passed over.

    Args:
        device: the GPU.
        seconds: for all; each search has an equal share of what is left, half of it at most to compile.
    """
    described = tuning.describe(device)
    hardware = torch.cuda.get_device_name(device)
    end = time.monotonic() + seconds
    best = []
    for index, (kernel, itemsize) in enumerate(SEARCHES):
        share = (end - time.monotonic()) / (len(SEARCHES) - index)
        deadline = time.monotonic() + share
        found = promising(list(candidates(kernel, described, itemsize)), share / 2)
        step = steps(kernel, KINDS[itemsize][0], device)
        timed: list[tuple[float, Config]] = []
        for config in tqdm(found, desc=f"{index + 1}/{len(SEARCHES)} {kernel}", disable=None):
            if time.monotonic() > deadline:
                break
            milliseconds = median_time(step, config)
            if milliseconds is not None:
                timed.append((milliseconds, config))
        timed.sort(key=lambda pair: pair[0])
        fastest = next((pair for pair in timed if may_ship_with_norms(pair[1])), None)
        if fastest is None:
            continue
        milliseconds, config = fastest
        products = 1 if kernel == "statistics" else 3
        rate = products * 2 * N * N * WIDTH / milliseconds / 1e9
        best.append(replace(config, source=f"{hardware}, {date.today()}: {rate:.0f} TFLOP/s at n = {N}, d = {WIDTH}"))
        print(line(best[-1]), flush=True)
    return best


def may_ship_with_norms(config: Config) -> bool:
    """Row norms add to what is held; a configuration serves rows with and without."""
    return not compile_case(Case(config, *KINDS[config.itemsize], factors=True)).fault


def promising(configs: Sequence[Config], seconds: float) -> list[Config]:
    """Those that compile in this time and may ship, the likely best first, with as many programs as fit."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        wanted = (replace(config, per_processor=PER_PROCESSOR) for config in configs)
        jobs = [pool.submit(compile_case, Case(config, *KINDS[config.itemsize])) for config in wanted]
        done, _ = wait(jobs, seconds)
        pool.shutdown(cancel_futures=True)
    rows = [job.result() for job in jobs if job in done and not job.exception()]
    ready = sorted((row for row in rows if not row.fault), key=_unlikely)
    return [replace(r.case.config, per_processor=max(1, min(r.programs, PER_PROCESSOR))) for r in ready]


def _unlikely(row: Compiled) -> tuple[float, float]:
    share = row.timed.share_of_peak(row.case.d) if row.timed else 0.0
    return -share, math.inf if row.slots is None else row.slots


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


if __name__ == "__main__":
    tune(torch.device("cuda"), float(sys.argv[1]))
