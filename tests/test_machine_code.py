"""Slots and cycles of kernels that are written here, instruction by instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from benchmarks import cycles, machine_code
from benchmarks.machine_code import CommonPath, Instruction
from clipfast import tuning
from clipfast.tuning import Config

CONFIG = Config("statistics", "sm_90", 2, 128, 128, 64, 4, 3, tma=True)
NO_SCOREBOARD = 7 << 5 | 7 << 8


def listing(*lines: str) -> str:
    """As nvdisasm prints it; a line ending in a colon is a label."""
    text, address = ["        .section        .text.kernel"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
            continue
        text.append(f"        /*{address:04x}*/    {line} ;    /* 0x{0:016x} */")
        text.append(f"{'':40}/* 0x{(NO_SCOREBOARD | 1) << 41:016x} */")
        address += 16
    return "\n".join(text)


# A kernel with a tile of two logits a thread: at ".L_few", tiles go through a loop over strips.
KERNEL = listing(
    "MOV R0, R1",
    "@P1 EXIT",
    ".L_tiles:",
    "FADD R0, R0, R0",
    "@P0 BRA `(.L_over_d)",
    ".L_over_d:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",
    "@!P0 BRA `(.L_spin)",
    ".L_go:",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
    "@P0 BRA `(.L_over_d)",
    "BRA.DIV UR4, `(.L_diverged)",
    ".L_together:",
    "@P2 BRA `(.L_few)",
    "MUFU.EX2 R3, R4",
    "MUFU.EX2 R4, R5",
    "@!P3 BRA `(.L_end)",
    "STL [R1], R4",
    "BRA `(.L_end)",
    ".L_few:",
    "MUFU.EX2 R3, R4",
    "MUFU.EX2 R3, R4",
    "@P4 BRA `(.L_few)",
    ".L_end:",
    "STG.E [R2.64], R3",
    "@P5 BRA `(.L_tiles)",
    "EXIT",
    ".L_spin:",
    "@!P0 BRA `(.L_spin)",
    "BRA `(.L_go)",
    ".L_diverged:",
    "SHFL.BFLY PT, R3, R3, 0x1, 0x1f",
    "BRA `(.L_together)",
    ".L_last:",
    "BRA `(.L_last)",
)


def test_the_common_path_has_an_exponential_of_every_logit_outside_loops() -> None:
    path = machine_code.common_path(KERNEL, logits=2)
    (before, after), (step,) = path.outside, path.steps
    assert [i.name for i in before] == ["FADD", "BRA"]
    assert [i.name for i in step] == ["SYNCS", "BRA", "HGMMA", "BRA"]
    # Not the loop over strips, which is shorter, not the store that may be left out, nor what diverging warps do.
    assert [i.name for i in after] == ["BRA", "BRA", "MUFU", "MUFU", "BRA", "STG", "BRA"]
    assert (path.slots, path.spills) == (9, 0)
    with pytest.raises(LookupError, match="no way round a loop over tiles"):
        machine_code.common_path(KERNEL, logits=3)
    with pytest.raises(LookupError):
        machine_code.common_path(KERNEL, logits=2, products=2)


def test_a_loop_beside_the_common_path_is_not_on_it() -> None:
    """Strips of a tile that are only counted, shorter once round than the straight code."""
    text = listing(
        ".L_tiles:",
        "FADD R0, R0, R0",
        ".L_over_d:",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "@P0 BRA `(.L_over_d)",
        "@P2 BRA `(.L_strips)",
        *["FADD R0, R0, R0"] * 4,
        ".L_join:",
        "MUFU.EX2 R3, R4",
        "@P5 BRA `(.L_tiles)",
        "EXIT",
        ".L_strips:",
        "@P4 BRA `(.L_strips)",
        "BRA `(.L_join)",
    )
    assert [i.name for i in machine_code.common_path(text, logits=1).outside[1]] == [
        "BRA",
        *["FADD"] * 4,
        "MUFU",
        "BRA",
    ]


def test_two_products_of_a_tile_have_a_loop_each() -> None:
    text = listing(
        ".L_tiles:",
        "FADD R0, R0, R0",
        ".L_first:",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "@P0 BRA `(.L_first)",
        "FMUL R0, R0, R0",
        ".L_second:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "@P1 BRA `(.L_second)",
        "MUFU.EX2 R3, R4",
        "@P5 BRA `(.L_tiles)",
        "EXIT",
    )
    path = machine_code.common_path(text, logits=1, products=2)
    assert [[i.name for i in code] for code in path.outside] == [["FADD"], ["FMUL"], ["MUFU", "BRA"]]
    assert [[i.name for i in code] for code in path.steps] == [["HGMMA", "BRA"], ["SYNCS", "HGMMA", "BRA"]]


def test_a_spill_on_the_common_path_is_seen() -> None:
    everywhere = KERNEL.replace("@!P3 BRA", "@!P3 STL")
    assert machine_code.common_path(everywhere, logits=2).spills == 2


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "programs"),
    [(8, 255, 100 << 10, 1), (4, 255, 100 << 10, 2), (4, 168, 60 << 10, 3), (4, 32, 0, 16), (8, 128, 113 << 10, 2)],
)
def test_programs_that_fit_a_multiprocessor(warps: int, registers: int, shared: int, programs: int) -> None:
    assert machine_code.programs_per_processor(warps, registers, shared, 227 << 10) == programs


def code(*opcodes: str) -> tuple[Instruction, ...]:
    operands = {"HGMMA.64x128x16.F32.BF16": "R24, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE": "gsb0, 0x0"}
    return tuple(Instruction(0, "", o, operands.get(o, ""), NO_SCOREBOARD | 1) for o in opcodes)


def interval(before: Sequence[str], step: Sequence[str], after: Sequence[str], **options: float) -> float:
    path = CommonPath((code(*before), code(*after)), (code(*step),))
    return cycles.timed(path, CONFIG, 512, fit=1, **options).cycles


def test_the_model_issues_one_instruction_a_cycle() -> None:
    assert interval((), (), ["FADD"] * 100) == pytest.approx(100)
    assert interval((), (), ["FADD", "MUFU.EX2"] * 100) == pytest.approx(800, rel=0.05)


def test_the_model_lets_products_overlap_with_nothing_but_other_programs() -> None:
    step = ["HGMMA.64x128x16.F32.BF16"] * 8  # 128 rows by 64, in steps of 16: a step of 64
    after = ["WARPGROUP.DEPBAR.LE", *["FADD"] * 2048]
    path = CommonPath(((), code(*after)), (code(*step),))
    one = cycles.timed(path, CONFIG, 512, fit=1)
    product = 128 * 128 * 512 / cycles.TENSOR_PEAK
    assert product + 2048 < one.cycles < product + 2048 + 150
    assert one.share_of_peak(512) == pytest.approx(product / one.cycles)
    twice = replace(CONFIG, per_processor=2)
    two = cycles.timed(path, twice, 512, fit=2)
    assert two.programs == 2
    assert two.share_of_peak(512) > 0.9
    assert cycles.timed(path, twice, 512, fit=1) == replace(one, config=twice)


def test_the_model_takes_both_products_of_a_tile_one_after_the_other() -> None:
    step = code(*["HGMMA.64x128x16.F32.BF16"] * 8)
    wait = code("WARPGROUP.DEPBAR.LE")
    config = replace(CONFIG, kernel="distillation")
    both = cycles.timed(CommonPath(((), wait, wait), (step, step)), config, 512, fit=1)
    product = 128 * 128 * 512 / cycles.TENSOR_PEAK
    assert both.cycles == pytest.approx(2 * product, rel=0.05)
    assert both.share_of_peak(512) == pytest.approx(2 * product / both.cycles)


def test_the_model_waits_for_loads() -> None:
    loads = ["UTMALDG.2D", "UTMALDG.2D"]
    step = ["SYNCS.PHASECHK.TRANS64.TRYWAIT", *loads, "HGMMA.64x128x16.F32.BF16"]
    tile_bytes = (128 + 128) * 512 * 2
    slow = interval(loads * 2, step, ["WARPGROUP.DEPBAR.LE"], bandwidth=10)
    assert slow == pytest.approx(tile_bytes / 10, rel=0.01)
    assert interval(loads * 2, step, ["WARPGROUP.DEPBAR.LE"], bandwidth=1000) < tile_bytes / 20


def test_a_wait_that_never_ends_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no warp can go on"):
        interval((), ["SYNCS.PHASECHK.TRANS64.TRYWAIT", "UTMALDG.2D"], ())


def test_the_share_of_the_whole_loss() -> None:
    """Kernels at the tensor peak leave the vendor's share and the launches; here all rounds of tiles are full."""
    gradient = Config("gradient", "sm_90", 2, 128, 128, 64, 4, 3, tma=True)
    peak = 128 * 128 * 512 / cycles.TENSOR_PEAK
    forward, backward = (cycles.Timed(config, 1, peak) for config in (CONFIG, gradient))
    share = cycles.share_at_4p(forward, backward, 512, processors=128)
    product = cycles.N**2 * 512 / cycles.TENSOR_PEAK / 128
    chunks = (cycles.N / tuning.chunk_shape(cycles.N, cycles.N, 2, tuning.WORKSPACE_BYTES)[0]) ** 2
    assert share == pytest.approx(4 / (2 + 2 / cycles.VENDOR + chunks * cycles.LAUNCH / product))
    slow = cycles.Timed(gradient, 1, 2 * peak)
    assert cycles.share_at_4p(forward, slow, 512, processors=128) < share
