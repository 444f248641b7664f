"""Training in processes of its own: killed at random moments, resumed, and in several processes.

`python tests/training_runs.py --kills 20` kills and resumes a run twenty times and compares it with a whole one.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SMALL = ("--dataset-type", "synthetic", "--batch-size", "16", "--accum-freq", "2", "--precision", "fp32", "--workers",
         "1", "--warmup", "2", "--log-every-n-steps", "1", "--model", "vit-tiny", "--text", "cbow",
         "--save-every-n-steps", "1")  # fmt: skip


def start(*flags: str, processes: int = 1) -> subprocess.Popen[str]:
    """python -m clipfast.train, by torchrun if there are several processes; in a group of its own."""
    command = [sys.executable, "-m"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        command += ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port), "-m"]
    dashes = ("--",) if processes > 1 else ()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [*command, "clipfast.train", *dashes, *flags],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def finish(*flags: str, processes: int = 1) -> None:
    process = start(*flags, processes=processes)
    told = process.communicate()[1]
    assert process.returncode == 0, told


def losses(run: Path) -> list[float]:
    with (run / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(max(run.glob("step-*")) / "model.safetensors")


def difference(one: Path, two: Path) -> float:
    """The largest between final weights; infinite if they are not of the same step."""
    if max(one.glob("step-*")).name != max(two.glob("step-*")).name:
        return float("inf")
    first, second = last_weights(one), last_weights(two)
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def kill_and_resume(logs: Path, kills: int, seed: int, *flags: str) -> tuple[int, list[int]]:
    """Start a run and kill -9 it and its workers `kills` times at random moments, then let it end.

    Returns how many kills met a run that was still at work, and the steps that were saved at each of them.
    """
    run, draw, met, steps = logs / "killed", random.Random(seed), 0, []
    for _ in range(kills):
        resume = ("--resume", "latest") if (run / "settings.json").exists() else flags
        began, log = time.time(), run / "log.csv"
        process = start(*resume, "--logs", str(logs), "--name", "killed")
        if draw.random() < 0.8:  # while it trains and saves; else also before, while it starts
            while process.poll() is None and not (log.exists() and log.stat().st_mtime > began):
                time.sleep(0.05)
        time.sleep(draw.uniform(0, 2))
        met += process.poll() is None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        steps.append(max((int(path.name[5:]) for path in run.glob("step-*")), default=0))
    resume = ("--resume", "latest") if (run / "settings.json").exists() else flags
    finish(*resume, "--logs", str(logs), "--name", "killed")
    return met, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    flags = (*SMALL, "--train-num-samples", str(given.pairs), "--epochs", str(given.epochs))
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        finish(*flags, "--logs", folder, "--name", "whole")
        met, steps = kill_and_resume(logs, given.kills, given.seed, *flags)
        whole, killed = logs / "whole", logs / "killed"
        print(f"{met} of {given.kills} kills met the run at work; steps saved by then: {steps}")
        print(f"largest difference of final weights: {difference(whole, killed)}")
        print(f"losses equal: {losses(whole) == losses(killed)}, {len(losses(whole))} steps")


if __name__ == "__main__":
    main()
