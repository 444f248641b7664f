from __future__ import annotations

import os

import pytest
import torch
from oracle import reasons_against

from clipfast import dispatch

# Triton reads it when the kernels are imported, which clipfast does when it first runs them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=dispatch.names())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that cannot run, or not with the test's dtypes, is skipped with its own reason."""
    dtypes = [value for value in request.node.callspec.params.values() if isinstance(value, torch.dtype)]
    for dtype in dtypes or [torch.float32]:
        if reasons := reasons_against(request.param, dtype):
            pytest.skip("; ".join(reasons))
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
