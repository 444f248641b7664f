"""The picture that a run of the demo leaves: what it makes of drawings that it never saw."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from clipfast.training.checkpoint import write_whole

NOTE, RIGHT, OTHER, TEXT = "#7a8793", "#2e9e5b", "#c9d3dc", "#20262c"
CREDIT = "Drawings: OpenMoji, CC BY-SA 4.0"
BEST = 3  # answers to each question


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, dpi=130, facecolor="white")
    write_whole(path, png.getvalue())


Question = tuple[Tensor, Sequence[str], Sequence[int]]  # probabilities [n, answers], answers, the right one of each row


def plot_answers(path: Path, images: Tensor, questions: Sequence[Question]) -> None:
    """Draw held-out pictures, each with the best answers to two questions, what kind of thing and which one.

    All bars have one scale, and the right answer is green.

    Args:
        path: of the PNG.
        images: uint8 [n, 3, h, w].
        questions: the kinds, then the held-out names, of which the first n are the pictures' own.
    """
    columns = 4
    rows = -(-len(images) // columns)
    (kinds, _, right_kinds), (names, all_names, right_names) = questions
    counts = [
        int((probabilities.argmax(dim=-1) == torch.tensor(right)).sum())
        for probabilities, right in ((kinds, right_kinds), (names, right_names))
    ]
    figure = Figure(figsize=(3.9 * columns, 1.95 * rows + 0.8), layout="constrained")
    figure.suptitle(
        f"Drawings the model never saw: what kind of thing is it, and which of {len(all_names)} unseen names?\n"
        f"Of these {len(images)}: {counts[0]} kinds and {counts[1]} names right",
        fontsize=13,
    )
    figure.supxlabel(f"bars: probability, full width 100 %; green: right.  {CREDIT}", fontsize=8, color=NOTE)
    cells = figure.subplots(rows, 2 * columns, width_ratios=[1, 1.9] * columns, squeeze=False)
    for axes in cells.flat:
        axes.axis("off")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        picture, bars = cells[row, 2 * column], cells[row, 2 * column + 1]
        picture.imshow(image.permute(1, 2, 0).numpy())
        picture.set_title(_short(all_names[index], 24), fontsize=9, color=TEXT)
        place = 0.0
        for probabilities, answers, right in questions:
            order = torch.argsort(probabilities[index], descending=True).tolist()
            for answer in order[:BEST]:
                value = probabilities[index, answer].item()
                is_right = answer == right[index]
                bars.barh(place, value, color=RIGHT if is_right else OTHER, height=0.85)
                label = f"{_short(answers[answer], 32)}  {value:.0%}"
                weight = "bold" if is_right else "normal"
                bars.text(0.02, place, label, va="center", fontsize=8, color=TEXT, fontweight=weight)
                place += 1
            place += 0.5
        bars.set(xlim=(0, 1), ylim=(place - 1, -0.5))
    _save(figure, path)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
