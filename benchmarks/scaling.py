"""Many ranks: products, bytes and time measured on gloo processes of this machine, and a model of many GPUs.

The model's figures are no measurements: products over a compute rate, and bytes sent over a bandwidth, both of which
are arguments.
"""

from __future__ import annotations

import datetime
import functools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn import functional as gathering  # deprecated; what open_clip calls
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.flop_counter import FlopCounterMode

import clipfast
from benchmarks import environment
from clipfast import dispatch, predictions, schemes

ROWS, WIDTH = 512, 512  # of each rank
ROUNDS = 5
GPUS = tuple(8 << k for k in range(10))
ROWS_OF_GPU = 1024


class Setting(NamedTuple):
    """What the model of GPUs takes for granted."""

    tflops: float  # of matrix products, per GPU
    gigabytes: float  # per second, that a GPU sends


def open_clip_formula(x: Tensor, y: Tensor, s: float, local: bool) -> Tensor:
    """open_clip 3.3.0, ClipLoss.forward on several ranks with gather_with_grad, and with local_loss or without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        all_x, all_y = (torch.cat(gathering.all_gather(t)) for t in (x, y))  # type: ignore[no-untyped-call]
    if local:
        per_image, per_text = s * x @ all_y.T, s * y @ all_x.T
    else:
        per_image = s * all_x @ all_y.T
        per_text = per_image.T
    labels = torch.arange(len(per_image)) + (dist.get_rank() * len(x) if local else 0)
    return (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2


def clipfast_loss(x: Tensor, y: Tensor, s: float, scheme: str) -> Tensor:
    # Every number of ranks does as much, for no rank keeps its logits.
    return clipfast.contrastive_loss(x, y, s, group=dist.group.WORLD, scheme=scheme, keep_bytes=0)


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "open_clip": functools.partial(open_clip_formula, local=False),
    "open_clip, local_loss": functools.partial(open_clip_formula, local=True),
    **{
        f"clipfast, {scheme}": functools.partial(clipfast_loss, scheme=scheme)
        for scheme in (schemes.GATHER, schemes.RING)
    },
}


class Counter:
    """Bytes that this rank sends, and multiply-adds of its backends' products, while it is entered."""

    def __init__(self) -> None:
        self.sent = self.products = 0
        self.patches = ExitStack()

    def __enter__(self) -> Counter:
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        counts: list[tuple[Any, str, Callable[..., None]]] = [
            (dist, gather, lambda received, own, group: self._send(len(received) - len(own))),
            (dist, "all_gather", lambda received, own, group: self._send((len(received) - 1) * own.nbytes)),
            (dist, "scatter", lambda own, parts, *_, group: self._send((len(parts or [0]) - 1) * own.nbytes)),
            (dist, "all_to_all_single", self._exchange),
            (dist, "batch_isend_irecv", self._pass_on),
        ]
        for backend in dispatch.BACKENDS:
            counts.append((backend, "forward", lambda block, *_: self._multiply(block, 1)))
            names = [name for name in ("backward", "symmetric_gradients") if hasattr(backend, name)]
            counts += [(backend, name, self._multiply_gradients) for name in names]
            counts.append((backend, "sigmoid", lambda block, *_: self._multiply(block, 3)))
            counts.append((backend, "distillation", lambda block, *_: self._multiply(block, 4)))
        for owner, name, count in counts:
            self.patches.enter_context(mock.patch.object(owner, name, self._counted(getattr(owner, name), count)))
        return self

    def __exit__(self, *_: object) -> None:
        self.patches.close()

    def _counted(self, function: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            count(*arguments, **keywords)
            return function(*arguments, **keywords)

        return counted

    def _send(self, count: int) -> None:
        self.sent += count

    def _exchange(self, arriving: Any, leaving: Any, arrive: list[int], leave: list[int], group: Any) -> None:
        kept = leave[dist.get_rank(group)]
        self._send((len(leaving) - kept) * leaving[:1].numel())

    def _pass_on(self, operations: list[Any]) -> None:
        self._send(sum(o.tensor.numel() * o.tensor.itemsize for o in operations if o.op is dist.isend))

    def _multiply_gradients(self, block: Any, of: Any, *_: Any) -> None:
        """`of` are Weights or Statistics, with the kept logits if there are any."""
        self._multiply(block, 3 - (of.kept is not None))

    def _multiply(self, block: Any, products: int) -> None:
        self.products += products * block.n * block.m * block.d


def measure(ranks: int, rows: int = ROWS, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Of each loss the median seconds of forward and backward, and what a rank sends and multiplies in them."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure, (ranks, folder, rows, rounds), nprocs=ranks)  # type: ignore[no-untyped-call]
        return json.loads((Path(folder) / "rows.json").read_text())  # type: ignore[no-any-return]


def _measure(rank: int, ranks: int, folder: str, rows: int, rounds: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    torch.manual_seed(rank)
    x, y = (normalize(torch.randn(rows, WIDTH)).requires_grad_() for _ in range(2))

    def step(loss: Callable[[Tensor, Tensor, float], Tensor]) -> float:
        dist.barrier()
        started = time.perf_counter()
        loss(x, y, 14.3).backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - started

    found = []
    for name, loss in LOSSES.items():
        with Counter() as counter, FlopCounterMode(display=False) as of_pytorch:
            step(loss)
        products = (counter.products or of_pytorch.get_total_flops() / 2) / ((ranks * rows) ** 2 * WIDTH)
        found.append({"ranks": ranks, "candidate": name, "products": products, "bytes_sent": counter.sent})
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(rounds):
        for name, loss in LOSSES.items():
            seconds[name].append(step(loss))
    for row in found:
        row["seconds"] = statistics.median(seconds[str(row["candidate"])])
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(found))
    dist.barrier()
    time.sleep(0.5)  # gloo's threads may still hold the last message
    dist.destroy_process_group()


def modelled(gpus: int, setting: Setting) -> list[dict[str, Any]]:
    """A step's loss on so many GPUs with bfloat16 features: milliseconds, transfers hidden or not."""
    rows, total = ROWS_OF_GPU, ROWS_OF_GPU * gpus
    product = 2 * total * total * WIDTH / (setting.tflops * 1e12)  # seconds of 1 P on one GPU
    # Both towers gathered, both gradients reduce-scattered, in the features' dtype; 3 P, or 6 P of the own rows.
    both_towers = 4 * (gpus - 1) * rows * WIDTH * 2
    found = {"open_clip": (3.0, both_towers), "open_clip, local_loss": (6 / gpus, both_towers)}
    for scheme in (schemes.GATHER, schemes.RING):
        prediction = predictions.predict(gpus, rows, rows, WIDTH, torch.bfloat16, scheme)
        found[f"clipfast, {scheme}"] = (prediction.products, prediction.forward_bytes + prediction.backward_bytes)
    result = []
    for name, (products, sent) in found.items():
        compute, transfer = 1e3 * products * product, 1e3 * sent / (setting.gigabytes * 1e9)
        result.append(
            {
                "gpus": gpus,
                "candidate": name,
                "products": products,
                "bytes_sent": sent,
                "ms_overlapped": max(compute, transfer),
                "ms_in_turn": compute + transfer,
            }
        )
    return result


def table(result: dict[str, Any]) -> str:
    """What was measured, then what the model says."""
    lines = ["| ranks | | P per rank | MB sent per rank | ms |", "|---:|---|---:|---:|---:|"]
    lines += [
        f"| {row['ranks']} | {row['candidate']} | {row['products']:.2f} | {row['bytes_sent'] / 1e6:.2f} "
        f"| {1e3 * row['seconds']:.1f} |"
        for row in result["measured"]
    ]
    lines += ["", "| GPUs | | P per GPU | MB sent | ms, overlapped | ms, in turn |", "|---:|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row['gpus']} | {row['candidate']} | {row['products']:.4f} | {row['bytes_sent'] / 1e6:,.0f} "
        f"| {row['ms_overlapped']:,.2f} | {row['ms_in_turn']:,.2f} |"
        for row in result["modelled"]
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """The model's time against the number of GPUs; where transfers are hidden, and dotted where they are not."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for color, name in enumerate(dict.fromkeys(row["candidate"] for row in result["modelled"])):
        rows = [row for row in result["modelled"] if row["candidate"] == name]
        for key, style, label in (("ms_overlapped", "-", name), ("ms_in_turn", ":", None)):
            axes.plot([r["gpus"] for r in rows], [r[key] for r in rows], style, color=f"C{color}", label=label)
    axes.set(xscale="log", yscale="log", xlabel=f"GPUs, {ROWS_OF_GPU} pairs on each", ylabel="ms, modelled")
    axes.legend()
    figure.savefig(path, dpi=120)


def run(setting: Setting, ranks: Sequence[int], rows: int = ROWS, rounds: int = ROUNDS) -> dict[str, Any]:
    result = environment.describe("cpu") | {"rows_per_rank": rows, "d": WIDTH, "setting": setting._asdict()}
    result["measured"] = [row for count in ranks for row in measure(count, rows, rounds)]
    result["modelled"] = [row for gpus in GPUS for row in modelled(gpus, setting)]
    return result


def main(setting: Setting, ranks: Sequence[int], out: Path | None, report: Callable[[str], None]) -> None:
    described = environment.describe("cpu")
    path = environment.out_path(out, f"scaling-{environment.file_name(described['device'], described['threads'])}")
    result = run(setting, ranks)
    environment.write_whole(path, result)
    plot(result, path.with_suffix(".png"))
    report(table(result))
    report(f"written: {path}")
