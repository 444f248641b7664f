"""`python -m benchmarks gpu`: everything that is to be learned on this machine's GPU, in one call, most telling first.

Each part is a process of its own with a time limit, and writes its output into a folder as it goes. A part that fails
is written down and does not keep the others from running; a later call with the same device, versions and commit
repeats no part that succeeded, goes on with what is left, and then tries again what failed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.cases import FIRST, Case, gpu_grid

BUDGET = 1500.0  # seconds, all limits together
TAIL = 4000  # characters of a failed command's output
GRACE = 30.0  # seconds less than its limit that a command has which keeps a budget of its own
CUDA = Path("/usr/local/cuda/bin")

# Forward and backward of each kernel variant at odd shapes. The tensors come straight from the driver, so that the
# sanitizer sees their ends.
SANITIZED = """
import torch, clipfast
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for n, m, d in ((130, 150, 64), (257, 300, 100)):
        for options in ({"keep_bytes": 0}, {"keep_bytes": 1 << 30, "normalize": True}):
            x, y = (torch.randn(k, d, device="cuda", dtype=dtype, requires_grad=True) for k in (n, m))
            clipfast.contrastive_loss(x, y, 14.3, **options, backend="triton").backward()
torch.cuda.synchronize()
"""


class PartError(Exception):
    """A part found something wrong or did not come to its end; the text is for the reader."""


@dataclass(frozen=True)
class Part:
    """A part of the run. `call` takes its seconds and returns a line on what it found."""

    name: str
    limit: float  # seconds
    call: Callable[[float], str]
    divisible: bool = False  # goes on where it was cut off, so that it may begin with less time than its limit


class Record:
    """What each part came to, in a file that is whole at any moment."""

    def __init__(self, path: Path, described: dict[str, Any]) -> None:
        self.path = path
        self.content = described | {"parts": {}}
        if path.exists() and environment.continues(path, described):
            self.content = json.loads(path.read_text())

    def state(self, name: str) -> str:
        """ "done", "failed", or empty."""
        part = self.content["parts"].get(name, {})
        return "done" if "line" in part else "failed" if part else ""

    def add(self, name: str, state: str, text: str, seconds: float) -> None:
        self.content["parts"][name] = {state: text, "seconds": round(seconds, 1)}
        environment.write_whole(self.path, self.content)


def run_parts(parts: Sequence[Part], record: Record, budget: float, report: Callable[[str], None]) -> list[str]:
    """Run the parts without a result in their order, then those that had failed; returns what is left or failed."""
    started = time.monotonic()
    for part in parts:
        if record.state(part.name) == "done":
            report(f"{part.name}: already done")
    open_parts = [part for part in parts if record.state(part.name) != "done"]
    for part in sorted(open_parts, key=lambda part: record.state(part.name) == "failed"):
        left = budget - (time.monotonic() - started)
        if left <= 0 or (left < part.limit and not part.divisible):
            report(f"{part.name}: not run, it takes up to {part.limit:.0f} s and {max(0.0, left):.0f} s are left")
            continue
        begin = time.monotonic()
        try:
            state, text = "line", part.call(min(left, part.limit))
        except (PartError, OSError, ValueError) as error:
            state, text = "failed", str(error)
        seconds = time.monotonic() - begin
        record.add(part.name, state, text, seconds)
        report(f"{part.name}: {'FAILED: ' * (state == 'failed')}{text} ({seconds:.0f} s)")
    return [part.name for part in parts if record.state(part.name) != "done"]


def plan(folder: Path) -> list[Part]:
    """The parts, most telling first; their limits are BUDGET together."""

    def command_line(name: str, *arguments: str) -> Callable[[float], str]:
        return lambda seconds: last_line(command(arguments, seconds, folder / f"{name}.log"))

    return [
        Part("check", 300, command_line("check", sys.executable, "-m", "pytest", "-q", "-m", "gpu")),
        Part("rates", 60, command_line("rates", sys.executable, "-m", "benchmarks.rates")),
        Part("first", 210, lambda seconds: measure(FIRST, folder, seconds), divisible=True),
        Part("memcheck", 120, lambda seconds: sanitize("memcheck", folder, seconds)),
        Part("racecheck", 120, lambda seconds: sanitize("racecheck", folder, seconds)),
        Part("grid", 450, lambda seconds: measure(gpu_grid(), folder, seconds), divisible=True),
        Part("tune", 240, lambda seconds: tune(folder, seconds)),
    ]


def sanitize(tool: str, folder: Path, seconds: float) -> str:
    """The kernels under one of compute-sanitizer's tools."""
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}{CUDA}")
    if sanitizer is None:
        return "skipped, compute-sanitizer is not installed"
    arguments = (sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", SANITIZED)
    command(arguments, seconds, folder / f"{tool}.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return "no errors"


def measure(cases: Sequence[Case], folder: Path, seconds: float) -> str:
    """The grid's cases that the result file lacks, with all candidates; one that ends the process is left out then.

    Raises:
        PartError: of `cases`, which come first in the grid or are the grid, some are left.
    """
    deadline = time.monotonic() + seconds
    path = folder / "speed.json"
    arguments = [sys.executable, "-m", "benchmarks", "run", "--device", "cuda", "--out", str(path)]
    failure = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            command([*arguments, "--budget", f"{left - GRACE:.0f}"], left, folder / "speed.log")
            break
        except PartError as error:
            failure = str(error)
            if not path.exists() or "trying" not in json.loads(path.read_text()):
                break
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    # Cut off for time: that is no candidate's fault.
    if result.pop("trying", None):
        environment.write_whole(path, result)
    done = set(cases) & {Case(row["dtype"], row["n"], row["d"], row["scale"]) for row in result["rows"]}
    if len(done) < len(cases):
        raise PartError(f"{len(done)} of {len(cases)} cases are in {path}; call again to go on from here\n{failure}")
    return f"{len(done)} cases are in {path}"


def tune(folder: Path, seconds: float) -> str:
    """Search for better tile shapes; the log has the lines for clipfast/tuning.py."""
    log = folder / "tune.log"
    output = command([sys.executable, "-m", "benchmarks.tune", f"{seconds - GRACE:.0f}"], seconds, log)
    return f"{output.count('Config(')} configurations are in {log}"


def command(arguments: Sequence[str], seconds: float, log: Path, **variables: str) -> str:
    """The output of a command that succeeds within the time; `log` has it as it comes.

    Raises:
        PartError: it failed or took too long; the text ends with the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.Popen(
            arguments, cwd=environment.ROOT, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            status = done.wait(seconds)
        except subprocess.TimeoutExpired:
            done.kill()
            done.wait()
            raise PartError(f"took more than {seconds:.0f} s:\n{log.read_text(errors='replace')[-TAIL:]}") from None
    text = log.read_text(errors="replace")
    if status:
        raise PartError(f"exit status {status}:\n{text[-TAIL:]}")
    return text


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def folder_of(out: Path | None, described: dict[str, Any]) -> Path:
    """Where the results go: `out`, or the first free folder for this device under runs/.

    Raises:
        SystemExit: `out` holds another run's results.
    """

    def fits(folder: Path) -> bool:
        record = folder / "record.json"
        return not record.exists() or environment.continues(record, described)

    if out is not None:
        if not fits(out):
            raise SystemExit(f"--out: {out} holds another run's results; give another folder, or remove it first")
        return out
    name = Path(environment.file_name(described["device"], described["threads"])).stem
    folders = (environment.ROOT / "runs" / "gpu" / f"{name}{f'-{k}' * (k > 1)}" for k in count(1))
    return next(folder for folder in folders if fits(folder))


def main(budget: float, out: Path | None, report: Callable[[str], None]) -> None:
    """All parts within the budget.

    Raises:
        SystemExit: there is no GPU, or parts failed or are left.
    """
    if not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks gpu: torch finds no CUDA or ROCm GPU here; this run is for one")
    described = environment.describe("cuda")
    folder = folder_of(out, described)
    left = run_parts(plan(folder), Record(folder / "record.json", described), budget, report)
    report(f"written: {folder}")
    if left:
        raise SystemExit(f"failed or left for another call: {', '.join(left)}")
