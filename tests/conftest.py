from __future__ import annotations

import os

import pytest
import torch
from oracle import reasons_against
from torchvision_stub import make_importable

from clipfast import dispatch
from clipfast.backends import cpu

# Triton reads it when the kernels are imported, which clipfast does when it first runs them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

make_importable()

INSTRUCTION_SETS = [f"cpu-{name}" for name in cpu.instruction_sets()]
OTHERS = [name for name in dispatch.names() if name != "cpu" or not INSTRUCTION_SETS]


@pytest.fixture(params=[*INSTRUCTION_SETS, *OTHERS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend in turn, `cpu` once per instruction set.

    One that cannot run, or not with the test's dtypes, is skipped with its own reason.
    """
    name, _, instruction_set = request.param.partition("-")
    if instruction_set:
        if not cpu.instruction_sets()[instruction_set]:
            pytest.skip(f"this processor has no {instruction_set}")
        monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, instruction_set)
    dtypes = [value for value in request.node.callspec.params.values() if isinstance(value, torch.dtype)]
    for dtype in dtypes or [torch.float32]:
        if reasons := reasons_against(name, dtype):
            pytest.skip("; ".join(reasons))
    return str(name)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
