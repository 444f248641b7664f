from __future__ import annotations

import pytest
import torch

from clipfast import dispatch
from clipfast.backends import cpu

INSTRUCTION_SETS = [f"cpu-{name}" for name in cpu.instruction_sets()]


OTHERS = [name for name in dispatch.names() if name != "cpu" or not INSTRUCTION_SETS]


@pytest.fixture(params=[*INSTRUCTION_SETS, *OTHERS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend in turn, `cpu` once per instruction set; one that cannot run is skipped with its own reason."""
    name, _, instruction_set = request.param.partition("-")
    if instruction_set:
        if not cpu.instruction_sets()[instruction_set]:
            pytest.skip(f"this processor has no {instruction_set}")
        monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, instruction_set)
    if reasons := dispatch.backends()[name]:
        pytest.skip("; ".join(reasons))
    return str(name)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
