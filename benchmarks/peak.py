"""The processor's own multiply-add rate: what no product can exceed, measured beside whatever it is compared with."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from clipfast.backends import cpu

SECONDS = 0.01  # of one measurement
FIRST_ROUNDS = 1 << 12


def available() -> bool:
    """Whether the compiled kernels are there."""
    return bool(cpu.instruction_sets())


def multiply_adds_per_second(dtype: str) -> float:
    """Floating-point operations a second of the kernels' inner loop without memory, on as many threads as torch has.

    In bfloat16 on units that take pairs of it, if the instruction set in use has them; else in float32.
    """
    from clipfast import _cpu

    instruction_set, threads = cpu.instruction_set(), torch.get_num_threads()

    def rate(rounds: int) -> tuple[float, float]:
        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            done = sum(pool.map(lambda _: _cpu.multiply_adds(instruction_set, dtype, rounds), range(threads)))
            seconds = time.perf_counter() - begin
        return done / seconds, seconds

    rounds, seconds = FIRST_ROUNDS, 0.0
    while seconds < SECONDS:
        speed, seconds = rate(rounds)
        rounds *= 2
    return speed
