"""Where a result was measured: device, versions, commit; and how this process reads its memory."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clipfast

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"  # committed; README.md shows them
RUNS = ROOT / "runs" / "benchmarks"
PACKAGES = ("torch", "triton", "numpy", "memeff", "inf-cl", "cut-cross-entropy", "liger-kernel")


def describe(device: str) -> dict[str, Any]:
    """Device, number of threads, versions, commit, date and command of this run."""
    versions = {"python": platform.python_version(), "clipfast": clipfast.__version__}
    installed = {distribution.name.lower() for distribution in distributions()}
    versions |= {package: version(package) for package in PACKAGES if package in installed}
    arguments = [re.sub(r".*/", "", argument) for argument in sys.argv[1:]]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "clipfast", "csrc")),
        "date": date.today().isoformat(),
        "command": " ".join(["python -m benchmarks", *arguments]),
    }


def credit(result: dict[str, Any]) -> str:
    """Where and when a result was measured, and how to measure it again."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("clipfast", "torch"))
    return f"{result['device']}, {result['threads']} threads, {result['date']}, {versions}; `{result['command']}`"


def processor() -> str:
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1].strip() if match else platform.processor()


def file_name(device: str, threads: int) -> str:
    """A device's result file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + f"-{threads}-threads.json"


def out_path(out: Path | None, name: str, described: dict[str, Any] | None = None) -> Path:
    """Where a result goes: into a file or a folder, or into runs/ under the first of name, name-2, ... that is free.

    Args:
        out: the file or folder, or None for runs/.
        name: of the file in a folder.
        described: of a run that may go on with an unfinished result of the same setting.

    Raises:
        FileExistsError: `out` holds another run's result, which nobody but its owner takes away.
    """

    def fits(path: Path) -> bool:
        return not path.exists() or (described is not None and continues(path, described))

    if out is None:
        names = itertools.chain([name], (f"{Path(name).stem}-{number}.json" for number in itertools.count(2)))
        return next(path for path in map(RUNS.joinpath, names) if fits(path))
    path = out if out.suffix == ".json" else out / name
    if not fits(path):
        raise FileExistsError(f"--out: {path} holds another run's result; give another file, or remove it first")
    return path


def continues(path: Path, described: dict[str, Any]) -> bool:
    """Whether a run may go on with a result file: of the same device, versions and commit, without other changes."""
    before = json.loads(path.read_text())
    same = all(before[key] == described[key] for key in ("device", "threads", "versions", "commit"))
    return same and not before["uncommitted_changes"] and not described["uncommitted_changes"]


def write_whole(path: Path, result: dict[str, Any]) -> None:
    """Write a JSON file that is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def memory_bytes(device: str) -> int:
    """Memory of the device, in all."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class PeakMemory:
    """Peak bytes above those held at `start`: of CUDA's allocator, or of this process's resident set (Linux).

    The resident set's peak is reset through /proc/self/clear_refs, after the C library gave back what it held free.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def start(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status_bytes("VmRSS")

    def stop(self) -> int:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._before
        return _status_bytes("VmHWM") - self._before


class SavedStorages(torch.autograd.graph.saved_tensors_hooks):
    """What autograd saves for a backward pass while it is entered: bytes of each distinct storage, by its address."""

    def __init__(self) -> None:
        super().__init__(self._note, lambda tensor: tensor)
        self.sizes: dict[int, int] = {}

    def __enter__(self) -> SavedStorages:  # type: ignore[override]
        super().__enter__()
        return self

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def _status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
