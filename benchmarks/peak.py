"""The processor's own multiply-add rate: what no product can exceed, measured beside whatever it is compared with."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from clipfast.backends import cpu

SECONDS = 0.005  # of one measurement, at least
REPEATS = 2
FIRST_ROUNDS = 1 << 14

_long_enough: dict[tuple[str, str], int] = {}  # rounds, by instruction set and dtype


def available() -> bool:
    """Whether the compiled kernels are there."""
    return bool(cpu.instruction_sets())


def multiply_adds_per_second(dtype: str) -> float:
    """Floating-point operations a second of the kernels' inner loop without memory, on as many threads as torch has.

    In bfloat16 on units that take pairs of it, if the instruction set in use has them; else in float32. The threads
    begin together and each is timed by itself; the best of a few measurements counts, for it is a limit.
    """
    from clipfast import _cpu

    instruction_set, threads = cpu.instruction_set(), torch.get_num_threads()
    together = threading.Barrier(threads)

    def run(rounds: int) -> tuple[float, float]:
        together.wait()
        begin = time.perf_counter()
        done = _cpu.multiply_adds(instruction_set, dtype, rounds)
        return done, time.perf_counter() - begin

    key, best, repeats = (instruction_set, dtype), 0.0, 0
    rounds = _long_enough.get(key, FIRST_ROUNDS)
    with ThreadPoolExecutor(threads) as pool:
        while repeats < REPEATS:
            measured = list(pool.map(run, [rounds] * threads))
            if min(seconds for _, seconds in measured) < SECONDS / 2:
                rounds *= 2
                continue
            best = max(best, sum(done / seconds for done, seconds in measured))
            repeats += 1
    _long_enough[key] = rounds
    return best
