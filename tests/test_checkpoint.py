"""A run's folder: whole files, one run at a time, and many kinds of files that are no checkpoint (trap 30)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clipfast
from clipfast.training import checkpoint
from clipfast.training.checkpoint import checkpoints, locked, write_whole
from clipfast.training.run import main

safetensors = pytest.importorskip("safetensors.torch", reason="the extra `demo` brings it")

ARGUMENTS = ("--dataset-type", "synthetic", "--train-num-samples", "8", "--batch-size", "8", "--precision", "fp32",
             "--workers", "0", "--text", "cbow", "--model", "resnet-tiny")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    logs = tmp_path_factory.mktemp("logs")
    assert main([*ARGUMENTS, "--logs", str(logs), "--name", "run", "--epochs", "1"]) == 0
    return logs / "run"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_whole(path, b"first")

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_write_whole_replaces(tmp_path: Path) -> None:
    for content in (b"a long first version", b"second"):
        write_whole(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"second"


def test_a_checkpoint_is_there_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"step": 3, "scaler": {}, "unreadable": 0}
    weights = {"w": torch.ones(2)}

    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(tmp_path, weights, {}, state)
    assert not checkpoints(tmp_path)
    monkeypatch.undo()
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # what was half written is gone
        path = checkpoint.save(tmp_path, weights, {}, state)
    assert checkpoints(tmp_path) == [path]
    got = checkpoint.load(path)
    assert torch.equal(got[0]["w"], weights["w"])
    assert got[1:] == ({}, state)


def changed(file: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """What changes the tensors or the values of a checkpoint's file."""

    def spoil(path: Path) -> None:
        if file == "state.json":
            state = json.loads((path / file).read_text())
            change(state)
            (path / file).write_text(json.dumps(state))
        else:
            tensors = safetensors.load_file(path / file)
            change(tensors)
            safetensors.save_file(tensors, path / file)

    return spoil


def weights(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    return changed("model.safetensors", change)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is no part of a checkpoint"),
    "no moments": (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is no part"),
    "no state": (lambda path: (path / "state.json").unlink(), "state.json is no part of a checkpoint"),
    "weights cut": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000]),
        "model.safetensors is no part",
    ),
    "state no JSON": (lambda path: (path / "state.json").write_text("{"), "state.json is no part"),
    "no step": (changed("state.json", lambda state: state.pop("step")), "it has no step"),
    "step true": (changed("state.json", lambda state: state.update(step=True)), "step is True of type bool"),
    "unknown part": (changed("state.json", lambda state: state.update(extra=1)), "it has an unknown extra"),
    "weight missing": (weights(lambda tensors: tensors.pop("head.w_i")), "model.safetensors has no head.w_i"),
    "weight unknown": (weights(lambda t: t.update(w_x=torch.ones(2))), "model.safetensors has an unknown w_x"),
    "weight misshapen": (
        weights(lambda t: t.update({"head.w_i": torch.ones(2, 3)})),
        "head.w_i has shape [2, 3], not [",
    ),
    "weight of another dtype": (
        weights(lambda t: t.update({"head.w_i": t["head.w_i"].half()})),
        "head.w_i has dtype torch.float16, not torch.float32",
    ),
    "weight not finite": (weights(lambda t: t["head.logit_scale"].fill_(torch.inf)), "logit_scale is not finite"),
    "moment missing": (
        changed("optimizer.safetensors", lambda tensors: tensors.pop("head.w_i/exp_avg")),
        "optimizer.safetensors has no head.w_i/exp_avg",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    """An error that names the file, and nothing is written."""
    for file in run.rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(run)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    spoil, text = BROKEN[how]
    spoil(checkpoints(tmp_path)[-1])
    before = sorted(file.name for file in tmp_path.rglob("*"))
    assert main(["--resume", str(tmp_path), "--epochs", "2"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: --resume: {checkpoints(tmp_path)[-1]}")
    assert text in told
    assert sorted(file.name for file in tmp_path.rglob("*")) == before


def test_settings_that_no_run_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{", "{}", "[]"):
        (tmp_path / "settings.json").write_text(content)
        assert main(["--resume", str(tmp_path)]) == 1
        assert f"--resume: {tmp_path / 'settings.json'} is not what a run wrote" in capsys.readouterr().err


def test_two_runs_cannot_share_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(run):
        for arguments in (("--resume", str(run)), (*ARGUMENTS, "--logs", str(run.parent), "--name", run.name)):
            assert main(arguments) == 1
            assert f"another run is at work in {run}" in capsys.readouterr().err
    assert main(["--resume", str(run)]) == 0


def test_a_killed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    """It holds the folder while it lives; the next run takes the lock over and clears what was half written."""
    program = """
import os, signal, sys
from pathlib import Path
from clipfast.training import checkpoint

def killed(descriptor):
    print("writing", flush=True)
    sys.stdin.read(1)
    os.kill(os.getpid(), signal.SIGKILL)

os.fsync = killed
folder = Path(sys.argv[1])
with checkpoint.locked(folder):
    checkpoint.save(folder, {}, {}, {"step": 1})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(clipfast.__file__).parents[1])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pass
        process.communicate(b"\n")
    assert process.returncode == -9
    assert len([file for file in tmp_path.iterdir() if file.name.startswith(".step-00000001.")]) == 1
    kept = [tmp_path / ".notes.12", tmp_path / "mine.12.part"]
    for file in kept:
        file.touch()
    with locked(tmp_path):
        assert set(tmp_path.iterdir()) == {tmp_path / ".lock", *kept}
