"""The pictures that a training run leaves: how it went, and what it makes of drawings that it never saw."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from clipfast.training.checkpoint import write_whole

TRAINING, HELD_OUT, RIGHT, OTHER, TEXT = "#7a8793", "#1769aa", "#2e9e5b", "#c9d3dc", "#20262c"
CREDIT = "Drawings: OpenMoji, CC BY-SA 4.0"
BEST = 5  # captions under each drawing


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, dpi=130, facecolor="white")
    write_whole(path, png.getvalue())


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8ecef")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_loss(
    path: Path, history: Sequence[Mapping[str, float]], training_chance: float, held_out_chance: float
) -> None:
    """Draw losses, recall and temperature over the epochs.

    Args:
        path: of the PNG.
        history: rows of the demo's history.
        training_chance: ln of the batch size, the training loss of a model that guesses.
        held_out_chance: ln of the number of held-out concepts.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 4), layout="constrained")
    loss, recall, scale = figure.subplots(1, 3)
    for title, key, color, chance in (
        ("training batches", "train_loss", TRAINING, training_chance),
        ("held-out concepts", "held_out_loss", HELD_OUT, held_out_chance),
    ):
        loss.plot(epochs, [row[key] for row in history], color=color, label=title)
        loss.axhline(chance, color=color, linestyle=":", linewidth=1, label=f"guessing: {chance:.2f}")
    loss.set(title="contrastive loss, nats", xlabel="epoch", ylim=(0, None))
    loss.legend(frameon=False, fontsize=8)
    for direction, style in (("image_to_text", "-"), ("text_to_image", "--")):
        for k, color in ((10, HELD_OUT), (5, TRAINING), (1, RIGHT)):
            values = [100 * row[f"{direction}_R@{k}"] for row in history]
            recall.plot(epochs, values, style, color=color, label=f"R@{k} {direction.replace('_', ' ')}")
    recall.set(title="held-out recall, %", xlabel="epoch", ylim=(0, 1.35 * recall.dataLim.ymax + 1))
    recall.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    scale.plot(epochs, [row["logit_scale"] for row in history], color=TEXT)
    scale.set(title="logit scale exp(t)", xlabel="epoch")
    for axes in (loss, recall, scale):
        _plain(axes)
    _save(figure, path)


def plot_retrieval(path: Path, images: Tensor, names: Sequence[str], probabilities: Tensor) -> None:
    """Draw held-out pictures, each with its best captions among all held-out names, the right one green.

    Args:
        path: of the PNG.
        images: uint8 [n, 3, h, w].
        names: the held-out names; picture i is names[i].
        probabilities: [n, len(names)], of each name for each picture.
    """
    columns = 4
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.5 * columns, 1.75 * rows + 0.8), layout="constrained")
    figure.suptitle(f"Drawings the model never saw, and its best {BEST} of {len(names)} unseen names", fontsize=14)
    figure.supxlabel(
        f"bars: probability, full width 100 %; green: the right name.  {CREDIT}", fontsize=8, color=TRAINING
    )
    cells = figure.subplots(rows, 2 * columns, width_ratios=[1, 1.5] * columns, squeeze=False)
    for axes in cells.flat:
        axes.axis("off")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        picture, bars = cells[row, 2 * column], cells[row, 2 * column + 1]
        picture.imshow(image.permute(1, 2, 0).numpy())
        order = torch.argsort(probabilities[index], descending=True)
        rank = int((order == index).nonzero()) + 1
        picture.set_title(_short(names[index], 24), fontsize=9, color=TEXT)
        best = order[:BEST].tolist()
        values = probabilities[index, best].tolist()
        bars.barh(range(len(best)), values, color=[RIGHT if i == index else OTHER for i in best], height=0.8)
        for place, (name, value) in enumerate(zip(best, values, strict=True)):
            right = name == index
            label = f"{_short(names[name], 26)}  {value:.0%}"
            weight = "bold" if right else "normal"
            bars.text(0.02, place, label, va="center", fontsize=8, color=TEXT, fontweight=weight)
        bars.set(xlim=(0, 1), ylim=(len(best) - 0.5, -0.5))
        bars.set_title(f"right name: rank {rank}", fontsize=8, color=RIGHT if rank <= BEST else TRAINING, loc="left")
    _save(figure, path)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
