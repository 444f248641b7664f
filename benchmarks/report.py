"""README.md's tables and the plots, from the committed result files alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import accuracy, environment, memory, options
from benchmarks.cases import TF32

# Of the tables and the plots.
WIDTH, SCALE = 512, 14.3
DTYPES = ("float32", TF32, "bfloat16")
# Colour-blind safe (Okabe and Ito 2008); clipfast in the darkest two, thick.
COLORS = ("#000000", "#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#999999", "#882255", "#F0E442")
MARKERS = "osv^D<>pPX"


def load() -> list[dict[str, Any]]:
    """All committed speed results, one for each device.

    Raises:
        ValueError: one lacks the rows that README.md shows.
    """
    paths = sorted(environment.RESULTS.glob("*.json"))
    others = ("accuracy-", "compile-", "memory-", "options-", "scaling-", "study-", "emoji-")
    results = {path: json.loads(path.read_text()) for path in paths if not path.name.startswith(others)}
    for path, result in results.items():
        shown = {row["dtype"] for row in result["rows"] if (row["d"], row["scale"]) == (WIDTH, SCALE)}
        if not ({"bfloat16", "float32"} <= shown or {"bfloat16", TF32} <= shown):
            raise ValueError(f"{path.name}: a trial, which would empty README.md's table; it belongs into runs/")
    return list(results.values())


def speed_table(result: dict[str, Any]) -> str:
    """Milliseconds and P of forward and backward: a table for each dtype, candidates by batch sizes."""
    parts = []
    for dtype in DTYPES:
        rows = [row for row in _main_line(result) if row["dtype"] == dtype]
        sizes = sorted({row["n"] for row in rows})
        if not rows:
            continue
        parts += [
            f"{dtype}, d = {_setting(result)[0]}, forward and backward, ms (P):",
            "",
            f"| | {' | '.join(f'n = {n}' for n in sizes)} |",
            f"|---|{'---:|' * len(sizes)}",
        ]
        for name in dict.fromkeys(row["candidate"] for row in rows):
            cells = {row["n"]: _cell(row) for row in rows if row["candidate"] == name}
            if any(cell != "" for cell in cells.values()):
                parts.append(f"| {name} | {' | '.join(cells.get(n, '') for n in sizes)} |")
        parts.append("")
    parts.append(
        f"1 P is one {_product_name(result)} of the same shape and dtype in the same rounds. An exact loss that stores "
        "no logits multiplies 4 P, in less time where its products are faster. Medians of interleaved rounds; an empty "
        f"cell did not fit the budget. {_peak(result)}{environment.credit(result)}."
    )
    return "\n".join(parts)


def _product_name(result: dict[str, Any]) -> str:
    libraries = {row.get("gemm_library", "torch") for row in result["rows"] if row["status"] == "ok"}
    return "`torch.mm`, or NumPy's product where that is faster," if "numpy" in libraries else "`torch.mm`"


def _peak(result: dict[str, Any]) -> str:
    """What part of the processor's multiply-add peak clipfast reaches, where the rounds have measured it."""
    texts = []
    for dtype in DTYPES:
        rows = [r for r in _main_line(result) if r["dtype"] == dtype and r["candidate"] == "clipfast cpu"]
        shares = [(r["n"], r["share_of_limit"], r["peak_flops"]) for r in rows if "peak_flops" in r]
        if shares:
            listed = ", ".join(f"{share:.0%} at n = {n}" for n, share, _ in sorted(shares))
            flops = max(peak for *_, peak in shares)
            texts.append(f"{dtype}: {flops / 1e9:.0f} GFLOP/s, of which clipfast multiplies at {listed}. ")
    return f"The multiply-add peak in those rounds, {''.join(texts)}" if texts else ""


def _cell(row: dict[str, Any]) -> str:
    if row["status"] == "wrong":
        return f"wrong: {row['reason']}"
    if row["status"] != "ok":
        return ""
    milliseconds = 1e3 * row["total"]["median"]
    return f"{milliseconds:,.{0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2}f} ({row['products']:.1f})"


def _main_line(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if (row["d"], row["scale"]) == _setting(result)]


def _setting(result: dict[str, Any]) -> tuple[int, float]:
    """(d, scale) of the tables; of a trial that has no such row, the first it has."""
    settings = [(row["d"], row["scale"]) for row in result["rows"]]
    return (WIDTH, SCALE) if (WIDTH, SCALE) in settings or not settings else settings[0]


def plot(result: dict[str, Any], path: Path) -> None:
    """Time, share of the limit and peak memory against the batch size, one row of panels for each dtype.

    Raises:
        ValueError: nothing was timed.
    """
    rows = [row for row in _main_line(result) if row["status"] == "ok" and row["dtype"] in DTYPES]
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    of_peak = all("peak_flops" in row for row in rows)
    share = "share of the multiply-add peak, %" if of_peak else "share of the limit (4 P / P), %"
    panels: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("forward + backward, ms", lambda row: 1e3 * row["total"]["median"]),
        (share, lambda row: 100 * row["share_of_limit"]),
        ("peak extra memory, MiB", lambda row: max(row["peak_bytes"], 2**18) / 2**20),
    )
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    if not dtypes:
        raise ValueError(f"the result has no row in {', '.join(DTYPES)} that was timed; there is nothing to plot")
    figure = Figure(figsize=(11, 0.8 + 3.4 * len(dtypes)), layout="constrained")
    for axes_row, dtype in zip(figure.subplots(len(dtypes), len(panels), squeeze=False), dtypes, strict=True):
        for axes, (title, value) in zip(axes_row, panels, strict=True):
            for index, name in enumerate(names):
                line = sorted((r["n"], value(r)) for r in rows if r["candidate"] == name and r["dtype"] == dtype)
                axes.plot(
                    [n for n, _ in line],
                    [v for _, v in line],
                    color=COLORS[index % len(COLORS)],
                    marker=MARKERS[index % len(MARKERS)],
                    linewidth=2.5 if name.startswith("clipfast") else 1.2,
                    markersize=5,
                    label=name,
                )
            if title == share:
                axes.axhline(100, color="#888888", linewidth=1, linestyle="--")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{title}, {dtype}", fontsize=11)
            axes.set_xlabel("n")
            axes.grid(which="major", color="#e3e6e8")
            axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    d = _setting(result)[0]
    figure.suptitle(f"{result['device']}, {result['threads']} threads, d = {d}, {result['date']}", fontsize=12)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, facecolor="white")


def blocks() -> dict[str, str]:
    """The README's marked blocks by name."""
    return {
        "accuracy": "\n\n".join(accuracy.table(result) for result in accuracy.load()),
        "memory": memory.table(memory.load()),
        "options": "\n\n".join(options.table(result) for result in options.load()),
        "speed": "\n\n".join(speed_table(result) for result in load()),
    }


def with_blocks(readme: str, contents: dict[str, str]) -> str:
    """The README's text with each block between its markers.

    Raises:
        ValueError: a block has no markers.
    """
    for name, content in contents.items():
        begin, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
        if begin not in readme or end not in readme:
            raise ValueError(f"README.md: has no {begin} ... {end}; the block {name!r} goes between these two lines")
        head, _, rest = readme.partition(begin)
        readme = f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    return readme


def show(paths: Sequence[Path]) -> None:
    """Print each result's table and plot it beside the file; README.md stays as it is."""
    for path in paths:
        result = json.loads(path.read_text())
        plot(result, path.with_suffix(".png"))
        print(f"{speed_table(result)}\n\nwritten: {path.with_suffix('.png')}")


def main() -> None:
    for result in load():
        name = environment.file_name(result["device"], result["threads"])
        plot(result, (environment.RESULTS / name).with_suffix(".png"))
    readme = environment.ROOT / "README.md"
    readme.write_text(with_blocks(readme.read_text(), blocks()))
