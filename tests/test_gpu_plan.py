"""`python -m benchmarks gpu`: order, time, what goes on after a failure; its parts by stand-ins, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, gpu
from benchmarks.__main__ import main
from benchmarks.cases import FIRST, gpu_grid

IDENTITY = {"device": "a GPU", "threads": 1, "versions": {"torch": "2"}, "commit": "0123", "uncommitted_changes": False}


def test_the_plan_is_ordered_and_fits_its_budget() -> None:
    parts = gpu.plan(Path())
    assert [part.name for part in parts] == ["check", "rates", "first", "memcheck", "racecheck", "grid", "tune"]
    assert sum(part.limit for part in parts) == gpu.BUDGET <= 25 * 60


def test_the_grid_covers_every_size_width_and_dtype() -> None:
    cases = gpu_grid()
    assert len(set(cases)) == len(cases)
    assert cases[: len(FIRST)] == FIRST
    for dtype in ("bfloat16", "float16", "tf32"):
        for d in (512, 768, 1024):
            assert {case.n for case in cases if (case.dtype, case.d) == (dtype, d)} == {2**k for k in range(8, 18)}


class Run:
    """Parts that need no time, of which some fail."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "record.json"
        self.calls: list[tuple[str, float]] = []
        self.failing: set[str] = set()

    def part(self, name: str, limit: float = 10, divisible: bool = False) -> gpu.Part:
        def call(seconds: float) -> str:
            self.calls.append((name, round(seconds)))
            if name in self.failing:
                raise gpu.PartError("invalid read")
            return "fine"

        return gpu.Part(name, limit, call, divisible)

    def attempt(self, *parts: gpu.Part, budget: float = 60, **changes: Any) -> tuple[list[str], list[str]]:
        """What is left, and the lines."""
        self.calls.clear()
        lines: list[str] = []
        record = gpu.Record(self.path, IDENTITY | changes)
        return gpu.run_parts(parts, record, budget, lines.append), lines


def test_a_failure_is_written_down_and_the_rest_runs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    parts = [run.part(name) for name in ("check", "memcheck", "grid")]
    run.failing = {"check"}
    left, lines = run.attempt(*parts)
    assert left == ["check"]
    assert [name for name, _ in run.calls] == ["check", "memcheck", "grid"]
    assert lines[0] == "check: FAILED: invalid read (0 s)"
    assert json.loads(run.path.read_text())["parts"]["check"] == {"failed": "invalid read", "seconds": 0.0}

    run.failing = set()
    left, lines = run.attempt(*parts)
    assert (left, [name for name, _ in run.calls]) == ([], ["check"])
    assert lines == ["memcheck: already done", "grid: already done", "check: fine (0 s)"]
    assert json.loads(run.path.read_text())["parts"]["check"] == {"line": "fine", "seconds": 0.0}
    for change in ({"commit": "4567"}, {"uncommitted_changes": True}, {"uncommitted_changes": True}):
        run.attempt(*parts, **change)
        assert len(run.calls) == 3


def test_what_failed_comes_after_what_was_not_tried(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.failing = {"check"}
    run.attempt(run.part("check"))
    run.attempt(run.part("check"), run.part("grid"))
    assert [name for name, _ in run.calls] == ["grid", "check"]


def test_a_part_begins_only_in_time_that_it_can_use(tmp_path: Path) -> None:
    run = Run(tmp_path)
    parts = (run.part("check", 100), run.part("rates", 20), run.part("grid", 500, divisible=True), run.part("tune", 90))
    left, lines = run.attempt(*parts, budget=80)
    assert run.calls == [("rates", 20), ("grid", 80)]  # a stand-in takes no time of the 80 s
    assert left == ["check", "tune"]
    assert lines[0] == "check: not run, it takes up to 100 s and 80 s are left"
    assert run.attempt(*parts, budget=0)[0] == ["check", "tune"]
    assert run.calls == []


def test_commands_fail_with_the_end_of_their_output(tmp_path: Path) -> None:
    log = tmp_path / "folder" / "log"
    assert gpu.command([sys.executable, "-c", "print('here')"], 60, log) == "here\n"
    with pytest.raises(gpu.PartError, match=r"(?s)exit status 1:\nTraceback.*ValueError: wrong"):
        gpu.command([sys.executable, "-c", "raise ValueError('wrong')"], 60, log)
    with pytest.raises(gpu.PartError, match="took more than 1 s:\nhere"):
        gpu.command([sys.executable, "-uc", "import time; print('here'); time.sleep(60)"], 1, log)
    assert log.read_text() == "here\n"


def test_a_run_without_a_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: None)
    assert gpu.sanitize("memcheck", tmp_path, 60) == "skipped, compute-sanitizer is not installed"


def test_the_sanitized_program_runs(tmp_path: Path) -> None:
    """Through the interpreter, on the CPU."""
    pytest.importorskip("triton")
    program = gpu.SANITIZED.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "")
    gpu.command([sys.executable, "-c", program], 300, tmp_path / "log", TRITON_INTERPRET="1")


def stand_in(*outcomes: Callable[[Path], None]) -> Callable[..., str]:
    """A `gpu.command` whose calls do this to speed.json, one after the other."""
    rest = list(outcomes)

    def command(arguments: list[str], seconds: float, log: Path, **variables: str) -> str:
        rest.pop(0)(log.with_name("speed.json"))
        return "done\n"

    return command


def finish(path: Path) -> None:
    rows = [case.as_dict() for case in FIRST]
    path.write_text(json.dumps({"rows": rows}))


def die(path: Path) -> None:
    path.write_text(json.dumps({"rows": [FIRST[0].as_dict()], "trying": ["memeff", FIRST[1].as_dict()]}))
    raise gpu.PartError("exit status -11:\n")


def break_down(path: Path) -> None:
    raise gpu.PartError("exit status 1:\nno such device")


def test_measuring_goes_on_after_a_candidate_that_ended_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "command", stand_in(die, die, finish))
    assert gpu.measure(FIRST, tmp_path, 60).startswith("6 cases are in")
    monkeypatch.setattr(gpu, "command", stand_in(die, finish))
    with pytest.raises(gpu.PartError, match="6 of 97 cases are in"):
        gpu.measure(gpu_grid(), tmp_path, 60)
    (tmp_path / "speed.json").unlink()
    monkeypatch.setattr(gpu, "command", stand_in(break_down))
    with pytest.raises(gpu.PartError, match=r"0 of 6 cases.*\n.*\nno such device"):
        gpu.measure(FIRST, tmp_path, 60)


def test_the_end_of_the_time_is_no_candidates_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 1.0, 61.0))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(gpu, "command", stand_in(die))
    with pytest.raises(gpu.PartError, match="1 of 6 cases"):
        gpu.measure(FIRST, tmp_path, 60)
    assert "trying" not in json.loads((tmp_path / "speed.json").read_text())


def test_the_whole_plan_with_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def command(arguments: list[str], seconds: float, log: Path, **variables: str) -> str:
        commands.append(arguments)
        if "run" in arguments:
            (tmp_path / "speed.json").write_text(json.dumps({"rows": [case.as_dict() for case in gpu_grid()]}))
        if "pytest" in arguments:
            raise gpu.PartError("exit status 1:\n1 failed")
        return "something\nlast line\n"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "describe", lambda device: dict(IDENTITY))
    monkeypatch.setattr(gpu, "command", command)
    with pytest.raises(SystemExit, match=r"failed or left for another call: check$"):
        main(["gpu", "--out", str(tmp_path)])
    parts = json.loads((tmp_path / "record.json").read_text())["parts"]
    assert list(parts) == [part.name for part in gpu.plan(tmp_path)]
    assert parts["rates"]["line"] == "last line"
    assert parts["grid"]["line"].startswith("97 cases are in")
    assert "failed" in parts["check"]
    monkeypatch.setattr(environment, "describe", lambda device: IDENTITY | {"commit": "4567"})
    with pytest.raises(SystemExit, match="holds another run's results"):
        main(["gpu", "--out", str(tmp_path)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_without_a_gpu() -> None:
    with pytest.raises(SystemExit, match="torch finds no CUDA or ROCm GPU here"):
        main(["gpu"])


def test_the_reads_of_l2_are_wide_and_right() -> None:
    """The kernel through the interpreter; and what it compiles to for sm_90."""
    pytest.importorskip("triton")
    program = """
import torch
from benchmarks import rates
source = torch.arange(12, dtype=torch.int32)[:, None].expand(12, 64).contiguous()
assert rates.read(source, 3, 12).unique().tolist() == [66]
assert rates.read(source, 2, 1)[:, 0].tolist() == [0, 7]
"""
    python = [sys.executable, "-c"]
    environment_ = os.environ | {"PYTHONPATH": str(environment.ROOT)}
    subprocess.run([*python, program], env=environment_ | {"TRITON_INTERPRET": "1"}, check=True)
    compiled = """
import torch
from benchmarks import compile_report, rates
with compile_report._offline(compile_report.DEVICES["sm_90"]) as kernels:
    rates.read(torch.zeros(512, rates.BLOCK, dtype=torch.int32), 2, rates.ROUNDS)
assert "ld.global.cg.v4" in kernels["read_kernel"].asm["ptx"]
"""
    subprocess.run([*python, compiled], env=environment_ | {"TRITON_INTERPRET": "0"}, check=True)


def test_the_search_tries_the_likely_first() -> None:
    """Two candidates that may ship, and one that needs more registers than there are."""
    pytest.importorskip("triton")
    program = """
from benchmarks import tune
from clipfast.tuning import Config
shapes = ((64, 64, 4), (256, 256, 4), (128, 128, 8))
configs = [Config("gradient", "sm_90", 2, m, n, 64, warps, 2, tma=True) for m, n, warps in shapes]
if __name__ == "__main__":
    for config in tune.promising(configs, 300):
        print(config.block_m, config.per_processor)
    spills = Config("gradient", "sm_90", 2, 128, 256, 64, 8, 3, tma=True)
    assert [tune.may_ship_with_norms(config) for config in (spills, configs[0])] == [False, True]
"""
    python = [sys.executable, "-c", program]
    variables = os.environ | {"PYTHONPATH": str(environment.ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run(python, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    found = {int(line.split()[0]): int(line.split()[1]) for line in done.stdout.splitlines()}
    assert set(found) == {64, 128}
    assert all(1 <= programs <= 2 for programs in found.values())
