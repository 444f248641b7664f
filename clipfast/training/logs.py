"""What a run tells while it goes: log.csv, evaluation.csv, TensorBoard, a progress bar."""

from __future__ import annotations

import csv
import io
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from clipfast.emoji.data import require
from clipfast.training.checkpoint import write_whole


def _peak() -> int:
    """Most bytes that this process has held: on the GPU if there is one, else in all."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Table:
    """A csv file with a line for some of the steps; what comes after the step at which a run goes on is cut."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            # The last line may be half of one: the process was killed while it wrote.
            self.rows = [row for row in rows if None not in row.values() and row["step"].isdigit()]
            self.rows = [row for row in self.rows if int(row["step"]) <= step]
            write_whole(path, self._text(self.rows, header=True).encode())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a line."""
        header = not self.path.exists() or not self.path.stat().st_size
        self.rows.append(dict(row))
        with self.path.open("a", newline="") as file:
            file.write(self._text(self.rows[-1:], header))

    @staticmethod
    def _text(rows: list[dict[str, Any]], header: bool) -> str:
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            if header:
                writer.writeheader()
            writer.writerows(rows)
        return text.getvalue()


class Logs(ExitStack):
    """Of rank 0."""

    def __init__(self, run: Path, report_to: str, step: int, steps: int, batch: int) -> None:
        super().__init__()
        self.training, self.evaluation = Table(run / "log.csv", step), Table(run / "evaluation.csv", step)
        self.batch, self.began, self.since = batch, time.perf_counter(), step
        self.bar = self.enter_context(
            require("tqdm").tqdm(total=steps, initial=step, desc="training", unit="step", file=sys.stderr)
        )
        self.writer = None
        if report_to:
            board = require("torch.utils.tensorboard").SummaryWriter
            self.writer = self.enter_context(board(str(run / "tensorboard"), purge_step=step + 1))

    def step(self, row: Mapping[str, Any], write: bool) -> None:
        """After a step; `row` has its number and figures, of which the loss and the accuracy are in the bar."""
        self.bar.update()
        speed = (row["step"] - self.since) * self.batch / (time.perf_counter() - self.began)
        shown = {"loss": f"{row['loss']:.4f}", "samples/s": f"{speed:.1f}"}
        if "accuracy" in row:
            shown["in-batch accuracy"] = f"{row['accuracy']:.1%}"
        self.bar.set_postfix(shown)
        if write:
            cost = {"samples_per_s": round(speed, 2), "peak_mib": round(_peak() / 2**20)}
            self.training.add({**row, **cost})
            self._board("train", {**row, **cost})
            self.began, self.since = time.perf_counter(), row["step"]

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """After an evaluation."""
        self.evaluation.add(row)
        row = {name: value for name, value in row.items() if value is not None}
        self._board("evaluation", row)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in ("epoch", "step"))
        self.say(f"epoch {row['epoch']}: {shown}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.bar.write(text, file=sys.stderr)

    def _board(self, part: str, row: Mapping[str, Any]) -> None:
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(f"{part}/{name}", value, row["step"])
