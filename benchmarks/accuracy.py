"""Errors of the loss and its gradients against float64: clipfast, and open_clip's formula plain and under autocast.

The features are rounded to each dtype first, and the truth is float64's of the rounded ones: what is compared is the
computation alone. An error is the largest of |value - exact|, relative to the largest of |exact|.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import clipfast
from benchmarks import environment
from benchmarks.baselines import Loss
from benchmarks.cases import DTYPES
from clipfast import reference

BATCH_SIZE, WIDTH = 4096, 512
SCALES = (14.3, 100.0)
# The noise in a text, in lengths of its image: matches have a cosine of 0.24. With one of 0.45 the loss at scale 100 is
# already 1e-10, of which the formulas that subtract logits keep no digit.
NOISE = 4.0
VALUES = ("loss", "dx", "dy", "dscale")


def open_clip_loss(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """open_clip 3.3.0, ClipLoss.forward in one process; every dtype is PyTorch's choice."""
    labels = torch.arange(len(x), device=x.device)
    return (cross_entropy(s * x @ y.T, labels) + cross_entropy(s * y @ x.T, labels)) / 2


def under_autocast(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """open_clip's loss in its training loop: bfloat16, but float16 for features in float16."""
    dtype = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    with torch.autocast(x.device.type, dtype=dtype):
        return open_clip_loss(x, y, s)


LOSSES: dict[str, Loss] = {
    "clipfast": clipfast.contrastive_loss,
    "open_clip": open_clip_loss,
    "open_clip, autocast": under_autocast,
}


@functools.cache
def features(n: int) -> tuple[Tensor, Tensor]:  # [n, d], [n, d]
    """Normalized pairs in float64, as far apart as in a model under training."""
    generator = torch.Generator().manual_seed(n)
    x, noise = (normalize(torch.randn(n, WIDTH, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    return x, normalize(x + NOISE * noise, dim=1)


def evaluate(loss: Callable[..., Tensor], x: Tensor, y: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The loss and its gradients, in float64."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, scale)]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    return {name: t.detach().double() for name, t in zip(VALUES, (value, *gradients), strict=True)}


def measure(dtype: str, scale: float, n: int, device: str) -> list[dict[str, Any]]:
    """Every loss's relative errors at one dtype and scale."""
    x, y = (t.to(device, DTYPES[dtype]) for t in features(n))
    s = torch.tensor(scale, device=device)
    exact = evaluate(reference.contrastive_loss, x.double(), y.double(), s.double())
    rows = []
    for name, loss in LOSSES.items():
        got = evaluate(loss, x, y, s)
        errors = {
            value: ((got[value] - exact[value]).abs().max() / exact[value].abs().max()).item() for value in VALUES
        }
        rows.append(
            {"dtype": dtype, "scale": scale, "loss": name, "exact_loss": exact["loss"].item(), "errors": errors}
        )
        print(rows[-1], file=sys.stderr)
    return rows


def run(device: str, n: int = BATCH_SIZE) -> dict[str, Any]:
    """All dtypes and scales, as the content of a result file."""
    rows = [row for dtype in DTYPES for scale in SCALES for row in measure(dtype, scale, n, device)]
    chosen = clipfast.explain(n, WIDTH, device=device).chosen
    return environment.describe(device) | {"backend": chosen, "n": n, "d": WIDTH, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with what was computed, device, date and command."""
    lines = ["| features | scale | formula | loss | dx | dy | dscale |", "|---|---:|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        cells = " | ".join(f"{row['errors'][value]:.1e}" for value in VALUES)
        lines.append(f"| {row['dtype']} | {row['scale']:g} | {row['loss']} | {cells} |")
    exact = {row["scale"]: row["exact_loss"] for row in result["rows"] if row["dtype"] == "float32"}
    losses = ", ".join(f"{loss:.2g} at scale {scale:g}" for scale, loss in exact.items())
    note = (
        f"n = {result['n']}, d = {result['d']}; the loss is {losses}. Autocast is to bfloat16, for float16 features to "
        f"float16. Backend `{result['backend']}`; {environment.credit(result)}."
    )
    return "\n".join([*lines, "", note])


def load() -> list[dict[str, Any]]:
    """The committed results, one for each device."""
    return [json.loads(path.read_text()) for path in sorted(environment.RESULTS.glob("accuracy-*.json"))]


def main(device: str, out: Path | None = None) -> None:
    described = environment.describe(device)
    path = environment.out_path(out, f"accuracy-{environment.file_name(described['device'], described['threads'])}")
    environment.write_whole(path, run(device))
    print(f"written: {path}")
