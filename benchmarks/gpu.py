"""`python -m benchmarks gpu`: check, sanitize and time everything on this machine's GPU, in one call.

Each stage that succeeds is written down and not repeated by a later call with the same device, versions and commit, so
a call that was cut off, or that ran out of its budget, goes on where it stopped. Nothing is timed after a red check.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.run import Runner

BUDGET = 570.0  # seconds
TAIL = 4000  # characters of a failed command's output
IDENTITY = ("device", "versions", "commit", "uncommitted_changes")

# Forward and backward of each kernel variant at odd shapes. The tensors come straight from the driver, so that the
# sanitizer sees their ends.
SANITIZED = """
import torch, clipfast
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for n, m, d in ((130, 150, 64), (257, 300, 100)):
        for normalize in (False, True):
            x, y = (torch.randn(k, d, device="cuda", dtype=dtype, requires_grad=True) for k in (n, m))
            clipfast.contrastive_loss(x, y, 14.3, normalize=normalize, backend="triton").backward()
torch.cuda.synchronize()
"""


class StageError(Exception):
    """A stage found something wrong; its text is for the reader."""


@dataclass(frozen=True)
class Stage:
    """A step of the run. `call` takes the seconds that are left and returns a line on what it did."""

    name: str
    call: Callable[[float], str]


class Record:
    """The stages that succeeded, in a file that is whole at any moment.

    Args:
        path: of the file.
        described: `environment.describe`'s entries; a record of other IDENTITY entries, or of changes that no commit
            names, is not continued.
    """

    def __init__(self, path: Path, described: dict[str, Any]) -> None:
        self.path = path
        self.content = {key: described[key] for key in IDENTITY} | {"stages": {}}
        if path.exists() and not described["uncommitted_changes"]:
            before = json.loads(path.read_text())
            if all(before[key] == described[key] for key in IDENTITY):
                self.content = before

    def __contains__(self, name: str) -> bool:
        return name in self.content["stages"]

    def add(self, name: str, line: str, seconds: float) -> None:
        self.content["stages"][name] = {"line": line, "seconds": round(seconds, 1)}
        environment.write_whole(self.path, self.content)


def run_stages(stages: Iterable[Stage], record: Record, budget: float, report: Callable[[str], None]) -> None:
    """Run the stages that the record lacks, in order.

    Raises:
        StageError: of the first stage that failed; later ones do not run.
    """
    started = time.monotonic()
    for stage in stages:
        if stage.name in record:
            report(f"{stage.name}: already done")
            continue
        left = budget - (time.monotonic() - started)
        if left <= 0:
            raise StageError(f"{stage.name}: the budget of {budget:.0f} s is spent; call again to go on from here")
        begin = time.monotonic()
        line = stage.call(left)
        seconds = time.monotonic() - begin
        record.add(stage.name, line, seconds)
        report(f"{stage.name}: {line} ({seconds:.0f} s)")


def check(seconds: float) -> str:
    """The tests that need a GPU."""
    return command([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], seconds).strip().splitlines()[-1]


def sanitize(tool: str, seconds: float) -> str:
    """The kernels under one of compute-sanitizer's tools."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return "skipped, compute-sanitizer is not installed"
    arguments = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", SANITIZED]
    command(arguments, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return "no errors"


def measure(seconds: float, report: Callable[[str], None]) -> str:
    """All cases and candidates, into the device's result file.

    Raises:
        StageError: cases are left for another call.
    """
    described = environment.describe("cuda")
    name = environment.file_name(described["device"], torch.get_num_threads())
    path = environment.out_path(None, name, described)
    runner = Runner("cuda", path, seconds)
    rows = runner.run(report)["rows"]
    measured = {(row["dtype"], row["n"], row["d"], row["scale"]) for row in rows}
    if len(measured) < len(runner.cases):
        raise StageError(f"{len(measured)} of {len(runner.cases)} cases are in {path}; call again to go on from here")
    return f"{len(measured)} cases are in {path}"


def tune(seconds: float) -> str:
    """Search for better tile shapes; the table that it prints goes into clipfast/tuning.py."""
    configs = import_module("benchmarks.tune").tune(torch.device("cuda"), seconds)
    return f"{len(configs)} configurations found"


def command(arguments: list[str], seconds: float, **variables: str) -> str:
    """The output of a command that succeeds within the time.

    Raises:
        StageError: it failed or took too long; the text ends with the end of its output.
    """
    try:
        done = subprocess.run(
            arguments,
            cwd=environment.ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        output = error.output.decode(errors="replace") if isinstance(error.output, bytes) else error.output or ""
        raise StageError(f"took more than {seconds:.0f} s:\n{output[-TAIL:]}") from None
    if done.returncode:
        raise StageError(f"exit status {done.returncode}:\n{done.stdout[-TAIL:]}")
    return done.stdout


def main(budget: float, tuned: bool, report: Callable[[str], None]) -> None:
    """All stages; with `tuned` the search for tile shapes in place of the timing.

    Raises:
        SystemExit: there is no GPU, or a stage failed.
    """
    if not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks gpu: torch finds no CUDA or ROCm GPU here; this run is for one")
    described = environment.describe("cuda")
    path = environment.ROOT / "runs" / "gpu" / environment.file_name(described["device"], torch.get_num_threads())
    last = Stage("tune", tune) if tuned else Stage("measure", lambda seconds: measure(seconds, report))
    stages = (
        Stage("check", check),
        Stage("memcheck", lambda seconds: sanitize("memcheck", seconds)),
        Stage("racecheck", lambda seconds: sanitize("racecheck", seconds)),
        last,
    )
    try:
        run_stages(stages, Record(path, described), budget, report)
    except StageError as error:
        raise SystemExit(str(error)) from None
