"""`python -m clipfast.train` in one process: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_data import write_csv, write_shards

from clipfast.models import build_model
from clipfast.training import run as training
from clipfast.training.checkpoint import checkpoints
from clipfast.training.flags import parse, parser
from clipfast.training.optimization import learning_rate, parameter_groups
from clipfast.training.run import main

load_file = pytest.importorskip("safetensors.torch", reason="the extra `demo` brings it").load_file

SMALL = ("--dataset-type", "synthetic", "--train-num-samples", "70", "--batch-size", "16", "--accum-freq", "2",
         "--precision", "fp32", "--workers", "0", "--warmup", "2", "--log-every-n-steps", "1", "--text", "cbow",
         "--model", "resnet-tiny", "--lr", "1e-3")  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Batches this small gain nothing from a second one, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(logs: Path, name: str, *flags: str, status: int = 0) -> Path:
    assert main([*SMALL, "--logs", str(logs), "--name", name, *flags]) == status
    return logs / name


def table(run: Path, file: str = "log.csv") -> list[dict[str, float]]:
    """Without speed and memory."""
    with (run / file).open() as lines:
        rows = list(csv.DictReader(lines))
    return [
        {name: float(v) for name, v in row.items() if v and name not in ("samples_per_s", "peak_mib")} for row in rows
    ]


def assert_equal(got: Path, expected: Path) -> None:
    """Their last checkpoints bit for bit, and their logs."""
    assert table(got) == table(expected)
    last = checkpoints(expected)[-1]
    assert checkpoints(got)[-1].name == last.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(run / last.name / file) for run in (got, expected))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of four steps."""
    return train(tmp_path_factory.mktemp("whole"), "run", "--epochs", "3", "--report-to", "tensorboard")


def test_what_a_run_leaves(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    steps = {f"step-{4 * epoch:08d}" for epoch in (1, 2, 3)}
    assert names == {".lock", "log.csv", "settings.json", "tensorboard", "tokenizer.json", *steps}
    assert {path.name for path in checkpoints(whole)[0].iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    rows = table(whole)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["epoch"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["accuracy"] > 3 * rows[0]["accuracy"] / 2
    made = json.loads((whole / "settings.json").read_text())
    assert made["flags"]["lr"] == 1e-3
    assert made["global_batch"] == 16
    assert made["pairs"] == 70
    assert {"command", "date", "processes", "host", "versions", "device"} == set(made["starts"][0])
    assert next((whole / "tensorboard").iterdir()).stat().st_size > 1000


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Has the process get a signal in a certain step."""
    real, steps = training.train_step, 0

    def stop(step: int, number: int) -> None:
        nonlocal steps
        steps = 0

        def train_step(*arguments: Any) -> torch.Tensor:
            nonlocal steps
            steps += 1
            if steps == step:
                os.kill(os.getpid(), number)
            return real(*arguments)

        monkeypatch.setattr(training, "train_step", train_step)

    yield stop
    monkeypatch.undo()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [1, 6])
def test_a_stopped_run_goes_on_exactly(
    whole: Path,
    tmp_path: Path,
    stopping: Callable[[int, int], None],
    capsys: pytest.CaptureFixture[str],
    number: int,
    status: int,
    step: int,
) -> None:
    stopping(step, number)
    run = train(tmp_path, "run", "--epochs", "3", status=status)
    told = capsys.readouterr().err
    assert f"stopped at step {step} by {signal.Signals(number).name}; go on with: " in told
    assert f"python -m clipfast.train --resume {run}" in told
    assert checkpoints(run)[-1].name == f"step-{step:08d}"
    stopping(0, number)
    assert main(["--resume", str(run)]) == 0
    assert_equal(run, whole)
    assert [path.name for path in checkpoints(run)] == [path.name for path in checkpoints(whole)]


def test_epochs_may_become_more(whole: Path, tmp_path: Path) -> None:
    """Nobody knows the schedule beforehand, so it is a constant one."""
    constant = ("--lr-scheduler", "const")
    expected = train(tmp_path, "three", *constant, "--epochs", "3")
    run = train(tmp_path, "one", *constant, "--epochs", "1", "--save-every-n-steps", "3")
    assert [path.name for path in checkpoints(run)] == ["step-00000004"]
    assert main(["--resume", str(run), "--epochs", "3", "--workers", "1"]) == 0
    assert_equal(run, expected)
    assert main(["--resume", "latest", "--logs", str(tmp_path), "--name", "one"]) == 0  # nothing is left to do
    assert_equal(run, expected)


def test_seeds(whole: Path, tmp_path: Path) -> None:
    assert table(train(tmp_path, "same", "--epochs", "1", "--lr-scheduler", "const"))[:2] == table(whole)[:2]
    assert table(train(tmp_path, "other", "--epochs", "1", "--seed", "1"))[0] != table(whole)[0]


def test_the_tokenizer_of_open_clip(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="it ships the merges")
    run = train(tmp_path, "run", "--model", "vit-tiny", "--epochs", "1", "--tokenizer", "clip")
    weights = load_file(checkpoints(run)[-1] / "model.safetensors")
    assert 49408 in {len(weight) for weight in weights.values() if weight.ndim}


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    """Where there is no batch normalization. In step 3 two cosines differ by 9e-9, and either may be the best."""
    runs = [train(tmp_path, n, "--model", "vit-tiny", "--epochs", "1", "--accum-freq", n) for n in ("1", "5")]
    for one, two in zip(*map(table, runs), strict=True):
        assert one.pop("accuracy") == pytest.approx(two.pop("accuracy"), abs=1 / 32)
        assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("kind", ["webdataset", "csv"])
def test_own_data_with_corrupt_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    spoiled = (3, 11, 12, 20)
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    if kind == "csv":
        data, val = write_csv(tmp_path / "train", 40, spoiled), write_csv(tmp_path / "val", 6, (2,))
    else:
        data, val = write_shards(tmp_path / "train", (25, 15), spoiled), write_shards(tmp_path / "val", (6,), (2,))
    flags = ("--dataset-type", kind, "--train-data", data, "--val-data", val, "--epochs", "2")
    run = train(tmp_path, "run", *flags)
    told = capsys.readouterr().err
    assert 2 <= told.count("cannot be read, another pair takes its place") <= 4
    assert table(run)[-1]["unreadable"] >= told.count("another pair takes its place")
    rows = table(run, "evaluation.csv")
    assert [row["epoch"] for row in rows[:1]] == [1]
    assert rows[0]["pairs"] == 5
    assert {"image_to_text_R@1", "text_to_image_R@10", "loss"} <= rows[0].keys()


def test_openmoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipfast.emoji import data

    concepts = data.read_concepts()[::20]
    monkeypatch.setattr(data, "read_concepts", lambda: concepts)
    run = train(tmp_path, "run", "--dataset-type", "openmoji", "--epochs", "1", "--zeroshot-frequency", "1")
    (row,) = table(run, "evaluation.csv")
    assert 0 <= row["zero_shot_accuracy"] <= 1
    assert row["pairs"] == pytest.approx(len(concepts) / 10, abs=1)


def test_mostly_bad_data_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_shards(tmp_path, (40,), [i for i in range(40) if i % 4])
    run = train(tmp_path, "run", "--dataset-type", "webdataset", "--train-data", data, status=1)
    assert "error: --train-data: " in (told := capsys.readouterr().err)
    assert "pairs cannot be read" in told
    assert not (run / "log.csv").exists() or not table(run)


@pytest.mark.parametrize(
    "flags",
    [
        ("--siglip", "--grad-clip-norm", "1", "--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1"),
        ("--lock-image", "--save-frequency", "2", "--local-loss", "--gather-with-grad"),
        ("--lock-text", "--precision", "amp", "--text", "transformer"),
        ("--model", "vit-tiny", "--grad-checkpointing", "--precision", "pure_bf16"),
    ],
    ids=" ".join,
)
def test_flags_and_how_they_go_on(tmp_path: Path, stopping: Callable[[int, int], None], flags: tuple[str, ...]) -> None:
    expected = train(tmp_path, "whole", "--epochs", "2", "--train-num-samples", "34", *flags)
    stopping(3, signal.SIGTERM)
    run = train(tmp_path, "run", "--epochs", "2", "--train-num-samples", "34", *flags, status=143)
    stopping(0, 0)
    assert main(["--resume", str(run)]) == 0
    assert_equal(run, expected)


def test_frozen_encoders_stay_as_they_were(tmp_path: Path) -> None:
    run = train(tmp_path, "run", "--epochs", "2", "--lock-image", "--train-num-samples", "34")
    first, last = (load_file(path / "model.safetensors") for path in checkpoints(run))
    for name in first:
        assert torch.equal(first[name], last[name]) == name.startswith("image_encoder"), name


def test_a_run_that_diverges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, "run", "--lr", "1e30", "--epochs", "2", status=1)
    assert "error: the loss is nan at step " in capsys.readouterr().err
    assert not checkpoints(run)


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(flags) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "Traceback" not in told
    return told


def test_what_is_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the name of its flag, and the file, before the first step."""
    shards = write_shards(tmp_path, (20,))
    new = (*SMALL, "--logs", str(tmp_path), "--name", "new")
    tars = ("--dataset-type", "webdataset", "--train-data")
    for flags, text in {
        ("--batch-size", "0"): "--batch-size: got 0; accepted is a number from 1",
        ("--batch-size", "71"): "--batch-size: 1 times 71 pairs in a step; the data has 70",
        ("--accum-freq", "17"): "--accum-freq: got 17; accepted are up to --batch-size 16",
        ("--lr", "nan"): "--lr: got nan; accepted is a positive number",
        ("--beta1", "1"): "--beta1: got 1.0; accepted",
        ("--dataset-type", "csv"): "--train-data: got none; --dataset-type csv needs it",
        ("--lr-scheduler", "const-cooldown"): "--epochs-cooldown: got None; accepted are 1 to 32 epochs",
        ("--grad-checkpointing",): "--grad-checkpointing: accepted with the Vision Transformers",
        ("--tokenizer", str(tmp_path / "t.json")): f"--tokenizer: {tmp_path / 't.json'} cannot be read",
        (*tars, str(tmp_path / "00001.tar")): f"there is no shard {tmp_path / '00001.tar'}",
        (*tars, shards, "--val-data", "missing.tar"): "--val-data: there is no shard missing.tar",
        ("--resume", "latest"): f"--resume: {tmp_path / 'new'} holds no run",
        ("--resume", str(whole / "step-00000007")): f"--resume: there is no checkpoint {whole / 'step-00000007'}",
        ("--resume", str(whole), "--lr", "1"): "--lr: got 1.0; the run that goes on has 0.001",
        (
            "--resume",
            str(whole),
            "--batch-size",
            "8",
        ): "--batch-size: got 8 for each of 1 processes; the run's step has 16",
        ("--resume", str(whole), "--epochs", "2"): "--epochs: got 2; the run that goes on has 3, accepted are more",
        ("--resume", str(whole / "step-00000004"), "--epochs", "3"): "is older than",
    }.items():
        given = flags if flags[0] == "--resume" and flags[1] != "latest" else (*new, *flags)
        assert text in refused(capsys, *given), flags
    assert "holds a run; give another one, or --resume" in refused(
        capsys, *SMALL, "--logs", str(whole.parent), "--name", whole.name
    )


def test_resume_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--name: got none; --resume latest needs it" in refused(capsys, "--resume", "latest")


def test_help_names_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for title in ("data:", "model:", "batch and memory:", "optimization:", "the run's folder:"):
        assert title in told
    for action in parser()._actions:
        if action.option_strings[-1] != "--help":
            assert action.help, action.option_strings
    assert "(default: 0.0005)" in told


def test_open_clips_flags_and_defaults() -> None:
    """Those that both have, but for what is chosen by the model."""
    theirs = pytest.importorskip("open_clip_train.params").parse_args([])
    ours = vars(parse(["--dataset-type", "synthetic"])[0])
    different = {n for n, v in vars(theirs).items() if n in ours and n not in ("beta2", "eps") and ours[n] != v}
    assert different == {"dataset_type"}  # theirs, "auto", looks at the files' names
    assert set(ours) - set(vars(theirs)) == {"tokenizer", "vocab_size", "text", "fsdp", "save_every_n_steps"}


def test_decay_groups() -> None:
    model = build_model("vit-tiny", 50, 7)
    decayed, free = parameter_groups(model, 0.2)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.2, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    undecayed = {names[id(parameter)] for parameter in free["params"]}
    assert "head.logit_scale" in undecayed
    kinds = {type(model.get_submodule(name.rpartition(".")[0])) for name in undecayed if not name.endswith("bias")}
    assert nn.Linear not in kinds
    assert nn.Conv2d not in kinds
    assert {"head.w_i", "head.w_t", "text_encoder.tokens.weight"} <= {names[id(p)] for p in decayed["params"]}


def test_learning_rate() -> None:
    rates = [learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, 2.0, 0) == 2.0
    cooled = [learning_rate(step, 100, 2.0, 10, "const-cooldown", 20) for step in range(100)]
    assert cooled[10:80] == [2.0] * 70
    assert cooled[90] == pytest.approx(1.0)
    assert {learning_rate(step, 100, 2.0, 10, "const") for step in range(10, 100)} == {2.0}


def test_the_step_clips_the_logit_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = training.build

    def hot(*arguments: Any) -> nn.Module:
        model = build(*arguments)
        with torch.no_grad():
            model.get_parameter("head.logit_scale").fill_(5.0)
        return model

    monkeypatch.setattr(training, "build", hot)
    run = train(tmp_path, "run", "--epochs", "1", "--train-num-samples", "16")
    scale = load_file(checkpoints(run)[-1] / "model.safetensors")["head.logit_scale"]
    assert scale.item() == pytest.approx(math.log(100))


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without inductor, whose C++ takes minutes; the graphs and what is between them are the same."""
    flags = ("--model", "vit-tiny", "--epochs", "1", "--train-num-samples", "32")
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile(module, backend="aot_eager"))
    try:
        runs = train(tmp_path, "plain", *flags), train(tmp_path, "compiled", *flags, "--torchcompile")
        for one, two in zip(*map(table, runs), strict=True):
            assert one == pytest.approx(two, abs=1e-4)
    finally:
        torch.compiler.reset()
