"""`python -m benchmarks.prediction`: docs/hopper-model.md's table, by the model of `cycles`, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import cycles, machine_code
from benchmarks.compile_report import DEVICES, MODELLED, Case, compiled_kernel
from clipfast import tuning

DEVICE = DEVICES["sm_90"]
WIDTHS = (512, 768, 1024)
BANDWIDTHS = (
    64.0,
    39.0,
)  # bytes from L2 in a cycle: what a multiprocessor can take; 5120 of all together, as an A100's
FAMILY = (
    *(("sigmoid", ""), ("sigmoid", "loss alone"), ("ranks", "ranks")),
    *(("distillation", ""), ("distillation", "loss alone")),
)
VENDORS = (0.65, 0.75, 0.85)  # of the tensor peak


def rows() -> Iterator[str]:
    """The table's rows: of the first configuration of both kernels, in bfloat16."""
    for factors in (False, True):
        paths = []
        for kernel in MODELLED:
            case = Case(tuning.choose(kernel, DEVICE, 2, WIDTHS[0]).config, torch.bfloat16, "ieee", factors)
            path, fit = _path(case)
            paths.append((path, case, fit))
        slots = " / ".join(f"{path.slots / case.logits:.1f}" for path, case, _ in paths)
        for bandwidth in BANDWIDTHS:
            for d in WIDTHS:
                timed = [cycles.timed(path, case.config, d, fit, bandwidth) for path, case, fit in paths]
                low, middle, high = (
                    cycles.share_at_4p(timed[0], timed[1], d, DEVICE.processors, vendor) / vendor for vendor in VENDORS
                )
                peaks = " / ".join(f"{of.share_of_peak(d):.0%}" for of in timed)
                yield (
                    f"| {'yes' if factors else 'no'} | {bandwidth:.0f} | {d} | {slots} | {peaks} | {middle:.0%} "
                    f"({high:.0%} to {low:.0%}) |"
                )


def family_rows() -> Iterator[str]:
    """Of the sigmoid loss, metrics and distillation: slots and shares of the peak, at each d and rate of L2."""
    for kernel, option in FAMILY:
        for factors in (False, True):
            case = Case(
                tuning.choose(kernel, DEVICE, 2, WIDTHS[0]).config, torch.bfloat16, "ieee", factors, option=option
            )
            path, fit = _path(case)
            shares = (
                " / ".join(f"{cycles.timed(path, case.config, d, fit, rate).share_of_peak(d):.0%}" for d in WIDTHS)
                for rate in BANDWIDTHS
            )
            name = f"{kernel}, {option}" if option else kernel
            yield f"| {name} | {'yes' if factors else 'no'} | {path.slots / case.logits:.1f} | {' | '.join(shares)} |"


def _path(case: Case) -> tuple[machine_code.CommonPath, int]:
    """A case's common path, and how many of its programs fit a multiprocessor."""
    compiled = compiled_kernel(case)
    cubin, shared = compiled.asm["cubin"], int(compiled.metadata.shared)
    registers, _ = machine_code.resources(cubin)
    fit = machine_code.programs_per_processor(case.config.num_warps, registers, shared, DEVICE.shared_bytes)
    products = cycles.PRODUCTS.get(case.config.kernel, 1)
    return machine_code.common_path(machine_code.disassemble(cubin), case.logits, products), fit


if __name__ == "__main__":
    print("| norms | L2 | d | slots per logit | share of the tensor peak | share of the vendor's rate at 4 P |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows():
        print(row, flush=True)
    print("\n| kernel | norms | slots per logit | share of the tensor peak, L2 at 64 | at 39 |")
    print("|---|---|---:|---:|---:|")
    for row in family_rows():
        print(row, flush=True)
