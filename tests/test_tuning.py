"""Which tile configuration is chosen, and how work and workspace are divided."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import tune
from benchmarks.compile_report import DEVICES
from clipfast import tuning
from clipfast.tuning import KERNELS, Config

SIZES = [(1, 1), (7, 300), (513, 511), (4096, 4096), (100_000, 100_001)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", [1, 100, 768, 1280])
@pytest.mark.parametrize("architecture", DEVICES)
def test_every_problem_has_a_configuration(kernel: str, itemsize: int, d: int, architecture: str) -> None:
    for aligned_rows in (True, False):
        choice = tuning.choose(kernel, DEVICES[architecture], itemsize, d, aligned_rows)
        assert (choice.config.kernel, choice.config.architecture) == (kernel, architecture)
        assert aligned_rows or not (choice.config.tma or choice.config.aligned)
        assert all(reason for _, reason in choice.rejected)


def test_choices_explain_themselves() -> None:
    device = DEVICES["sm_90"]
    config = Config("gradient", "sm_90", 2, 128, 256, 64, 8, 3, tma=True, max_d=512)
    assert tuning.reason_against(config, device, 2, 512, aligned_rows=True) == ""
    assert "unit stride along d" in tuning.reason_against(config, device, 2, 512, aligned_rows=False)
    assert "operands of 2 bytes" in tuning.reason_against(config, device, 4, 512, aligned_rows=True)
    assert "d up to 512" in tuning.reason_against(config, device, 2, 768, aligned_rows=True)
    assert "is for sm_90" in tuning.reason_against(config, DEVICES["sm_80"], 2, 512, aligned_rows=True)
    aligned = Config("statistics", "sm_90", 2, 128, 128, 32, 8, 4, aligned=True)
    assert tuning.reason_against(aligned, device, 2, 512, aligned_rows=True) == ""
    for d, rows in ((512, False), (100, True)):
        assert "loads 16 bytes at a time" in tuning.reason_against(aligned, device, 2, d, aligned_rows=rows)
    wide = Config("gradient", "sm_90", 2, 256, 256, 128, 8, 4)
    assert "bytes of shared memory" in tuning.reason_against(wide, device, 2, 512, aligned_rows=True)


def test_two_programs_per_multiprocessor_must_fit() -> None:
    device = DEVICES["sm_90"]
    fits = Config("statistics", "sm_90", 2, 128, 128, 64, 4, 3, tma=True, per_processor=2)
    assert tuning.reason_against(fits, device, 2, 512, aligned_rows=True) == ""
    for change, reason in (
        ({"num_stages": 4}, "needs 263168 bytes of shared memory for 2 programs"),
        ({"block_n": 256, "block_d": 32}, "the tiles of 2 programs do not fit the 262144 bytes of registers"),
    ):
        assert reason in tuning.reason_against(replace(fits, **change), device, 2, 512, aligned_rows=True)


def test_a_configuration_may_need_a_newer_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one spills registers, and takes the next configuration."""
    config = next(c for c in tuning.CONFIGS if c.min_triton)
    device = DEVICES[config.architecture]
    reasons = {}
    for version in ((3, 6), config.min_triton):
        monkeypatch.setattr(tuning, "triton_version", lambda version=version: version)
        reasons[version] = tuning.reason_against(config, device, 2, 512, aligned_rows=True)
    assert list(reasons.values()) == ["spills registers below Triton 3.9, this is 3.6", ""]


def test_products_from_registers_need_a_triton_that_compiles_them_right() -> None:
    sm_90, sm_80 = DEVICES["sm_90"], DEVICES["sm_80"]
    assert "triton#11781" in tuning.reason_against_strategy("registers", sm_90, (3, 6))
    for strategy, device, version in (
        ("registers", sm_90, (3, 9)),
        ("registers", sm_80, (3, 6)),
        ("chunks", sm_90, (3, 6)),
    ):
        assert tuning.reason_against_strategy(strategy, device, version) == ""


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_program_grid_fits_the_device(n: int, m: int) -> None:
    config = tuning.choose("statistics", DEVICES["sm_90"], 2, 512).config
    programs_m, programs_n = tuning.program_grid(n, m, config, 132)
    assert 1 <= programs_m * programs_n <= 132 * config.per_processor
    assert programs_m <= -(-n // config.block_m)
    assert programs_n <= -(-m // config.block_n)


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("workspace", [1, 1 << 20, 32 << 20])
def test_chunks_stay_in_the_workspace(n: int, m: int, workspace: int) -> None:
    rows, cols = tuning.chunk_shape(n, m, 2, workspace)
    assert 1 <= rows <= n
    assert 1 <= cols <= m
    smallest = tuning.CHUNK_STEP * tuning.padded(tuning.CHUNK_STEP) * 2
    assert rows * tuning.padded(cols) * 2 <= max(workspace, smallest)


def test_the_search_tries_what_fits_and_prints_what_can_be_pasted() -> None:
    for kernel in KERNELS:
        found = list(tune.candidates(kernel, DEVICES["sm_90"], 2))
        assert len(found) == len(set(found)) > 20
        assert found[0] in tuning.CONFIGS
        if kernel in ("statistics", "gradient") and tuning.triton_version() >= (3, 9):
            # Asks less of L2 than two programs of 128 by 128, which come first.
            assert any((c.block_m, c.block_n, c.tma) == (256, 128, True) for c in found if c in tuning.CONFIGS)
        assert eval(tune.line(found[0]).strip().rstrip(","), {"Config": Config}) == found[0]
