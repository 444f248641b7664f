from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipfast.emoji import data
from clipfast.emoji.data import Concept, Pairs, read_concepts
from clipfast.models import CONFIGS, build_model
from clipfast.training import run as training
from clipfast.training.checkpoint import save_checkpoint
from clipfast.training.run import (
    Result,
    TrainConfig,
    evaluate,
    learning_rate,
    load_checkpoint,
    main,
    parameter_groups,
    rebuild,
    report,
    resume,
    train,
    train_step,
)

CONCEPTS = 240


def some_concepts() -> list[Concept]:
    """The kangaroo and others, evenly over all concepts, without most variants."""
    concepts = read_concepts()
    kangaroo = [concept for concept in concepts if concept.name == "kangaroo"]
    return kangaroo + [Concept(concept.pictures[:2]) for concept in concepts[:: len(concepts) // CONCEPTS]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Batches this small gain nothing from a second one, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "read_concepts", some_concepts)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One short run that several tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "read_concepts", some_concepts)
        return train(TrainConfig(out=str(tmp_path_factory.mktemp("run") / "demo"), epochs=20, batch_size=64, lr=3e-3))


def test_it_learns(run: Result) -> None:
    learned, _ = data.split(some_concepts(), run.config.seed)
    recall = evaluate(run.model, run.tokenizer, Pairs(learned, CONFIGS[run.config.model].image_size, True))
    chance = 1 / len(learned)
    assert recall["image_to_text_R@1"] > 15 * chance
    assert recall["text_to_image_R@1"] > 15 * chance
    assert run.history[-1]["train_loss"] < 0.6 * run.history[0]["train_loss"]


def test_what_a_run_leaves(run: Result) -> None:
    out = Path(run.config.out)
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "checkpoint.pt",
        "log.csv",
        "loss.png",
        "retrieval.png",
        "tensorboard",
    }
    for name in ("loss.png", "retrieval.png"):
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 20_000
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == run.history
    assert len(rows) == run.config.epochs
    assert next((out / "tensorboard").iterdir()).stat().st_size > 1000


def test_the_checkpoint_rebuilds_model_and_tokenizer(run: Result) -> None:
    model, tokenizer = rebuild(load_checkpoint(Path(run.config.out, "checkpoint.pt")))
    pairs = Pairs(run.held_out, 48, plain=True)
    row = evaluate(model, tokenizer, pairs)
    assert row == {name: run.history[-1][name] for name in row}


def test_report(run: Result) -> None:
    table = report(run).splitlines()
    assert table[0].split() == ["24", "held-out", "concepts", "R@1", "R@5", "R@10"]
    assert table[1].split() == ["chance", "4.2%", "20.8%", "41.7%"]
    assert len({len(line) for line in table}) == 1


@pytest.mark.parametrize("text", ["cbow", "transformer"])
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    whole = train(TrainConfig(out=str(tmp_path / "whole"), text=text, epochs=4, batch_size=64))

    steps = 0

    def interrupted(*arguments: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 8:  # in the middle of the third epoch of three steps
            raise KeyboardInterrupt
        return train_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(out=str(tmp_path / "parts"), text=text, epochs=4, batch_size=64))
    monkeypatch.undo()
    monkeypatch.setattr(training, "read_concepts", some_concepts)

    checkpoint = tmp_path / "parts" / "checkpoint.pt"
    assert load_checkpoint(checkpoint)["epoch"] == 2
    parts = resume(checkpoint)
    assert parts.history == whole.history
    assert (tmp_path / "parts" / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name


def test_seeds(tmp_path: Path) -> None:
    def log(name: str, seed: int) -> bytes:
        train(TrainConfig(out=str(tmp_path / name), epochs=2, batch_size=64, seed=seed))
        return (tmp_path / name / "log.csv").read_bytes()

    assert log("a", 1) == log("b", 1) != log("c", 2)


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
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, 2.0) == 2.0


def test_the_step_clips_the_logit_scale() -> None:
    model = build_model("resnet-tiny", 50, 7, "cbow")
    with torch.no_grad():
        model.head.logit_scale.fill_(5.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    images, tokens = torch.randn(4, 3, 48, 48), torch.randint(1, 49, (4, 7))
    train_step(model, optimizer, images, tokens, lr=1e-3)
    assert model.head.logit_scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model", "vit-huge"),
        ("text", "lstm"),
        ("epochs", 0),
        ("batch_size", 1),
        ("lr", 0.0),
        ("lr", math.nan),
        ("weight_decay", -1.0),
        ("dropout", 1.0),
        ("seed", -1),
        ("epochs", 2.5),
        ("seed", True),
        ("lr", "fast"),
        ("out", Path("runs")),
    ],
)
def test_wrong_settings_are_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{option}: got"):
        TrainConfig(**{option: value})  # type: ignore[arg-type]


def test_errors_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main(arguments) == 1
        return capsys.readouterr().err

    missing, broken, used, file = (tmp_path / name for name in ("missing.pt", "broken.pt", "used", "file"))
    broken.write_bytes(b"no checkpoint")
    used.mkdir()
    (used / "checkpoint.pt").touch()
    file.touch()
    assert "there is no checkpoint" in error("--resume", str(missing))
    assert "is no checkpoint of clipfast.train" in error("--resume", str(broken))
    assert "holds a run" in error("--out", str(used))
    assert "file" in error("--out", str(file / "below"))
    assert "batch_size: got 4096" in error("--out", str(tmp_path / "new"), "--batch-size", "4096")
    assert "epochs: got 0" in error("--epochs", "0")
    with pytest.raises(SystemExit):
        main(["--resume", str(missing), "--epochs", "3"])
    assert "leave out --epochs" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(config: TrainConfig) -> Result:
        save_checkpoint(Path(config.out, "checkpoint.pt"), {})
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stop)
    assert main(["--out", str(tmp_path)]) == 130
    assert f"python -m clipfast.train --resume {tmp_path / 'checkpoint.pt'}" in capsys.readouterr().err


def test_a_diverged_run_ends_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its first epoch, with a log and no checkpoint of broken weights; the next run may have the folder."""
    arguments = ("--out", str(tmp_path), "--batch-size", "64", "--epochs", "2")
    assert main([*arguments, "--lr", "1e30"]) == 1
    printed = capsys.readouterr()
    assert "24 held-out concepts" in printed.out
    assert "diverged in epoch 1 at learning rate 1e+30: train_loss nan" in printed.out
    assert "error" not in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "log.csv", "loss.png", "tensorboard"}
    assert main(arguments) == 0
    assert "diverged in" not in capsys.readouterr().out


def test_the_checkpoint_of_a_run_that_diverges_is_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def diverging(model: Any, *arguments: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 5:  # in the second epoch of three steps
            with torch.no_grad():
                model.head.w_i.fill_(math.nan)
        return train_step(model, *arguments)

    monkeypatch.setattr(training, "train_step", diverging)
    result = train(TrainConfig(out=str(tmp_path), epochs=4, batch_size=64))
    assert result.diverged
    assert (steps, len(result.history)) == (5, 2)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("text", ["cbow", "transformer"])
def test_every_model_resumes(tmp_path: Path, model: str, text: str) -> None:
    """What a run saves is what resume accepts, a learning rate without a fraction too."""
    train(TrainConfig(out=str(tmp_path), model=model, text=text, epochs=1, batch_size=100, lr=1, weight_decay=0))
    assert len(resume(tmp_path / "checkpoint.pt").history) == 1
