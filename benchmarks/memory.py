"""Memory of the loss against the batch size: the dense formula and clipfast, bytes saved for backward and peak.

`python -m benchmarks.memory` measures, writes benchmarks/results/memory-<processor>.json and puts its table into
README.md between the marker comments; `--table` only puts the table of the committed result there. Every case runs in a
process of its own. The peak is the largest resident set during forward and backward less the resident set before them,
so it counts the gradients and all temporaries, and not the inputs. Linux only: it reads /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import clipfast

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BATCH_SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
WIDTH = 512
# The dense formula's peak is under this many copies of the logits; where they do not fit, it is not run.
DENSE_COPIES = 5


def open_clip_formula(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """What open_clip 3.3.0's ClipLoss computes in one process: two products, two n*n matrices of logits."""
    logits_per_image = logit_scale * image_features @ text_features.T
    logits_per_text = logit_scale * text_features @ image_features.T
    labels = torch.arange(len(image_features))
    return (cross_entropy(logits_per_image, labels) + cross_entropy(logits_per_text, labels)) / 2


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dense": open_clip_formula,
    "clipfast": clipfast.ContrastiveLoss(),
}


def measure(name: str, n: int) -> dict[str, int]:
    """Bytes saved for backward and peak bytes of one forward and backward pass in this process."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step(n: int) -> int:
        x, y = (normalize(torch.randn(n, WIDTH), dim=1).requires_grad_() for _ in range(2))
        logit_scale = torch.tensor(14.3, requires_grad=True)
        saved.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present resident set
        before = _status_bytes("VmRSS")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = LOSSES[name](x, y, logit_scale)
        torch.autograd.backward(loss)
        return _status_bytes("VmHWM") - before

    step(64)  # threads, libraries and their buffers
    peak = step(n)
    return {"saved_bytes": sum(saved.values()), "peak_bytes": peak}


def _status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def run() -> dict[str, Any]:
    """All cases, as the content of a result file."""
    total = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for n in BATCH_SIZES:
        for name in LOSSES:
            row: dict[str, Any] = {"loss": name, "n": n}
            needed = DENSE_COPIES * n * n * 4
            if name == "dense" and needed > total:
                row["not_run"] = f"needs about {needed >> 30} GiB of {total >> 30}"
            else:
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    row |= pool.submit(measure, name, n).result()
            rows.append(row)
            print(row, file=sys.stderr)
    return {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.memory",
        "versions": {
            "clipfast": clipfast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "backend": clipfast.explain(BATCH_SIZES[-1], WIDTH).chosen,
        "d": WIDTH,
        "dtype": "float32",
        "rows": rows,
    }


def _processor() -> str:
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1].strip() if match else platform.processor()


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, MiB, with its device, date and command."""
    rows = {(row["loss"], row["n"]): row for row in result["rows"]}
    lines = [
        "| n | saved for backward: dense | clipfast | peak: dense | clipfast |",
        "|---:|---:|---:|---:|---:|",
    ]
    for n in sorted({n for _, n in rows}):
        cells = [_mib(rows[loss, n], f"{kind}_bytes") for kind in ("saved", "peak") for loss in ("dense", "clipfast")]
        lines.append(f"| {n} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += [
        "",
        f"MiB, {result['dtype']}, d = {result['d']}; {result['device']}, {result['threads']} threads, "
        f"backend `{result['backend']}`, {result['date']}, {versions}; `{result['command']}`.",
    ]
    return "\n".join(lines)


def _mib(row: dict[str, Any], field: str) -> str:
    return row["not_run"] if "not_run" in row else f"{row[field] / 2**20:,.0f}"


def result_file() -> Path:
    """The committed result, of which there is one."""
    (path,) = RESULTS.glob("memory-*.json")
    return path


def with_table(readme: str, result: dict[str, Any]) -> str:
    """The README's text with the result's table between its markers."""
    begin, end = "<!-- benchmarks:memory -->", "<!-- /benchmarks:memory -->"
    if begin not in readme or end not in readme:
        raise ValueError(f"README.md: has no {begin} ... {end}; the table goes between these two lines")
    head, _, rest = readme.partition(begin)
    tail = rest.partition(end)[2]
    return f"{head}{begin}\n{table(result)}\n{end}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--table", action="store_true", help="only write the committed result's table into README.md")
    if not parser.parse_args().table:
        result = run()
        for old in RESULTS.glob("memory-*.json"):
            old.unlink()
        name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"memory-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), json.loads(result_file().read_text())))


if __name__ == "__main__":
    main()
