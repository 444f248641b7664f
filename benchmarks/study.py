"""What a large batch costs and brings: memory and time of the loss and of a whole step, and held-out recall.

Cost: the dense formula, clipfast, and clipfast with cached steps, each case in a process of its own. Recall: runs of
`python -m clipfast.train` on shards of emoji (examples/emoji_shards.py) that differ in the batch size alone, and in the
learning rate and warm-up that go with it. All take as many epochs, so a larger batch takes fewer steps; the encoders
always see micro-batches of 64, so that batch normalization is the same.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

import clipfast
from benchmarks import environment
from benchmarks.baselines import Loss, open_clip_formula
from clipfast.training.sources import WebDataset

LOSS_SIZES, STEP_SIZES, WIDTH, MICRO_BATCH = (1024, 4096, 8192), (256, 1024), 512, 64
RECALL_SIZES, EPOCHS = (64, 256, 1024, 4096), 8
LR, LR_BATCH = 1e-3, 256  # the rate follows the square root of the batch
DENSE, CLIPFAST, CACHED = "dense", "clipfast", "clipfast, cached step"
ROUNDS = 2
LOSSES: dict[str, Loss] = {DENSE: open_clip_formula, CLIPFAST: clipfast.ContrastiveLoss()}
MODEL = ("--model", "resnet-tiny", "--text", "cbow")
RECALLS = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 10)]


def loss_cost(name: str, n: int) -> dict[str, float]:
    """Peak bytes and the least seconds of forward and backward of the loss alone."""

    def once(n: int) -> None:
        x, y = (normalize(torch.randn(n, WIDTH), dim=1).requires_grad_() for _ in range(2))
        torch.autograd.backward(LOSSES[name](x, y, torch.tensor(14.3, requires_grad=True)))

    return _measured(once, n)


def step_cost(name: str, n: int) -> dict[str, float]:
    """The same of a whole step, both encoders included, without the optimizer: vit-tiny, a bag of words, float32."""
    from clipfast.models import create_model

    model = create_model("vit-tiny", vocab_size=2000, text="cbow")

    def once(n: int) -> None:
        batch = torch.randn(n, 3, 48, 48), torch.randint(1, 2000, (n, 12))
        model.zero_grad()
        if name == CACHED:
            clipfast.cached_step(model, batch, clipfast.ContrastiveLoss(), micro_batch=MICRO_BATCH)
        else:
            torch.autograd.backward(LOSSES[name](*model(*batch).values()))

    return _measured(once, n)


def _measured(once: Any, n: int) -> dict[str, float]:
    once(MICRO_BATCH)  # threads, libraries and their buffers
    memory, seconds = environment.PeakMemory("cpu"), []
    memory.start()
    for _ in range(ROUNDS):
        started = time.perf_counter()
        once(n)
        seconds.append(time.perf_counter() - started)
    return {"peak_bytes": memory.stop(), "seconds": min(seconds)}


def cost(loss_sizes: Sequence[int] = LOSS_SIZES, step_sizes: Sequence[int] = STEP_SIZES) -> list[dict[str, Any]]:
    """A row for each case."""
    cases = [("loss", loss_cost, name, n) for n in loss_sizes for name in LOSSES]
    cases += [("step", step_cost, name, n) for n in step_sizes for name in (*LOSSES, CACHED)]
    rows = []
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["benchmarks.study"])  # imports torch once
    for part, call, name, n in cases:
        with ProcessPoolExecutor(1, mp_context=server) as pool:
            rows.append({"part": part, "how": name, "n": n} | pool.submit(call, name, n).result())
        print(rows[-1], file=sys.stderr)
    return rows


def recall(shards: Path, sizes: Sequence[int] = RECALL_SIZES, epochs: int = EPOCHS) -> list[dict[str, Any]]:
    """A row for each batch size: the run's command, steps, and recall on the held-out concepts after its last epoch."""
    train = f"{shards}/train-{{00000..{len(list(shards.glob('train-*.tar'))) - 1:05d}}}.tar"
    pairs = len(WebDataset(train))
    rows: list[dict[str, Any]] = []
    for n in sizes:
        steps = epochs * (pairs // n)
        flags = [
            *("--train-data", train),
            *("--val-data", str(shards / "held-out.tar"), *MODEL, "--vocab-size", "2000", "--workers", "0"),
            *("--batch-size", str(n), "--accum-freq", str(max(1, n // MICRO_BATCH)), "--epochs", str(epochs)),
            *("--lr", f"{LR * (n / LR_BATCH) ** 0.5:.2g}", "--warmup", str(max(1, steps // 10))),
            *("--val-frequency", str(epochs), "--save-frequency", str(epochs)),
        ]
        with tempfile.TemporaryDirectory() as logs:
            started = time.perf_counter()
            command = [sys.executable, "-m", "clipfast.train", *flags, "--logs", logs, "--name", "run"]
            subprocess.run(command, check=True, cwd=environment.ROOT)
            seconds = time.perf_counter() - started
            with Path(logs, "run", "evaluation.csv").open() as file:
                last = list(csv.DictReader(file))[-1]
        shown = " ".join(flags).replace(str(shards), "SHARDS")
        rows.append({"n": n, "steps": steps, "pairs": pairs, "epochs": epochs, "seconds": seconds, "flags": shown})
        rows[-1] |= {name: float(last[name]) for name in RECALLS} | {"held_out": int(last["pairs"])}
        print(rows[-1], file=sys.stderr)
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown: the costs, then recall against the batch size."""
    lines = []
    if result["cost"]:
        lines += ["| | n | | peak, MiB | seconds |", "|---|---:|---|---:|---:|"]
        lines += [
            f"| {row['part']} | {row['n']} | {row['how']} | {row['peak_bytes'] / 2**20:,.0f} | {row['seconds']:.3f} |"
            for row in result["cost"]
        ]
    if rows := result["recall"]:
        titles = [name.replace("image_to_text", "by drawing").replace("text_to_image", "by name") for name in RECALLS]
        lines += ["", f"| n | steps | {' | '.join(name.replace('_', ' ') for name in titles)} |"]
        lines += ["|---:" * (2 + len(RECALLS)) + "|"]
        lines += [
            f"| {row['n']} | {row['steps']} | {' | '.join(f'{row[name]:.1%}' for name in RECALLS)} |" for row in rows
        ]
    return "\n".join(lines).strip()


def plot(result: dict[str, Any], path: Path) -> None:
    """Memory and time of a whole step and of the loss alone, and recall, against the batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    memory, seconds, learned = figure.subplots(1, 3)
    for axes, field, unit in ((memory, "peak_bytes", 2**20), (seconds, "seconds", 1)):
        for part, style in (("loss", ":"), ("step", "-")):
            for color, name in enumerate((DENSE, CLIPFAST, CACHED)):
                rows = [row for row in result["cost"] if (row["part"], row["how"]) == (part, name)]
                if rows:
                    values = [row[field] / unit for row in rows]
                    label = f"{part}: {name}"
                    axes.plot([row["n"] for row in rows], values, f"o{style}", color=f"C{color}", label=label)
        axes.set(xlabel="batch size")
        if result["cost"]:
            axes.set_yscale("log")
            axes.set_xscale("log", base=2)
    memory.set(title="peak memory, MiB")
    memory.legend(frameon=False, fontsize=8)
    seconds.set(title="forward and backward, s")
    for name in RECALLS:
        values = [100 * row[name] for row in result["recall"]]
        label = name.replace("_", " ")
        learned.plot([row["n"] for row in result["recall"]], values, "o-", label=label)
    learned.set(title="held-out recall, %", xlabel="batch size, equal epochs", ylim=(0, None))
    if result["recall"]:
        learned.set_xscale("log", base=2)
    learned.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main(shards: Path | None, only: str, out: Path | None) -> None:
    """Measure what is asked for; what is not is kept from a result that lies at `out`."""
    described = environment.describe("cpu")
    path = out or environment.out_path(
        None, f"study-{environment.file_name(described['device'], described['threads'])}"
    )
    result: dict[str, Any] = {"cost": [], "recall": []}
    if path.exists():
        result = json.loads(path.read_text())
    if only in ("", "cost"):
        result |= {"cost": cost(), "cost_run": described}
    if only in ("", "recall"):
        if shards is None:
            raise SystemExit("--shards: the folder that examples/emoji_shards.py made is needed")
        result |= {"recall": recall(shards), "recall_run": described}
    environment.write_whole(path, result)
    plot(result, path.with_suffix(".png"))
    print(table(result))
    print(f"written: {path}")
