"""A run's folder: whole files, one run at a time, and many kinds of files that are no checkpoint (trap 30)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipfast import train as training
from clipfast.emoji.data import read_concepts
from clipfast.training.checkpoint import locked, save_checkpoint, write_whole
from clipfast.training.run import Result, TrainConfig, main, resume, train

EPOCHS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A small run; every test may spoil a copy of its checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "read_concepts", lambda: read_concepts()[::40])
        return train(TrainConfig(out=str(tmp_path_factory.mktemp("run")), epochs=EPOCHS, batch_size=16))


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, {"epoch": 2})
    assert torch.load(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_write_whole_replaces(tmp_path: Path) -> None:
    for content in (b"a long first version", b"second"):
        write_whole(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"second"


def changed(path: tuple[Any, ...], value: Any = None) -> Callable[[dict[str, Any]], None]:
    """What sets a value deep inside a state, or takes it away."""

    def change(state: dict[str, Any]) -> None:
        *parents, last = path
        place: Any = state
        for key in parents:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


W_I, SCALE, AVERAGE = ("model", "head.w_i"), ("model", "head.logit_scale"), ("optimizer", "state", 3)
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no epoch": (changed(("epoch",)), "the file has no epoch"),
    "no optimizer": (changed(("optimizer",)), "the file has no optimizer"),
    "unknown part": (changed(("extra",), 1), "the file has an unknown extra"),
    "epoch negative": (changed(("epoch",), -1), "epoch is -1, not a number from 1 to the run's 3 epochs"),
    "epoch 0": (changed(("epoch",), 0), "epoch is 0, not"),
    "epoch too large": (changed(("epoch",), 4), "epoch is 4, not"),
    "epoch of another run": (changed(("epoch",), 2), "history has 3 rows, not one for each of 2 epochs"),
    "epoch no integer": (changed(("epoch",), 3.0), "the file: epoch is 3.0 of type float"),
    "epoch true": (changed(("epoch",), True), "the file: epoch is True of type bool"),
    "config no dictionary": (changed(("config",), [1]), "the file: config is of type list"),
    "config without a setting": (changed(("config", "lr")), "config has no lr"),
    "config of a newer version": (changed(("config", "speed"), 1), "config has an unknown speed"),
    "setting of a wrong type": (changed(("config", "epochs"), "3"), "epochs: got '3'; accepted is"),
    "setting out of range": (changed(("config", "model"), "vit-huge"), "model: got 'vit-huge'; accepted are"),
    "another model": (changed(("config", "model"), "vit-tiny"), "model has no image_encoder"),
    "history no list": (changed(("history",), {}), "the file: history is of type dict"),
    "history without a column": (changed(("history", 1, "train_loss")), "row 2 of history has no train_loss"),
    "history with text": (changed(("history", 1, "train_loss"), "low"), "row 2 of history: train_loss is 'low'"),
    "history out of order": (changed(("history", 1, "epoch"), 9), "row 2 of history is not that of epoch 2"),
    "history not finite": (changed(("history", 1, "train_loss"), math.nan), "row 2 of history is not .* or not finite"),
    "tokenizer broken": (changed(("tokenizer",), "{}"), "tokenizer: "),
    "tokenizer no text": (changed(("tokenizer",), 3), "the file: tokenizer is 3 of type int"),
    "weights missing": (changed(W_I), "model has no head.w_i"),
    "weights unknown": (changed(("model", "head.w_x"), torch.zeros(2)), "model has an unknown head.w_x"),
    "weights misshapen": (changed(W_I, torch.zeros(2, 3)), r"model: head.w_i has shape \[2, 3\], not \["),
    "weights no tensor": (changed(W_I, "w"), "model: head.w_i is 'w' of type str"),
    "weights of another dtype": (changed(SCALE, torch.tensor(1.0).half()), "has dtype torch.float16"),
    "weights not finite": (changed(SCALE, torch.tensor(math.inf)), "logit_scale is not finite"),
    "optimizer without state": (changed(("optimizer", "state")), "optimizer has no state"),
    "groups missing": (changed(("optimizer", "param_groups"), []), "optimizer has 0 groups of parameters, not 2"),
    "group without betas": (changed(("optimizer", "param_groups", 0, "betas")), "optimizer, group 0 has no betas"),
    "group of other settings": (
        changed(("optimizer", "param_groups", 0, "eps"), "small"),
        "group 0: eps is 'small', not 1e-08",
    ),
    "group of other parameters": (
        changed(("optimizer", "param_groups", 0, "params"), [0, 0]),
        r"group 0: params is \[0, 0\], not \[0, 1",
    ),
    "averages of a parameter missing": (changed(AVERAGE), "optimizer, state has no 3"),
    "average missing": (changed((*AVERAGE, "exp_avg")), "optimizer, state of .* has no exp_avg"),
    "average misshapen": (changed((*AVERAGE, "exp_avg"), torch.zeros(7)), r"exp_avg has shape \[7\], not"),
    "step no tensor": (changed((*AVERAGE, "step"), 60), "step is 60 of type int"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_resume_refuses_a_broken_state(run: Result, tmp_path: Path, kind: str) -> None:
    """The message names the file and what is wrong with it, and nothing is written beside it."""
    change, message = BROKEN[kind]
    path = tmp_path / "checkpoint.pt"
    state = torch.load(Path(run.config.out, "checkpoint.pt"))
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"^resume: {path} is no checkpoint of clipfast.train: .*{message}"):
        resume(path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", [1], torch.ones(3), {"epoch": 1}], ids=repr)
def test_resume_refuses_another_file(tmp_path: Path, content: object) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"^resume: {path} is no checkpoint of clipfast.train"):
        resume(path)


def test_resume_refuses_a_file_that_was_cut_off(run: Result, tmp_path: Path) -> None:
    whole = Path(run.config.out, "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    for length in (100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^resume: {path} is no checkpoint of clipfast.train"):
            resume(path)
    with pytest.raises(FileNotFoundError, match=f"there is no checkpoint {tmp_path}"):
        resume(tmp_path)


def test_two_runs_cannot_share_a_folder(run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    with locked(tmp_path):
        with pytest.raises(BlockingIOError, match=f"out: another run is at work in {tmp_path}"):
            train(TrainConfig(out=str(tmp_path)))
        path.write_bytes(Path(run.config.out, "checkpoint.pt").read_bytes())
        assert main(["--resume", str(path)]) == 1
        assert {file.name for file in tmp_path.iterdir()} == {".lock", "checkpoint.pt"}
    monkeypatch.setattr(training, "read_concepts", lambda: read_concepts()[::40])
    assert resume(path).history == run.history


def test_a_killed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    """It holds the folder while it lives; the next run takes the lock over and clears what was half written."""
    program = """
import os, signal, sys
from pathlib import Path
from clipfast import checkpoint

def killed(descriptor):
    print("writing", flush=True)
    sys.stdin.read(1)
    os.kill(os.getpid(), signal.SIGKILL)

os.fsync = killed
folder = Path(sys.argv[1])
with checkpoint.locked(folder):
    checkpoint.save_checkpoint(folder / "checkpoint.pt", {"epoch": 1})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(training.__file__).parents[1])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pass
        process.communicate(b"\n")
    assert process.returncode == -9
    assert len([file for file in tmp_path.iterdir() if file.name.startswith(".checkpoint.pt.")]) == 1
    kept = [tmp_path / ".notes.12", tmp_path / "mine.12.part"]
    for file in kept:
        file.touch()
    with locked(tmp_path):
        assert set(tmp_path.iterdir()) == {tmp_path / ".lock", *kept}
