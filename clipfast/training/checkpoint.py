"""A run's folder: files that are whole at any moment, one run at a time, checkpoints that are what they say.

A checkpoint is a folder, step-00001234, with model.safetensors, optimizer.safetensors and state.json; it gets its name
when it is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from clipfast.emoji.data import require

LOCK = ".lock"
TEMPORARY = re.compile(r"\.[\w.-]+\.\d+\.part")
STEP = re.compile(r"step-(\d+)")
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


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
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        tempfile.TemporaryFile(dir=folder).close()  # fails now, not after an epoch, if nothing new can be written
        yield


def checkpoints(run: Path) -> list[Path]:
    """Those of a run's folder, the oldest first."""
    found = [path for path in run.glob("step-*") if STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors of model and optimizer on the CPU; every rank must call it, rank 0 gets them."""
    weights = get_model_state_dict(model, options=WHOLE)
    moments: Any = get_optimizer_state_dict(model, optimizer, options=WHOLE).get("state", {})
    flat = {f"{name}/{key}": value for name, state in moments.items() for key, value in state.items()}
    return _plain(weights), _plain(flat)


def _plain(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    # The temperature is 0-D also where it was sharded as [1]; clones, because safetensors takes no shared memory.
    return {
        name: (value.reshape(()) if _is_scalar(name) and value.numel() == 1 else value).detach().contiguous().clone()
        for name, value in tensors.items()
    }


def _is_scalar(name: str) -> bool:
    return name.split("/")[0].endswith(("logit_scale", "logit_bias"))


def save(run: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint of state["step"]; if the process dies, it is there or it is not."""
    dump = require("safetensors.torch").save
    path = run / f"step-{state['step']:08d}"
    if path.exists():
        return path  # the same state: a resumed run's first
    temporary = run / f".{path.name}.{os.getpid()}.part"
    temporary.mkdir()
    for name, content in ((MODEL, dump(dict(weights))), (OPTIMIZER, dump(dict(moments)))):
        write_whole(temporary / name, content)
    write_whole(temporary / STATE, json.dumps(dict(state), indent=1).encode())
    _sync(temporary)
    os.replace(temporary, path)
    _sync(run)
    return path


def _sync(folder: Path) -> None:
    """A folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, moments and state of a checkpoint.

    Raises:
        ValueError: it is none; the message names the file.
    """
    read = require("safetensors.torch").load_file
    file = path / MODEL
    try:
        weights = read(path / MODEL)
        file = path / OPTIMIZER
        moments = read(file)
        file = path / STATE
        state = json.loads(file.read_bytes())
        check_parts("it", state, {"step": int, "scaler": dict, "unreadable": int})
    except Exception as error:  # safetensors' errors share no other class
        raise ValueError(f"--resume: {file} is no part of a checkpoint: {error}") from error
    return weights, moments, state


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, loaded: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    """Set what `load` read; every rank must call it.

    Raises:
        ValueError: the tensors are not those of this model.
    """
    weights, moments = loaded
    shapes = cast(dict[str, Tensor], get_model_state_dict(model))
    check_tensors(f"--resume: {path / MODEL}", weights, shapes)
    trained = [name for name, parameter in _named(model) if parameter.requires_grad]
    expected = {}
    for name in trained if moments else ():  # a run that was stopped before its first step has none
        expected[f"{name}/step"] = torch.tensor(0.0)
        expected |= {f"{name}/{key}": shapes[name] for key in ("exp_avg", "exp_avg_sq")}
    check_tensors(f"--resume: {path / OPTIMIZER}", moments, expected)
    whole: Any = {name: value.reshape(shapes[name].shape) for name, value in weights.items()}
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
    if moments:
        groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in moments.items():
            name, _, kind = key.rpartition("/")
            state.setdefault(name, {})[kind] = value if kind == "step" else value.reshape(shapes[name].shape)
        both: Any = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(model, optimizer, both, options=StateDictOptions(full_state_dict=True))


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield name.removeprefix("module."), parameter


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


def check_tensors(name: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """That there are the expected tensors by name, shape and dtype, and that all their values are finite.

    Raises:
        ValueError: there are not; the message says what is wrong.
    """
    check_keys(name, got, expected)
    for key, tensor in expected.items():
        shape = torch.Size(()) if _is_scalar(key) and tensor.numel() == 1 else tensor.shape
        for what, value, right in (("shape", got[key].shape, shape), ("dtype", got[key].dtype, tensor.dtype)):
            if value != right:
                raise ValueError(f"{name}: {key} has {what} {_shown(value)}, not {_shown(right)}")
        if not got[key].isfinite().all():
            raise ValueError(f"{name}: {key} is not finite")


def _kind(value: Any) -> str:
    shown = f"{value!r:.60} " if isinstance(value, int | float | str) else ""
    return f"{shown}of type {type(value).__name__}"


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, torch.Size) else value
