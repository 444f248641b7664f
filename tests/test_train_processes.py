"""Training in several processes equals training in one; killed at any moment, it goes on as if nothing had been."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from training_runs import SMALL, difference, finish, kill_and_resume, losses, start

pytest.importorskip("safetensors", reason="the extra `demo` brings it")

# 8 steps; a constant rate, so that a run may first have fewer.
FLAGS = (*SMALL, "--train-num-samples", "64", "--epochs", "2", "--lr-scheduler", "const")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a whole run of one process."""
    folder = tmp_path_factory.mktemp("logs")
    finish(*FLAGS, "--logs", str(folder), "--name", "whole")
    return folder


def test_killed_and_resumed(logs: Path) -> None:
    """`python tests/training_runs.py --kills 20` is the long form."""
    kill_and_resume(logs, 2, 0, *FLAGS)
    assert difference(logs / "whole", logs / "killed") == 0
    assert losses(logs / "whole") == losses(logs / "killed")


HALF = ("--batch-size", "8", "--accum-freq", "1")


def assert_equals_whole(logs: Path, name: str) -> None:
    assert losses(logs / name) == pytest.approx(losses(logs / "whole"), abs=1e-4)
    assert difference(logs / name, logs / "whole") < 1e-4


def test_two_processes_equal_one(logs: Path) -> None:
    finish(*FLAGS, *HALF, "--logs", str(logs), "--name", "ddp", processes=2)
    assert_equals_whole(logs, "ddp")


def test_two_sharded_processes_go_on_as_one(logs: Path) -> None:
    where = ("--logs", str(logs), "--name", "fsdp2")
    finish(*FLAGS, *HALF, *where, "--fsdp", "--epochs", "1", processes=2)
    finish(*where, "--resume", "latest", "--epochs", "2")
    assert_equals_whole(logs, "fsdp2")


def test_one_process_goes_on_as_two(logs: Path) -> None:
    where = ("--logs", str(logs), "--name", "one")
    finish(*FLAGS, *where, "--epochs", "1")
    finish(*where, "--resume", "latest", "--epochs", "2", processes=2)
    assert_equals_whole(logs, "one")


def test_sigterm_in_two_processes(logs: Path) -> None:
    where = ("--logs", str(logs), "--name", "stopped")
    process = start(*FLAGS, *where, *HALF, "--epochs", "400", processes=2)
    assert process.stderr is not None
    told = ""
    while "samples/s" not in told:
        told += process.stderr.read(1)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    told += process.communicate()[1]
    assert "by SIGTERM; go on with: python -m clipfast.train --resume" in told
    assert list((logs / "stopped").glob("step-*"))


def test_an_error_is_told_once(tmp_path: Path) -> None:
    process = start(*FLAGS, "--logs", str(tmp_path), "--name", "x", "--batch-size", "99", processes=2)
    told = process.communicate()[1]
    assert process.returncode != 0
    assert told.count("error: --batch-size: 2 times 99 pairs in a step; the data has 64") == 1
