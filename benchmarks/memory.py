"""Memory of the loss against the batch size: the dense formula and clipfast, bytes saved for backward and peak.

Every case runs in a process of its own. The peak is the largest resident set during forward and backward less the
resident set before them, so it counts the gradients and all temporaries, and not the inputs. Linux only.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

import clipfast
from benchmarks import environment
from benchmarks.baselines import Loss, open_clip_formula

BATCH_SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
WIDTH = 512
# The dense formula's peak is under this many copies of the logits; where they do not fit, it is not run.
DENSE_COPIES = 5
LOSSES: dict[str, Loss] = {"dense": open_clip_formula, "clipfast": clipfast.ContrastiveLoss()}


def measure(name: str, n: int) -> dict[str, int]:
    """Bytes saved for backward and peak bytes of one forward and backward pass in this process."""
    memory = environment.PeakMemory("cpu")

    def step(n: int) -> dict[str, int]:
        x, y = (normalize(torch.randn(n, WIDTH), dim=1).requires_grad_() for _ in range(2))
        logit_scale = torch.tensor(14.3, requires_grad=True)
        saved = environment.SavedStorages()
        memory.start()
        with saved:
            loss = LOSSES[name](x, y, logit_scale)
        torch.autograd.backward(loss)
        return {"saved_bytes": saved.total, "peak_bytes": memory.stop()}

    step(64)  # threads, libraries and their buffers
    return step(n)


def run() -> dict[str, Any]:
    """All cases, as the content of a result file."""
    total = environment.memory_bytes("cpu")
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
    described = environment.describe("cpu") | {"command": "python -m benchmarks memory"}
    chosen = clipfast.explain(BATCH_SIZES[-1], WIDTH).chosen
    return described | {"backend": chosen, "d": WIDTH, "dtype": "float32", "rows": rows}


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
    note = f"MiB, {result['dtype']}, d = {result['d']}, backend `{result['backend']}`; {environment.credit(result)}."
    return "\n".join([*lines, "", note])


def _mib(row: dict[str, Any], field: str) -> str:
    return row["not_run"] if "not_run" in row else f"{row[field] / 2**20:,.0f}"


def result_file() -> Path:
    """The committed result, of which there is one."""
    (path,) = environment.RESULTS.glob("memory-*.json")
    return path


def main(out: Path | None = None) -> None:
    described = environment.describe("cpu")
    path = environment.out_path(out, f"memory-{environment.file_name(described['device'], described['threads'])}")
    environment.write_whole(path, run())
    print(f"written: {path}")


def load() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(result_file().read_text())
    return result
