"""The working tree against a git revision: both are installed apart, and short timing processes take turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from benchmarks.environment import ROOT

TURNS = 5

# What a timing process runs, in either installation: argv holds its folder, n, d and the dtype.
PROGRAM = """
import json, statistics, sys, time
# An editable install would come before the folder that was asked for.
sys.meta_path[:] = [finder for finder in sys.meta_path if "clipfast" not in getattr(type(finder), "__module__", "")]
sys.path.insert(0, sys.argv[1])
import torch, clipfast
assert clipfast.__file__.startswith(sys.argv[1]), clipfast.__file__
n, d, dtype = int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
device = "cuda" if torch.cuda.is_available() else "cpu"
x, y = (torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=1).to(dtype) for _ in range(2))
s = torch.tensor(14.3, device=device, requires_grad=True)
times = []
begin = time.perf_counter()
while len(times) < 4 or time.perf_counter() - begin < 1:
    start = time.perf_counter()
    clipfast.contrastive_loss(x.requires_grad_(), y.requires_grad_(), s).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
print(json.dumps(statistics.median(times[1:])))
"""


def install(source: Path, target: Path) -> None:
    """Build and install a source tree into a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(command, check=True)


def export(revision: str, target: Path) -> None:
    """A revision's files.

    Raises:
        ValueError: there is no such revision.
    """
    done = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise ValueError(f"--base: git knows no revision {revision!r}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(target, filter="data")


def seconds(site: Path, n: int, d: int, dtype: str) -> float:
    """The median time of forward and backward in one process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(site), str(n), str(d), dtype],
        cwd=site,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return float(json.loads(done.stdout))


def print_ratios(revision: str, sizes: Sequence[int], widths: Sequence[int], dtypes: Sequence[str]) -> None:
    """Time both in turns and print the ratios, working tree over revision: below 1 the working tree is faster."""
    with tempfile.TemporaryDirectory() as folder:
        base_source, base, ours = (Path(folder, name) for name in ("source", "base", "ours"))
        export(revision, base_source)
        install(base_source, base)
        install(ROOT, ours)
        for n in sizes:
            for d in widths:
                for dtype in dtypes:
                    pairs = [(seconds(ours, n, d, dtype), seconds(base, n, d, dtype)) for _ in range(TURNS)]
                    ratios = sorted(a / b for a, b in pairs)
                    now, then = (statistics.median(times) for times in zip(*pairs, strict=True))
                    print(
                        f"n={n} d={d} {dtype}: {1e3 * now:.2f} ms, {revision} {1e3 * then:.2f} ms, "
                        f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
                    )
