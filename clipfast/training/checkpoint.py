"""A run's folder: files that are whole at any moment, one run at a time, a checkpoint that is what it says."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LOCK = ".lock"
TEMPORARY = re.compile(r"\.[\w.]+\.\d+\.part")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either whole or untouched, whenever the process dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, for one run alone, without what a killed one left half written.

    The lock is the kernel's: it ends with the process that holds it, however that ends. Its file stays; whoever took
    it away could let two runs in.

    Raises:
        BlockingIOError: another run holds the folder.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with Path(folder, LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"out: another run is at work in {folder}; give another folder, or wait") from error
        for path in folder.iterdir():
            if TEMPORARY.fullmatch(path.name):
                path.unlink()
        tempfile.TemporaryFile(dir=folder).close()  # fails now, not after an epoch, if nothing new can be written
        yield


def write_log(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """One line for each epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_whole(path, text.getvalue().encode())


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """torch.save, atomically: a write that fails midway leaves the old checkpoint whole."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_whole(path, buffer.getvalue())


def check_keys(name: str, got: Any, expected: Mapping[Any, Any] | Sequence[Any]) -> None:
    """That a dictionary has the expected keys and no other.

    Raises:
        ValueError: it has not; the message names one.
    """
    if not isinstance(got, dict):
        raise ValueError(f"{name} is {_kind(got)}, not a dictionary")
    for what, keys, others in (("has no", expected, got), ("has an unknown", got, expected)):
        for key in keys:
            if key not in others:
                raise ValueError(f"{name} {what} {key}")


def check_parts(name: str, got: Any, expected: Mapping[str, type | tuple[type, ...]]) -> None:
    """That a dictionary has the expected keys and no other, with values of the expected types.

    Raises:
        ValueError: it has not; the message says what is wrong.
    """
    check_keys(name, got, expected)
    for key, accepted in expected.items():
        # True is an int to isinstance, and no number to anybody else.
        if not isinstance(got[key], accepted) or isinstance(got[key], bool):
            raise ValueError(f"{name}: {key} is {_kind(got[key])}")


def check_tensors(name: str, got: Any, expected: Mapping[str, Tensor]) -> None:
    """That a dictionary has the expected tensors by name, shape and dtype, and that all their values are finite.

    Raises:
        ValueError: it has not; the message says what is wrong.
    """
    check_parts(name, got, dict.fromkeys(expected, Tensor))
    for key, tensor in expected.items():
        for what in ("shape", "dtype", "layout"):
            if (value := getattr(got[key], what)) != (right := getattr(tensor, what)):
                raise ValueError(f"{name}: {key} has {what} {_plain(value)}, not {_plain(right)}")
        if not got[key].isfinite().all():
            raise ValueError(f"{name}: {key} is not finite")


def check_optimizer(name: str, got: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """That a state is one of this AdamW after some step, with all averages of all parameters.

    Raises:
        ValueError: it is not; the message says what is wrong.
    """
    check_parts(name, got, {"state": dict, "param_groups": list})
    groups = optimizer.state_dict()["param_groups"]
    if len(got["param_groups"]) != len(groups):
        raise ValueError(f"{name} has {len(got['param_groups'])} groups of parameters, not {len(groups)}")
    for index, (group, expected) in enumerate(zip(got["param_groups"], groups, strict=True)):
        place = f"{name}, group {index}"
        check_keys(place, group, expected)
        for key, value in expected.items():
            if key == "lr" and isinstance(group[key], float):
                continue  # every step sets its own
            if type(group[key]) is not type(value) or group[key] != value:
                raise ValueError(f"{place}: {key} is {group[key]!r:.60}, not {value!r:.60}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    check_keys(f"{name}, state", got["state"], range(len(parameters)))
    for index, parameter in enumerate(parameters):
        averages = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter)
        check_tensors(
            f"{name}, state of {names[id(parameter)]}", got["state"][index], {"step": torch.tensor(0.0)} | averages
        )


def _kind(value: Any) -> str:
    shown = f"{value!r:.60} " if isinstance(value, int | float | str) else ""
    return f"{shown}of type {type(value).__name__}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, torch.Size) else value
