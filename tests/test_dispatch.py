"""Choosing a backend: reasons, explicit choices that never fall back, and what is missing (trap 19)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from oracle import features

import clipfast
from clipfast import dispatch
from clipfast.backends import cpu
from clipfast.problem import Problem

X = torch.randn(4, 3)


def run(program: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_auto_takes_the_first_without_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = clipfast.backends()
    assert tuple(reasons) == dispatch.names()
    assert clipfast.explain(100, 8).chosen == next(name for name in reasons if not reasons[name])


def test_interpreted_kernels_run_only_when_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert clipfast.backends()["triton"] == ()
    assert clipfast.explain(100, 8, backend="triton").chosen == "triton"
    explanation = clipfast.explain(100, 8)
    assert explanation.chosen != "triton"
    assert "not triton: interprets its kernels, slowly, because TRITON_INTERPRET is set" in str(explanation)
    monkeypatch.setenv("CLIPFAST_BACKEND", "triton")
    assert clipfast.explain(100, 8).chosen == "triton"


def test_environment_variable(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("CLIPFAST_BACKEND", backend)
    assert clipfast.explain(100, 8).chosen == backend
    assert clipfast.explain(100, 8, backend="torch").chosen == "torch"
    monkeypatch.setenv("CLIPFAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast' is unknown; accepted are 'auto'"):
        clipfast.contrastive_loss(X, X, 1.0)


def test_explicit_choice_never_falls_back() -> None:
    problem = Problem(4, 4, 3, torch.float32, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"'cpu' cannot run this problem.*runs on CPU tensors only.*cuda"):
        dispatch.select(problem, "cpu")


def test_explanation_tells_choice_memory_and_products(backend: str) -> None:
    explanation = clipfast.explain(32768, 512, torch.bfloat16, m=40000, backend=backend)
    assert (explanation.forward_products, explanation.backward_products) == (1, 3)
    assert explanation.saved_bytes < 1.1 * explanation.gradient_bytes == 1.1 * (32768 + 40000) * 512 * 2
    assert explanation.workspace_bytes < explanation.dense_logits_bytes / 10
    text = str(explanation)
    assert f"backend: {backend}" in text
    assert "x [32768, 512], y [40000, 512], torch.bfloat16, on cpu" in text


def test_without_the_compiled_extension() -> None:
    """The library works, and tells what is missing and what to do."""
    output = run(
        "import sys; sys.modules['clipfast._cpu'] = None\n"
        "import torch, clipfast\n"
        "x = torch.randn(5, 3)\n"
        "assert clipfast.contrastive_loss(x, x, 1.0).isfinite()\n"
        "print(clipfast.backends()['cpu'][0])\n"
        "try: clipfast.contrastive_loss(x, x, 1.0, backend='cpu')\n"
        "except ValueError as error: print(error)"
    )
    for line in output.splitlines():
        assert "the compiled extension clipfast._cpu is missing" in line
        assert "reinstall it with a C++17 compiler" in line


def triton_refusal(preparation: str, **environment: str) -> str:
    """Why triton is not there, after a loss without it."""
    return run(
        f"{preparation}\n"
        "import torch, clipfast\n"
        "x = torch.randn(5, 3)\n"
        "assert clipfast.contrastive_loss(x, x, 1.0).isfinite()\n"
        "assert clipfast.explain(100, 8).chosen != 'triton'\n"
        "reason, = clipfast.backends()['triton']\n"
        "try: clipfast.contrastive_loss(x, x, 1.0, backend='triton')\n"
        "except ValueError as error: assert reason in str(error); print(reason)",
        **environment,
    )


def test_without_triton() -> None:
    reason = triton_refusal("import sys; sys.modules['triton'] = None")
    assert reason == "triton is not installed: pip install clipfast[triton]"


def test_with_triton_and_no_gpu() -> None:
    pytest.importorskip("triton")
    reason = triton_refusal("import os; os.environ.pop('TRITON_INTERPRET', None)", CUDA_VISIBLE_DEVICES="")
    assert reason.startswith("no CUDA or ROCm GPU is available to torch")


def test_a_backend_that_the_environment_names_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_BACKEND", "cpu")
    with pytest.raises(ValueError, match=r"'cpu' cannot run this problem.*runs on CPU tensors only.*meta"):
        clipfast.contrastive_loss(X.to("meta"), X.to("meta"), 1.0)


def test_import_loads_no_optional_package() -> None:
    loaded = run("import torch, sys; before = set(sys.modules); import clipfast; print(*set(sys.modules) - before)")
    for name in ("triton", "matplotlib", "tokenizers", "emoji", "tensorboard", "clipfast.train", "clipfast.emoji.data"):
        assert name not in loaded.split()


def test_an_empty_backend_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features("random", 8, 8, 4)
    expected = clipfast.contrastive_loss(x, y, 5.0)
    monkeypatch.setenv("CLIPFAST_BACKEND", "")
    assert torch.equal(clipfast.contrastive_loss(x, y, 5.0), expected)


def test_a_bad_backend_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features("random", 8, 8, 4)
    monkeypatch.setenv("CLIPFAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="CLIPFAST_BACKEND: 'fast' is unknown; accepted are 'auto'"):
        clipfast.contrastive_loss(x, y, 5.0)
    monkeypatch.setenv("CLIPFAST_BACKEND", "cpu")
    with pytest.raises(ValueError, match="CLIPFAST_BACKEND: 'cpu' cannot run this problem"):
        clipfast.contrastive_loss(x.to("meta"), y.to("meta"), 5.0)


@pytest.mark.skipif(not cpu.instruction_sets(), reason="the extension is not built")
def test_a_bad_instruction_set_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_CPU_ISA", "mmx")
    reasons = clipfast.backends()
    assert "CLIPFAST_CPU_ISA: got 'mmx'; accepted are" in "; ".join(reasons["cpu"])
    assert reasons["torch"] == ()
