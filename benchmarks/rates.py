"""`python -m benchmarks.rates`: what a GPU's multiprocessors get from L2, and what the vendor's product reaches.

Both decide about tile shapes: `cycles` assumes them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BUFFER = 16 << 20  # bytes, which stay in L2
BLOCK = 8192  # words of 4 bytes
WARPS, PROGRAMS = 8, 2  # of a program; of a multiprocessor
ROUNDS = 4000  # blocks that each program reads
N, WIDTHS = 16384, (512, 768, 1024)
TIMES = 20


@triton.jit
def read_kernel(source, sums, blocks, rounds, BLOCK: tl.constexpr):
    """Each program adds up `rounds` blocks of the buffer, [blocks, BLOCK], one after the other, past the L1 cache."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for k in range(rounds):
        block = (tl.program_id(0) * 7 + k) % blocks
        total += tl.load(source + block * BLOCK + offs, cache_modifier=".cg")
    tl.store(sums + tl.program_id(0) * BLOCK + offs, total)


def read(source: Tensor, programs: int, rounds: int) -> Tensor:  # [blocks, BLOCK], int32 -> [programs, BLOCK]
    sums = source.new_empty((programs, source.shape[1]))
    read_kernel[(programs,)](source, sums, len(source), rounds, BLOCK=source.shape[1], num_warps=WARPS)
    return sums


def seconds(call: Any, times: int) -> float:
    """Of one call, on average, after one that does not count."""
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def clock() -> float | None:
    """Cycles per second of the multiprocessors at this moment, if nvidia-smi is there to say."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True)
    return float(done.stdout) * 1e6 if done.returncode == 0 else None


def measure() -> dict[str, Any]:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    source = torch.ones((BUFFER // 4 // BLOCK, BLOCK), dtype=torch.int32, device="cuda")
    programs = PROGRAMS * processors
    each = seconds(lambda: read(source, programs, ROUNDS), TIMES)
    for _ in range(10 * TIMES):  # some tenths of a second, in which to ask for the clock
        read(source, programs, ROUNDS)
    hertz = clock()
    torch.cuda.synchronize()
    rate = PROGRAMS * ROUNDS * BLOCK * 4 / each
    result: dict[str, Any] = {"l2_bytes_per_second_and_multiprocessor": rate, "clock_hz": hertz}
    if hertz:
        result["l2_bytes_per_cycle_and_multiprocessor"] = rate / hertz
    for d in WIDTHS:
        x, y = torch.randn(2, N, d, device="cuda").bfloat16()
        result[f"vendor_tflops_n{N}_d{d}"] = 2 * N * N * d / seconds(lambda x=x, y=y: torch.mm(x, y.T), TIMES) / 1e12
    return result


if __name__ == "__main__":
    print(json.dumps(measure()))
