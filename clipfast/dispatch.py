"""Which backend computes a problem, and why: an ordered tuple of backends, each with its reasons against itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType

import torch

from clipfast import arguments
from clipfast.backends import cpu, torch as torch_backend, triton
from clipfast.problem import Problem, accumulation_dtype
from clipfast.products import float32_precision

# `auto` takes the first without a reason against itself, so the order is the order of speed.
BACKENDS: tuple[ModuleType, ...] = (triton, cpu, torch_backend)

ENVIRONMENT_VARIABLE = "CLIPFAST_BACKEND"

KEEP_VARIABLE = "CLIPFAST_KEEP_BYTES"
KEEP_BYTES = 80 << 20  # of logits: n = 4096 in float32 fits

_VARIABLES = (ENVIRONMENT_VARIABLE, KEEP_VARIABLE, triton.INTERPRETER_VARIABLE, cpu.ENVIRONMENT_VARIABLE)


def names() -> tuple[str, ...]:
    return tuple(backend.NAME for backend in BACKENDS)


def get(name: str) -> ModuleType:
    """The backend called `name`."""
    for backend in BACKENDS:
        if name == backend.NAME:
            return backend
    raise _unknown("backend", name)


def _unknown(source: str, name: str) -> ValueError:
    accepted = ", ".join(map(repr, ("auto", *names())))
    return ValueError(f"{source}: {name!r} is unknown; accepted are {accepted}")


def environment() -> tuple[str | None, ...]:
    """What a choice depends on beside its arguments, in a process that has what it has."""
    if torch.compiler.is_compiling():  # which cannot trace the others, and nothing is remembered then
        return (os.environ.get(ENVIRONMENT_VARIABLE),)
    return *cpu.environment(*_VARIABLES), float32_precision("cuda")


def select(problem: Problem, backend: object = "auto") -> str:
    """The name of the backend that computes `problem`.

    `backend="auto"` asks the environment variable CLIPFAST_BACKEND, and where that is unset, empty or "auto" takes the
    first backend without a reason against itself. A backend that is named, in either way, never falls back to another.

    Raises:
        TypeError: the name is no string.
        ValueError: the name is unknown, or the backend cannot run the problem; the text holds every reason.
    """
    return _select(problem, backend, environment())


@arguments.remembered
def _select(problem: Problem, backend: object, environment: tuple[str | None, ...]) -> str:
    source, backend = "backend", arguments.backend_name(backend)
    named, *_ = environment
    if backend == "auto" and named:
        source, backend = ENVIRONMENT_VARIABLE, named
    if backend not in ("auto", *names()):
        raise _unknown(source, backend)
    chosen = BACKENDS if backend == "auto" else (get(backend),)
    refusals = []
    for candidate in chosen:
        reasons = _reasons_against(candidate, problem, backend)
        if not reasons:
            return str(candidate.NAME)
        refusals += [f"{candidate.NAME}: {reason}" for reason in reasons]
    raise ValueError(f"{source}: {backend!r} cannot run this problem. " + "; ".join(refusals))


def kept_bytes(backend: str, n: int, m: int, dtype: torch.dtype) -> int:
    """Of the logits of an [n, m] block, where the backend can keep them for the backward pass; 0 where it cannot."""
    of_backend = getattr(get(backend), "kept_size", None)
    return of_backend(n, m) * accumulation_dtype(dtype).itemsize if of_backend else 0


def keeps_logits(backend: str, n: int, columns: Sequence[int], dtype: torch.dtype, allowed: int) -> int:
    """The bytes of the logits of blocks [n, m], m one of `columns`, that are kept: of all, where `allowed` bytes do."""
    kept = sum(kept_bytes(backend, n, m, dtype) for m in columns if n and m)
    return kept if kept <= allowed else 0


def allowed_bytes(keep_bytes: int | None, backend: str, dtype: torch.dtype) -> tuple[int, str]:
    """How many bytes of logits may be kept, and what says so.

    None asks the environment variable CLIPFAST_KEEP_BYTES, and where that is unset or empty takes KEEP_BYTES, or 0
    where the backend says that keeping does not pay.

    Raises:
        ValueError: the environment variable is no number of bytes.
    """
    if keep_bytes is not None:
        return keep_bytes, f"keep_bytes is {keep_bytes}"
    named = os.environ.get(KEEP_VARIABLE)
    if named and not named.isdecimal():
        raise ValueError(f"{KEEP_VARIABLE}: got {named!r}; accepted is a number of bytes")
    if named:
        return int(named), f"{KEEP_VARIABLE} is {named}"
    of_backend = getattr(get(backend), "keeping", None)
    pays, reason = of_backend(dtype) if of_backend else (True, "")
    default = f"by default {f'up to {KEEP_BYTES >> 20} MiB are' if pays else 'none is'}"
    return KEEP_BYTES if pays else 0, f"{default}: {reason}" if reason else default


def _reasons_against(candidate: ModuleType, problem: Problem, backend: str) -> tuple[str, ...]:
    """Why the candidate does not compute the problem; one that is named needs to be able to, and no more."""
    reasons = _unsupported_reasons(candidate, problem)
    return reasons if backend == candidate.NAME else reasons + candidate.reasons_against_auto(problem)


def backends(device: torch.device | str = "cpu") -> dict[str, tuple[str, ...]]:
    """Every backend's name with its reasons not to run on `device`, best first; no reason means it can run."""
    problem = Problem(n=1, m=1, d=1, dtype=torch.float32, device=torch.device(device))

    def reasons(backend: ModuleType) -> tuple[str, ...]:
        try:
            return _unsupported_reasons(backend, problem)
        except ValueError as error:  # what the environment asks of it cannot be had, which a loss does not pass over
            return (str(error),)

    return {backend.NAME: reasons(backend) for backend in BACKENDS}


def _unsupported_reasons(candidate: ModuleType, problem: Problem) -> tuple[str, ...]:
    reasons: tuple[str, ...] = candidate.unsupported_reasons(problem)
    return (*reasons, "a meta tensor holds no numbers") if problem.device.type == "meta" else reasons


def refusals_before(chosen: str, problem: Problem) -> dict[str, tuple[str, ...]]:
    """The backends that are preferred to the chosen one, each with its reasons against itself."""
    before = BACKENDS[: names().index(chosen)]
    return {b.NAME: _reasons_against(b, problem, "auto") or ("not asked for",) for b in before}
