"""Which folder a run has: a new one that nobody uses, or that of the run that goes on."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import clipfast
from clipfast.training.checkpoint import STEP, checkpoints, locked, write_whole
from clipfast.training.flags import Refused, go_on

SETTINGS, TOKENIZER = "settings.json", "tokenizer.json"


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    settings: argparse.Namespace
    folder: Path
    checkpoint: Path | None  # None at step 0


def prepare(settings: argparse.Namespace, given: set[str], world: int, stack: ExitStack) -> Start:
    """Lock the run's folder, for as long as `stack` lives, and find what to go on from.

    Raises:
        Refused: the folder holds a run, or none to go on with, or its settings are others.
        BlockingIOError: another run is at work in it.
    """
    if settings.resume is None:
        name = settings.name or f"{datetime.now():%Y_%m_%d-%H_%M_%S}-model_{settings.model}-b_{settings.batch_size}"
        folder = Path(settings.logs, name)
        stack.enter_context(locked(folder))
        if (folder / SETTINGS).exists():
            raise Refused(f"--name: {folder} holds a run; give another one, or --resume {folder}")
        return Start(settings, folder, None)
    folder, wanted = _resumed(settings)
    stack.enter_context(locked(folder))
    found = checkpoints(folder)
    if wanted is not None and wanted.resolve() != found[-1].resolve():
        raise Refused(f"--resume: {wanted} is older than {found[-1]}; move what is newer away to go on from there")
    try:
        first = json.loads((folder / SETTINGS).read_bytes())
        chosen = go_on(settings, given, first, world)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Refused(f"--resume: {folder / SETTINGS} is not what a run wrote: {error!r}") from error
    return Start(chosen, folder, found[-1] if found else None)


def _resumed(settings: argparse.Namespace) -> tuple[Path, Path | None]:
    if settings.resume == "latest":
        if settings.name is None:
            raise Refused("--name: got none; --resume latest needs it")
        folder, wanted = Path(settings.logs, settings.name), None
    else:
        folder, wanted = Path(settings.resume), None
        if STEP.fullmatch(folder.name):
            folder, wanted = folder.parent, folder
            if not wanted.is_dir():
                raise Refused(f"--resume: there is no checkpoint {wanted}")
    if not (folder / SETTINGS).is_file():
        raise Refused(f"--resume: {folder} holds no run")
    return folder, wanted


def describe(start: Start, world: int, pairs: int) -> None:
    """Write how the run is made: all flags, the command, the versions, the machine; added to each time it goes on."""
    path = start.folder / SETTINGS
    how = {
        "command": shlex.join(sys.orig_argv),
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
        "processes": world,
        "host": platform.node(),
        "versions": {"clipfast": clipfast.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }
    flags: dict[str, Any] = vars(start.settings)
    if path.exists():
        made = json.loads(path.read_bytes())
        # What the first run's schedule and checks are by stays; epochs may have become more.
        made["flags"]["epochs"] = flags["epochs"]
    else:
        made = {"flags": {name: value for name, value in flags.items() if name not in ("logs", "name", "resume")}}
        made |= {"global_batch": flags["batch_size"] * world, "processes": world, "pairs": pairs, "starts": []}
    if made["pairs"] != pairs:
        raise Refused(f"--train-data: it has {pairs} pairs now; the run that goes on had {made['pairs']}")
    made["starts"].append(how)
    write_whole(path, json.dumps(made, indent=1).encode())
