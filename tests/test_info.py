"""`python -m clipfast.info`: what a bug report needs is there, whatever is missing or wrong."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import clipfast
from clipfast import dispatch, info
from clipfast.backends import cpu


def test_the_module_prints_the_report() -> None:
    done = subprocess.run([sys.executable, "-m", "clipfast.info"], capture_output=True, text=True, check=True)
    assert f"python {platform.python_version()}" in done.stdout


def test_versions_machine_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_BACKEND", "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("CLIPFAST_CPU_ISA", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lines = info.report().splitlines()
    assert f"clipfast {clipfast.__version__}" in lines
    assert f"torch {torch.__version__}" in lines
    assert f"system: {platform.platform()}" in lines
    assert any(line.startswith(f"threads: {torch.get_num_threads()} in use") for line in lines)
    assert "environment: CLIPFAST_BACKEND=torch, OMP_NUM_THREADS=1" in lines
    assert len(info.processor()) > 2


def test_backends_and_the_typical_problem() -> None:
    text = info.report()
    for name, reasons in clipfast.backends().items():
        assert f"\n  {name}: {'; '.join(reasons) or 'can run'}\n" in text
    for dtype in (torch.float32, torch.bfloat16):
        assert f"\n{clipfast.explain(32768, 512, dtype)}" in text


def test_instruction_sets(backend: str) -> None:
    available = [name for name, here in cpu.instruction_sets().items() if here]
    if available:
        line = f"instruction sets: {', '.join(available)}; in use: {cpu.instruction_set()}"
    else:
        line = "instruction sets: none, no compiled extension"
    assert line in info.report().splitlines()


def test_without_the_compiled_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_INSTRUCTION_SETS", {})
    monkeypatch.setattr(cpu, "_MISSING", "the extension is missing")
    text = info.report()
    assert "instruction sets: none, no compiled extension\n" in text
    assert "  cpu: the extension is missing\n" in text


@pytest.mark.skipif(not cpu.instruction_sets(), reason="needs the compiled extension")
def test_a_wrong_instruction_set_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, "mmx")
    text = info.report()
    assert "; in use: error: CLIPFAST_CPU_ISA: got 'mmx'; accepted are" in text
    assert "\n  cpu: CLIPFAST_CPU_ISA: got 'mmx'" in text
    assert "CLIPFAST_CPU_ISA=mmx" in text


def test_a_wrong_backend_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fast")
    assert "error: CLIPFAST_BACKEND: 'fast' is unknown; accepted are 'auto'" in info.report()


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(device: torch.device) -> SimpleNamespace:
        if device.index == 1:
            raise RuntimeError("the driver is too old")
        return SimpleNamespace(name="Accelerator X", major=9, minor=0, total_memory=80 << 30)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert info.accelerators() == {
        torch.device("cuda:0"): "Accelerator X, capability 9.0, 80.0 GiB",
        torch.device("cuda:1"): "error: the driver is too old",
    }


def test_gpus_that_are_alike_are_explained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {torch.device(f"meta:{index}"): f"kind {index % 2}" for index in range(4)}
    monkeypatch.setattr(info, "accelerators", lambda: devices)
    text = info.report()
    assert [line for line in text.splitlines() if line.startswith("GPU")] == [
        f"GPU meta:{index}: kind {index % 2}" for index in range(4)
    ]
    assert [line for line in text.splitlines() if line.startswith("backends on")] == [
        f"backends on {device}:" for device in ("cpu", "meta:0", "meta:1")
    ]
