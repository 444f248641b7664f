"""`python -m benchmarks.host`: what a chunk of the backward pass costs the processor, without a GPU.

The passes run as for an H100, on tensors of the CPU, with launches and products that do nothing: what is left is
Python, PyTorch's views and Triton's way to its launcher; for the sigmoid loss and distillation also the sums of a
chunk's partial losses, which a GPU would form. The launcher itself, which is Triton's C code, is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.compile_report import DEVICES
from clipfast import tuning
from clipfast.block import Block, Weights

ARCHITECTURE = "sm_90"
N, D = 32768, 512
ROUNDS = 21


class Driver:
    """Triton's driver of a GPU that is not there: kernels are compiled for it, and launched to no effect."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        number = list(DEVICES).index(architecture)
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        shared = {"max_shared_mem": DEVICES[architecture].shared_bytes}
        self.get_current_device = lambda: number
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: target
        self.launched: list[str] = []  # kernels by name
        self.launcher_cls = lambda source, metadata: lambda *arguments: self.launched.append(metadata.name)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: shared,
            load_binary=lambda *arguments: (object(), 0, 0, 0, 1024),
            unload_module=lambda module: None,
        )


@contextmanager
def absent(architecture: str = ARCHITECTURE) -> Iterator[list[str]]:
    """Launches compile for the architecture and do nothing, and so do products; yields the launched kernels' names."""
    from triton.runtime.driver import driver

    from clipfast.kernels import chunks

    def nothing(*arguments: Any, **options: Any) -> None: ...

    def described(device: torch.device) -> tuning.Device:
        return DEVICES[architecture]

    device = Driver(architecture)
    with (
        mock.patch.object(driver, "_active", device),
        mock.patch.object(tuning, "describe", described),
        mock.patch.object(chunks, "_add_product", nothing),
    ):
        yield device.launched


def passes(n: int, workspace: int = tuning.WORKSPACE_BYTES) -> dict[str, Callable[[], Any]]:
    """The passes that go by chunks, of a batch of n, by the names of their kernels."""
    from clipfast.kernels import launch

    x, y = (torch.zeros(n, D, dtype=torch.bfloat16) for _ in range(2))
    block = Block(x, y, torch.ones(()), torch.zeros(()))
    weights = Weights(*[torch.zeros(n, dtype=torch.float64)] * 5)
    options: dict[str, Any] = {"precision": "ieee", "workspace": workspace}
    return {
        "gradient": lambda: launch.backward(block, weights, **options),
        "sigmoid": lambda: launch.sigmoid(block, 1.0, True, x.dtype, **options),
        "distillation": lambda: launch.distillation(block, weights, block, weights, True, x.dtype, **options),
    }


def microseconds_per_chunk(run: Callable[[], Any], n: int) -> float:
    """The median of a whole pass's processor time, over its chunks."""
    rows, cols = tuning.chunk_shape(n, n, 2, tuning.WORKSPACE_BYTES)
    run()  # compiles
    times = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return 1e6 * statistics.median(times) / (-(-n // rows) * -(-n // cols))


def main() -> None:
    torch.set_num_threads(1)
    with absent():
        for name, run in passes(N).items():
            print(f"{name}: {microseconds_per_chunk(run, N):.0f} us a chunk, n = {N}, d = {D}", flush=True)


if __name__ == "__main__":
    main()
