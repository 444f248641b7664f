"""What to paste into a bug report: `python -m clipfast.info`."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import torch

import clipfast
from clipfast import dispatch
from clipfast.backends import cpu

# ROCm's and nightly builds of torch bring triton under other distribution names.
TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")
PACKAGES = ("numpy", *TRITON, "open-clip-torch", "transformers", "sentence-transformers")
ENVIRONMENT_VARIABLES = ("TRITON_INTERPRET", "OMP_NUM_THREADS")
TYPICAL_N, TYPICAL_D = 32768, 512
TYPICAL_DTYPES = (torch.float32, torch.bfloat16)


def report() -> str:
    """Versions, machine, settings, every backend's reasons, and what a typical problem would run on."""
    gpus = accelerators()
    # GPUs that are alike can run the same: the first of them stands for all.
    kinds = {description: device for device, description in reversed(gpus.items())}
    return "\n".join(
        [
            *versions(),
            f"system: {platform.platform()}",
            f"processor: {processor()}",
            f"instruction sets: {_instruction_sets()}",
            f"threads: {torch.get_num_threads()} in use, {os.cpu_count()} processors",
            *(f"GPU {device}: {description}" for device, description in gpus.items()),
            *([] if gpus else ["GPU: none that torch can use"]),
            f"environment: {', '.join(_environment()) or 'none of the variables that clipfast reads is set'}",
            *_on_device(torch.device("cpu")),
            *(line for device in reversed(kinds.values()) for line in _on_device(device)),
        ]
    )


def versions() -> Iterable[str]:
    """Python, clipfast, torch with its build, and the packages that clipfast can work with, if installed."""
    yield f"python {platform.python_version()}"
    yield f"clipfast {clipfast.__version__}"
    yield f"torch {torch.__version__}"
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{package} {metadata.version(package)}"


def processor() -> str:
    """The processor's name where Linux tells it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def accelerators() -> dict[torch.device, str]:
    """Every device that torch can use beside the CPU, with its name, capability and memory."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return {}
    devices = [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
    return {device: _or_error(_gpu, device) for device in devices}


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return "neither a CUDA nor a ROCm device"
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"


def _instruction_sets() -> str:
    available = [name for name, here in cpu.instruction_sets().items() if here]
    if not available:
        return "none, no compiled extension"
    return f"{', '.join(available)}; in use: {_or_error(cpu.instruction_set)}"


def _environment() -> list[str]:
    names = sorted(name for name in os.environ if name.startswith("CLIPFAST_") or name in ENVIRONMENT_VARIABLES)
    return [f"{name}={os.environ[name]}" for name in names]


def _on_device(device: torch.device) -> Iterable[str]:
    yield f"\nbackends on {device}:"
    yield _or_error(_backends, device)
    for dtype in TYPICAL_DTYPES:
        yield "\n" + _or_error(clipfast.explain, TYPICAL_N, TYPICAL_D, dtype, device)


def _backends(device: torch.device) -> str:
    reasons = dispatch.backends(device)
    return "\n".join(f"  {name}: {'; '.join(against) or 'can run'}" for name, against in reasons.items())


def _or_error(tell: Callable[..., object], *arguments: object) -> str:
    """What `tell` tells, or why it fails: a wrong setting or a broken driver is what the report is to show."""
    try:
        return str(tell(*arguments))
    except (RuntimeError, ValueError) as error:
        return f"error: {error}"


if __name__ == "__main__":
    print(report())
