"""`python -m benchmarks [run | gpu | report | memory | accuracy | options | scaling | study]`: measure and draw."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import (
    accuracy,
    compare,
    compile_report,
    environment,
    gpu,
    memory,
    options as loss_options,
    report,
    scaling,
    study,
)
from benchmarks.cases import DTYPES, TF32, Case
from benchmarks.run import Runner

OUT = "result file or folder; default: runs/benchmarks, numbered if need be. README.md shows benchmarks/results"


def run(options: argparse.Namespace) -> None:
    if options.base:
        compare.print_ratios(options.base, options.n or [1024, 4096], options.d or [512], options.dtype)
        return
    described = environment.describe(options.device)
    name = environment.file_name(described["device"], torch.get_num_threads())
    path = environment.out_path(options.out, name, described)
    cases = []
    if options.n or options.d:
        cases = [
            Case(dtype, n, d, scale)
            for n in options.n or [4096]
            for d in options.d or [512]
            for dtype in options.dtype
            for scale in options.scale
        ]
    runner = Runner(options.device, path, options.budget, cases, options.only)
    runner.run(tqdm.write)
    print(f"written: {path}")


def many_ranks(options: argparse.Namespace) -> None:
    setting = scaling.Setting(options.tflops, options.gigabytes)
    scaling.main(setting, options.ranks, options.out, tqdm.write)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    measure = commands.add_parser("run", help="time every candidate; goes on with an unfinished result file")
    measure.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    measure.add_argument("--budget", type=float, default=780, metavar="SECONDS", help="default: %(default)s")
    measure.add_argument("--out", type=Path, help=OUT)
    measure.add_argument("--n", type=int, nargs="+", help="batch sizes; default: the whole grid")
    measure.add_argument("--d", type=int, nargs="+", help="widths; default: the whole grid")
    measure.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=(*DTYPES, TF32))
    measure.add_argument("--scale", type=float, nargs="+", default=[14.3])
    measure.add_argument("--only", default="", metavar="NAME", help="only candidates whose name holds this text")
    measure.add_argument("--base", metavar="REF", help="time the working tree against a git revision instead")
    measure.set_defaults(call=run)
    device = commands.add_parser("gpu", help="check, sanitize and time on this machine's GPU; goes on where it stopped")
    device.add_argument("--budget", type=float, default=gpu.BUDGET, metavar="SECONDS", help="default: %(default)s")
    device.add_argument("--out", type=Path, help="folder of the results, which is gone on with; default: in runs/gpu")
    device.set_defaults(call=lambda options: gpu.main(options.budget, options.out, tqdm.write))
    draw = commands.add_parser("report", help="plots, and README.md's tables, from the committed results")
    draw.add_argument("file", type=Path, nargs="*", help="a result to print, and to plot beside it; README.md stays")
    draw.set_defaults(call=lambda options: report.show(options.file) if options.file else report.main())
    bytes_ = commands.add_parser("memory", help="memory of the loss against the batch size, for README.md")
    bytes_.add_argument("--out", type=Path, help=OUT)
    bytes_.set_defaults(call=lambda options: memory.main(options.out))
    errors = commands.add_parser("accuracy", help="errors of loss and gradients against float64, for README.md")
    errors.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    errors.add_argument("--out", type=Path, help=OUT)
    errors.set_defaults(call=lambda options: accuracy.main(options.device, options.out))
    costs = commands.add_parser("options", help="what each option of the loss costs on the CPU, for README.md")
    costs.add_argument("--out", type=Path, help=OUT)
    costs.add_argument("--n", type=int, default=loss_options.BATCH_SIZE, help="default: %(default)s")
    costs.set_defaults(call=lambda options: loss_options.main(options.out, options.n))
    compiled = commands.add_parser("compile-report", help="what every Triton configuration compiles to, without a GPU")
    compiled.add_argument("--architecture", nargs="+", default=list(compile_report.DEVICES), metavar="NAME")
    compiled.add_argument("--plain", action="store_true", help="the plain softmax alone")
    compiled.set_defaults(call=lambda options: compile_report.main(options.architecture, options.plain))
    many = commands.add_parser(
        "scaling", help="the loss over ranks: processes of this machine, and a model of many GPUs"
    )
    many.add_argument("--tflops", type=float, default=400, help="a GPU's matrix products; default: %(default)s")
    many.add_argument("--gigabytes", type=float, default=50, help="that a GPU sends per second; default: %(default)s")
    many.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4], help="processes; default: 1 2 3 4")
    many.add_argument("--out", type=Path, help=OUT)
    many.set_defaults(call=many_ranks)
    brings = commands.add_parser("study", help="what a large batch costs and brings, in docs/batch-size.md")
    brings.add_argument("--shards", type=Path, help="folder that examples/emoji_shards.py made")
    brings.add_argument("--only", default="", choices=("cost", "recall"), help="the other part stays as --out has it")
    brings.add_argument("--out", type=Path, help="result file; default: in runs/benchmarks")
    brings.set_defaults(call=lambda options: study.main(options.shards, options.only, options.out))
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("--") and given[0] != "--help"):
        given.insert(0, "run")
    options = parser.parse_args(given)
    options.call(options)


if __name__ == "__main__":
    main()
