"""The benchmark suite: a run end to end, wrong candidates, resuming, and a README that holds results alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clipfast
from benchmarks import accuracy, baselines, compare, environment, memory, options, peak, report, run
from benchmarks.__main__ import main
from benchmarks.cases import DTYPES, Case, grid, inputs
from clipfast.backends import cpu

CASE = Case("float32", 64, 32)


@pytest.fixture
def _committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tree had no uncommitted changes, with which no run goes on."""
    described = environment.describe("cpu") | {"uncommitted_changes": False, "commit": "0123"}
    monkeypatch.setattr(environment, "describe", lambda device: dict(described))


def runner(tmp_path: Path, budget: float = 60, cases: tuple[Case, ...] = (CASE,), only: str = "clipfast") -> run.Runner:
    return run.Runner("cpu", tmp_path / "result.json", budget, list(cases), only)


@pytest.mark.skipif(not peak.available(), reason="no compiled kernels")
def test_the_peak_counts_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction of bfloat16 pairs does twice a float32's work: a loop that does more has lost some of its sums."""
    if not cpu.instruction_sets()["avx512_bf16"]:
        pytest.skip("this processor has no avx512_bf16")
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, "avx512_bf16")
    ratios = [peak.multiply_adds_per_second("bfloat16") / peak.multiply_adds_per_second("float32") for _ in range(5)]
    assert min(ratios) < 2.5


def silent(line: str) -> None:
    pass


def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    main(
        ["--n", "64", "--d", "32", "--scale", "14.3", "100", "--only", "formula", "--budget", "200", "--out", str(path)]
    )
    result = json.loads(path.read_text())
    rows = {(row["candidate"], row["dtype"], row["scale"]): row for row in result["rows"]}
    row = rows["open_clip formula", "float32", 14.3]
    assert row["status"] == "ok"
    assert row["total"]["min"] <= row["total"]["median"] <= row["total"]["max"]
    assert row["forward"]["median"] < row["total"]["median"]
    assert row["products"] == pytest.approx(row["total"]["median"] / row["gemm"]["median"])
    assert row["gemm_library"] in ("torch", "numpy")
    if "peak_flops" in row:
        operations = 6 * 2 * 64**2 * 32  # open_clip's formula multiplies six times
        assert row["share_of_limit"] == pytest.approx(operations / row["total"]["median"] / row["peak_flops"])
        assert row["share_of_limit"] < 1
    else:
        assert row["share_of_limit"] == pytest.approx(4 / row["products"])
    assert set(row["errors"]) == {"loss", "dx", "dy", "dscale"}
    assert row["peak_bytes"] >= 0
    assert rows["transformers formula, torch.compile", "bfloat16", 100.0]["status"] == "ok"
    for key in ("device", "threads", "versions", "commit", "date", "command"):
        assert result[key]
    printed = capsys.readouterr().out
    assert "of the peak" in printed or "of the limit" in printed
    assert str(path) in printed


def test_a_wrong_candidate_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_way(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(s * x @ y.T, torch.arange(len(x)))

    monkeypatch.setattr(baselines, "OTHERS", (baselines.Candidate("clipfast, one way", lambda: one_way),))
    rows = {row["candidate"]: row for row in runner(tmp_path).run(silent)["rows"]}
    wrong = rows["clipfast, one way"]
    assert wrong["status"] == "wrong"
    assert "error of" in wrong["reason"]
    assert "total" not in wrong
    assert "wrong: error of" in run.line(wrong)
    assert rows["clipfast torch"]["status"] == "ok"


def test_a_candidate_that_cannot_run_shows_its_reason(tmp_path: Path) -> None:
    rows = {row["candidate"]: row for row in runner(tmp_path, only="e").run(silent)["rows"]}
    assert rows["memeff"]["status"] == "skipped"
    assert rows["memeff"]["reason"] in ("memeff is not installed", "runs on cuda only")
    huge = Case("float32", 10**6)
    assert "needs about" in baselines.OTHERS[0].reason(huge, "cpu", 24 << 30)
    half_only = next(c for c in baselines.OTHERS if c.name.startswith("cut-cross"))
    assert half_only.reason(CASE, "cuda", 80 << 30) in (
        "cut_cross_entropy is not installed",
        "takes bfloat16, float16 only",
    )


def test_a_candidate_that_raises_shows_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> baselines.Loss:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(baselines, "OTHERS", (baselines.Candidate("clipfast, broken", broken),))
    rows = {row["candidate"]: row for row in runner(tmp_path).run(silent)["rows"]}
    assert rows["clipfast, broken"]["reason"] == "RuntimeError: no such kernel"


def test_what_does_not_fit_the_budget_is_skipped(tmp_path: Path) -> None:
    slow = runner(tmp_path, budget=60, cases=(Case("float32", 128, 32),))
    slow.pace["clipfast torch", "float32"] = (1024, 1e-3)
    rows = {row["candidate"]: row for row in slow.run(silent)["rows"] if "torch" in row["candidate"]}
    assert "would take" in rows["clipfast torch"]["reason"]
    assert runner(tmp_path / "other", budget=0).run(silent)["rows"] == []


def test_a_killed_run_leaves_finished_rows_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = environment.describe("cpu") | {"uncommitted_changes": False, "commit": "0123"}
    monkeypatch.setattr(environment, "describe", lambda device: dict(described))
    other = Case("float32", 32, 32)
    first = runner(tmp_path, cases=(CASE, other))
    measure = first._measure

    def killed(case: Case, left: float) -> list[dict[str, Any]]:
        if case == other:
            raise KeyboardInterrupt
        return measure(case, left)

    monkeypatch.setattr(first, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        first.run(silent)
    left = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {row["n"] for row in left} == {64}

    lines: list[str] = []
    rows = runner(tmp_path, cases=(CASE, other)).run(lines.append)["rows"]
    assert rows[: len(left)] == left
    assert {row["n"] for row in rows} == {64, 32}
    assert any("already in result.json" in line for line in lines)

    monkeypatch.setattr(environment, "describe", lambda device: described | {"commit": "4567"})
    with pytest.raises(FileExistsError, match=r"result\.json holds another run's result"):
        runner(tmp_path, cases=(other,))
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == rows


@pytest.fixture
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README.md, results/ and runs/ of a project that the test may spoil."""
    shutil.copytree(environment.RESULTS, tmp_path / "benchmarks" / "results")
    shutil.copy(environment.ROOT / "README.md", tmp_path)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(environment, "RUNS", tmp_path / "runs" / "benchmarks")


@pytest.mark.usefixtures("_folders")
def test_a_trial_leaves_committed_results_and_readme_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the very device of the committed results; a second trial does not overwrite the first either."""
    committed = json.loads((environment.RESULTS / "amd-epyc-2-threads.json").read_text())
    described = environment.describe("cpu") | {"uncommitted_changes": True}
    described |= {key: committed[key] for key in ("device", "threads")}
    monkeypatch.setattr(environment, "describe", lambda device: dict(described))
    monkeypatch.setattr(torch, "get_num_threads", lambda: committed["threads"])
    monkeypatch.setattr(memory, "run", lambda: {"rows": []})
    monkeypatch.setattr(accuracy, "run", lambda device: {"rows": []})
    monkeypatch.setattr(options, "measure", lambda n: {"rows": []})

    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.glob("*.json")}

    before, readme = contents(environment.RESULTS), (tmp_path / "README.md").read_text()
    for _ in range(2):
        main(["run", "--n", "64", "--d", "32", "--dtype", "float32", "--only", "clipfast torch"])
        main(["memory"])
        main(["accuracy"])
        main(["options"])
    main(["report"])
    assert contents(environment.RESULTS) == before
    assert (tmp_path / "README.md").read_text() == readme
    speed = ["amd-epyc-2-threads-2.json", "amd-epyc-2-threads.json"]
    names = speed + [f"{kind}-{name}" for kind in ("accuracy", "memory", "options") for name in speed]
    assert set(contents(environment.RUNS)) == set(names)

    trials = [environment.RUNS / name for name in speed]
    main(["report", *map(str, trials)])
    printed = capsys.readouterr().out
    assert "float32, d = 32, forward and backward" in printed
    assert all(path.with_suffix(".png").stat().st_size > 10_000 for path in trials)
    assert (tmp_path / "README.md").read_text() == readme
    for command in (["run", "--n", "64"], ["memory"], ["accuracy"], ["options"]):
        with pytest.raises(FileExistsError, match=r"--out: .*holds another run's result"):
            main([*command, "--out", str(trials[0])])


@pytest.mark.usefixtures("_folders")
def test_a_trial_among_the_committed_results_empties_no_table(tmp_path: Path) -> None:
    readme = (tmp_path / "README.md").read_text()
    path = environment.RESULTS / "trial.json"
    trial = runner(tmp_path, only="clipfast torch").run(silent)
    path.write_text(json.dumps(trial))
    with pytest.raises(ValueError, match=r"trial\.json: a trial, which would empty README\.md's table"):
        main(["report"])
    assert (tmp_path / "README.md").read_text() == readme


def test_the_truth_beyond_the_dense_one_agrees_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = run.truth(CASE, "cpu")
    monkeypatch.setattr(run, "DENSE_TRUTH_ROWS", 1)
    for a, b in zip(dense, run.truth(CASE, "cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_inputs_rotate_and_repeat() -> None:
    first, again = inputs(CASE, "cpu"), inputs(CASE, "cpu")
    assert torch.equal(next(first)[0], next(again)[0])
    assert not torch.equal(next(first)[0], next(again)[0] * 0 + next(again)[0])


def test_the_grid_covers_what_is_claimed() -> None:
    cases = grid("cpu")
    assert len(set(cases)) == len(cases)
    assert {case.n for case in cases} == {64, *(2**k for k in range(8, 16))}
    assert {case.d for case in cases} == {256, 512, 768, 1024, 1280}
    assert {case.scale for case in cases} == {14.3, 100.0}
    assert {case.dtype for case in cases} == {"float32", "bfloat16", "float16"}


def test_tf32_is_float32_with_another_precision(tmp_path: Path) -> None:
    case = Case("tf32", 64, 32)
    before = torch.get_float32_matmul_precision()
    (row,) = runner(tmp_path, cases=(case,), only="clipfast torch").run(silent)["rows"]
    assert (row["status"], row["dtype"]) == ("ok", "tf32")
    assert torch.get_float32_matmul_precision() == before
    with run.precision(case.precision):
        assert torch.get_float32_matmul_precision() == "high"
    assert next(inputs(case, "cpu"))[0].dtype == torch.float32


@pytest.mark.usefixtures("_committed")
def test_a_candidate_that_ends_the_process_is_left_out_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fatal() -> baselines.Loss:
        raise SystemExit("segmentation fault")

    monkeypatch.setattr(baselines, "OTHERS", (baselines.Candidate("clipfast, fatal", fatal),))
    cases = (CASE, Case("float32", 32, 32), Case("float32", 128, 32), Case("bfloat16", 128, 32))
    with pytest.raises(SystemExit):
        runner(tmp_path, cases=cases).run(silent)
    assert json.loads((tmp_path / "result.json").read_text())["trying"] == ["clipfast, fatal", CASE.as_dict()]
    with pytest.raises(SystemExit):  # at n = 32, which is less
        runner(tmp_path, cases=cases).run(silent)
    with pytest.raises(SystemExit):  # in bfloat16
        runner(tmp_path, cases=cases).run(silent)
    rows = runner(tmp_path, cases=cases).run(silent)["rows"]
    reasons = {(row["dtype"], row["n"]): row["reason"] for row in rows if row["candidate"] == "clipfast, fatal"}
    assert reasons["float32", 128] == "ended the process at n=64 d=32 float32 scale=14.3"
    assert len(reasons) == len(cases)
    assert all(row["status"] == "ok" for row in rows if row["candidate"] == "clipfast torch")


def test_plots_and_tables_come_from_the_result(tmp_path: Path) -> None:
    cases = tuple(Case(dtype, n) for dtype in ("float32", "bfloat16") for n in (32, 64))
    result = runner(tmp_path, cases=cases, only="").run(silent)
    report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 20_000
    table = report.speed_table(result)
    row = next(r for r in result["rows"] if r["candidate"] == "clipfast torch" and r["n"] == 64)
    assert report._cell(row) in table
    assert report._cell(row).endswith(f" ({row['products']:.1f})")
    assert result["date"] in table


def test_the_readme_holds_the_committed_results() -> None:
    readme = (environment.ROOT / "README.md").read_text()
    assert report.with_blocks(readme, report.blocks()) == readme


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"README.md: has no <!-- benchmarks:memory -->"):
        report.with_blocks("# clipfast", {"memory": "a table"})


@pytest.mark.parametrize("loss", memory.LOSSES)
def test_memory_of_one_case(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense formula saves its logits, clipfast its inputs."""
    monkeypatch.setenv("CLIPFAST_KEEP_BYTES", "0")  # logits of a small batch may stay between the passes
    n = 512
    measured = memory.measure(loss, n)
    input_bytes = 2 * n * memory.WIDTH * 4
    if loss == "dense":
        assert measured["saved_bytes"] > input_bytes + 2 * n * n * 4
    else:
        assert input_bytes <= measured["saved_bytes"] < 1.1 * input_bytes
    assert measured["peak_bytes"] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_one_case(dtype: str) -> None:
    """No formula is far off, and clipfast, whose logits are never rounded to halves, is by far the nearest."""
    errors = {row["loss"]: row["errors"] for row in accuracy.measure(dtype, 100.0, 256, "cpu")}
    assert list(errors) == list(accuracy.LOSSES)
    assert all(0 <= error < 1 for row in errors.values() for error in row.values())
    for name in ("loss", "dscale") if dtype != "float32" else ():
        assert errors["clipfast"][name] < errors["open_clip"][name] / 10


def test_the_table_of_options_comes_from_the_result() -> None:
    if reasons := clipfast.backends()["cpu"]:
        pytest.skip("; ".join(reasons))
    result = options.measure(n=64, rounds=2)
    rows = {row["loss"]: row for row in result["rows"]}
    assert list(rows) == list(options.losses(64))
    plain = rows[options.PLAIN]
    assert plain["ratio"] == 1
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["total"]["median"] / plain["total"]["median"])
        assert row["products"] == pytest.approx(row["total"]["median"] / result["gemm"]["median"])
    table = options.table(result)
    assert f"| `siglip_loss` | {1e3 * rows['siglip_loss']['total']['median']:,.1f} |" in table
    assert "n = 64, d = 512" in table
    assert result["date"] in table


def test_the_accuracy_table_comes_from_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "SCALES", (14.3,))
    result = accuracy.run("cpu", n=32)
    lines = accuracy.table(result).splitlines()
    rows = [row for row in result["rows"] if row["dtype"] == "bfloat16"]
    for row in rows:
        errors = " | ".join(f"{error:.1e}" for error in row["errors"].values())
        assert lines.count(f"| bfloat16 | 14.3 | {row['loss']} | {errors} |") == 1
    assert f"the loss is {rows[0]['exact_loss']:.2g} at scale 14.3" in lines[-1]
    assert result["date"] in lines[-1]


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(ValueError, match="--base: git knows no revision 'nowhere'"):
        compare.export("nowhere", Path())


def test_base_compares_two_installations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")  # a third of the time that -O3 takes to compile
    compare.install(environment.ROOT, tmp_path)
    assert 0 < compare.seconds(tmp_path, 16, 8, "float32") < 1


def test_the_chunked_gemm_baseline_is_right() -> None:
    """Its Triton kernels through the interpreter, in small chunks."""
    pytest.importorskip("triton")
    program = """
import torch
from torch.nn.functional import normalize
from benchmarks import chunked_gemm
from clipfast import reference
chunked_gemm.CHUNK_BYTES = 40000
for n, d, dtype, tolerance in ((100, 16, torch.float32, 1e-5), (129, 16, torch.bfloat16, 1e-2)):
    x, y = (normalize(torch.randn(n, d), dim=1).to(dtype).requires_grad_() for _ in range(2))
    s = torch.tensor(14.3, requires_grad=True)
    got = torch.autograd.grad(chunked_gemm.loss(x, y, s), (x, y, s))
    leaves = [t.detach().double().requires_grad_() for t in (x, y, s)]
    exact = torch.autograd.grad(reference.contrastive_loss(*leaves), leaves)
    for a, b in zip(got, exact):
        assert (a.double() - b).norm() <= tolerance * b.norm()
"""
    subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(environment.ROOT)},
        check=True,
    )
