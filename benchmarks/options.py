"""What each option of the loss family costs on the CPU: forward and backward, beside the plain loss in the same rounds.

Rounds are interleaved, in rotating order, as in benchmarks/run.py. P is a median over that of torch.mm [n, d] x [d, n].
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import clipfast
from benchmarks import environment, run
from benchmarks.baselines import Loss, open_clip_formula
from benchmarks.cases import Case, inputs

BATCH_SIZE, WIDTH, ROUNDS = 4096, 512, 15
BACKEND = "cpu"
PLAIN = "contrastive_loss"


def losses(n: int) -> dict[str, Loss]:
    """By name as the table shows it. Of the ids, drawn from n, 63% have an equal one."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(n, (n,), generator=generator)
    teacher = [t.detach() for t in next(inputs(Case("float32", n, WIDTH, 100.0), "cpu"))]
    plain = functools.partial(clipfast.contrastive_loss, backend=BACKEND)

    def with_metrics(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        loss: Tensor = plain(x, y, s, return_metrics=True)[0]
        return loss

    def siglip(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return clipfast.siglip_loss(x, y, s, -10.0, backend=BACKEND)

    def distillation(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return clipfast.distillation_loss(x, y, s, *teacher, backend=BACKEND)

    # In front of the loss, the head: x and y stand for the encoders' outputs.
    w_i, w_t = (torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5) for _ in range(2))

    def projected(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return clipfast.projected_contrastive_loss(x, y, w_i, w_t, s, backend=BACKEND)

    def layers(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return plain(normalize(x @ w_i, dim=1), normalize(y @ w_t, dim=1), s)

    def dense_layers(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return open_clip_formula(normalize(x @ w_i, dim=1), normalize(y @ w_t, dim=1), s)

    return {
        PLAIN: plain,
        'image_ids, same_id="ignore"': functools.partial(plain, image_ids=ids, same_id="ignore"),
        'image_ids, same_id="positive"': functools.partial(plain, image_ids=ids, same_id="positive"),
        "return_metrics=True": with_metrics,
        "label_smoothing=0.1": functools.partial(plain, label_smoothing=0.1),
        "siglip_loss": siglip,
        "distillation_loss": distillation,
        "projected_contrastive_loss": projected,
        "contrastive_loss of normalize(x @ w)": layers,
        "open_clip's formula of normalize(x @ w)": dense_layers,
    }


def saved_bytes(loss: Loss, *tensors: Tensor) -> int:
    """What autograd keeps for the backward pass, the inputs not counted."""
    with environment.SavedStorages() as saved:
        loss(*tensors)
    return sum(count for address, count in saved.sizes.items() if address not in {t.data_ptr() for t in tensors})


def measure(n: int = BATCH_SIZE, rounds: int = ROUNDS) -> dict[str, Any]:
    """All options, as the content of a result file."""
    sets = inputs(Case("float32", n, WIDTH), "cpu")
    timed = losses(n)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    gemms: list[float] = []
    saved = {}
    for name, loss in timed.items():  # warm-up
        run.once(loss, *next(sets), "cpu")
        saved[name] = saved_bytes(loss, *next(sets))
    run.gemm(*next(sets), "cpu")
    names = list(timed)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(run.once(timed[name], *next(sets), "cpu")[1])
        gemms.append(run.gemm(*next(sets), "cpu"))
    unit, plain = statistics.median(gemms), statistics.median(seconds[PLAIN])
    rows = []
    for name, values in seconds.items():
        total = run.spread(values)
        rows.append(
            {
                "loss": name,
                "total": total,
                "products": total["median"] / unit,
                "ratio": total["median"] / plain,
                "saved_bytes": saved[name],
            }
        )
        print(rows[-1], file=sys.stderr)
    sizes = {"backend": BACKEND, "n": n, "d": WIDTH, "rounds": rounds}
    return environment.describe("cpu") | sizes | {"gemm": run.spread(gemms), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with what was computed, device, date and command."""
    counts = "saved_bytes" in result["rows"][0]
    counted = "Saved is what waits for the backward pass, the inputs not counted. " if counts else ""
    lines = ["| | ms | P | of the plain loss |" + " MiB saved |" * counts, "|---|---:|---:|---:|" + "---:|" * counts]
    for row in result["rows"]:
        milliseconds = 1e3 * row["total"]["median"]
        saved = f" {row['saved_bytes'] / 2**20:,.1f} |" if counts else ""
        lines.append(f"| `{row['loss']}` | {milliseconds:,.1f} | {row['products']:.1f} | {row['ratio']:.2f} |{saved}")
    note = (
        f"float32, n = {result['n']}, d = {result['d']}, forward and backward; medians of {result['rounds']} "
        f"interleaved rounds. {counted}Backend `{result['backend']}`; {environment.credit(result)}."
    )
    return "\n".join([*lines, "", note])


def load() -> list[dict[str, Any]]:
    """The committed results, one for each device."""
    return [json.loads(path.read_text()) for path in sorted(environment.RESULTS.glob("options-*.json"))]


def main(out: Path | None = None, n: int = BATCH_SIZE) -> None:
    described = environment.describe("cpu")
    path = environment.out_path(out, f"options-{environment.file_name(described['device'], described['threads'])}")
    environment.write_whole(path, measure(n))
    print(f"written: {path}")
