from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from oracle import reasons_against
from torchvision_stub import make_importable

from clipfast import dispatch
from clipfast.backends import cpu

# Triton reads it when the kernels are imported, which clipfast does when it first runs them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def patch_the_language_once() -> None:
    """Have Triton's interpreter replace triton.language's functions once for each function that it runs.

    It does so whenever a kernel is launched or calls another function, which takes half of the time of all kernels in
    these tests, though what it puts there is the same each time; and takes it back after a launch, for kernels that
    are compiled, of which this process has none.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang

    @functools.cache
    def once(function: Callable[..., Any]) -> Any:
        patch(function)
        return interpreter._LangPatchScope()  # nothing to take back

    interpreter._patch_lang = once


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    patch_the_language_once()

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
    marker = request.node.get_closest_marker("needs")
    dtypes = [value for value in request.node.callspec.params.values() if isinstance(value, torch.dtype)]
    for dtype in dtypes or [torch.float32]:
        if reasons := reasons_against(name, dtype, *(marker.args if marker else ())):
            pytest.skip("; ".join(reasons))
    return str(name)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """gloo, of this process alone.

    PyTorch joins the group's threads with Python's lock held. A thread that still has to let go of its last all-reduce,
    DDP's for example, waits for that lock, and both wait for ever; the pause gives it the time.
    """
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    time.sleep(0.5)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Any]:
    """Four processes for all tests of several ranks: to start them takes seconds."""
    from ranks import Ranks

    four = Ranks(4)
    yield four
    four.close()
