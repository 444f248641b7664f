from __future__ import annotations

import pytest
import torch

from clipfast import dispatch


@pytest.fixture(params=dispatch.names())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that cannot run is skipped with its own reason."""
    if reasons := dispatch.backends()[request.param]:
        pytest.skip("; ".join(reasons))
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
