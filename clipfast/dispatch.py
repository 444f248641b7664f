"""Which backend computes a problem, and why: an ordered tuple of backends, each with its reasons against itself."""

from __future__ import annotations

import os
from types import ModuleType

import torch

from clipfast.backends import cpu, torch as torch_backend, triton
from clipfast.problem import Problem

# `auto` takes the first without a reason against itself, so the order is the order of speed.
BACKENDS: tuple[ModuleType, ...] = (triton, cpu, torch_backend)

ENVIRONMENT_VARIABLE = "CLIPFAST_BACKEND"


def names() -> tuple[str, ...]:
    return tuple(backend.NAME for backend in BACKENDS)


def get(name: str) -> ModuleType:
    """The backend called `name`."""
    for backend in BACKENDS:
        if name == backend.NAME:
            return backend
    raise ValueError(f"backend: {name!r} is unknown; accepted are {', '.join(map(repr, ('auto', *names())))}")


def select(problem: Problem, backend: str = "auto") -> str:
    """The name of the backend that computes `problem`.

    `backend="auto"` asks the environment variable CLIPFAST_BACKEND, and where that is unset or "auto" takes the first
    backend without a reason against itself. A backend that is named, in either way, never falls back to another.

    Raises:
        ValueError: the name is unknown, or the backend cannot run the problem; the text holds every reason.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    chosen = BACKENDS if backend == "auto" else (get(backend),)
    refusals = []
    for candidate in chosen:
        reasons = _reasons_against(candidate, problem, backend)
        if not reasons:
            return str(candidate.NAME)
        refusals += [f"{candidate.NAME}: {reason}" for reason in reasons]
    raise ValueError(f"backend: {backend!r} cannot run this problem. " + "; ".join(refusals))


def _reasons_against(candidate: ModuleType, problem: Problem, backend: str) -> tuple[str, ...]:
    """Why the candidate does not compute the problem; one that is named needs to be able to, and no more."""
    reasons: tuple[str, ...] = candidate.unsupported_reasons(problem)
    return reasons if backend == candidate.NAME else reasons + candidate.reasons_against_auto(problem)


def backends(device: torch.device | str = "cpu") -> dict[str, tuple[str, ...]]:
    """Every backend's name with its reasons not to run on `device`, best first; no reason means it can run."""
    problem = Problem(n=1, m=1, d=1, dtype=torch.float32, device=torch.device(device))
    return {backend.NAME: backend.unsupported_reasons(problem) for backend in BACKENDS}


def refusals_before(chosen: str, problem: Problem) -> dict[str, tuple[str, ...]]:
    """The backends that are preferred to the chosen one, each with its reasons against itself."""
    before = BACKENDS[: names().index(chosen)]
    return {b.NAME: _reasons_against(b, problem, "auto") or ("not asked for",) for b in before}
