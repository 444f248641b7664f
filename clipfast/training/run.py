"""Train the reference CLIP on emoji and look for things that it never saw: `python -m clipfast.train`.

The recipe is the paper's (Radford et al. 2021, arXiv:2103.00020, section 2.5 and table 18): AdamW without decay on
gains, biases and the temperature; a linear warm-up, then a cosine; the temperature clipped at 100.
Whole concepts are held out, the kangaroo among them, so recall on them is recall on names and drawings that no
training step has seen.

All randomness of an epoch comes from (seed, epoch), so a resumed run goes on exactly as the uninterrupted one.

The exit status is 0, 1 after an error or a run that diverged, 130 after an interrupt.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.emoji.data import TEMPLATES, Concept, Pairs, Tokenizer, draw, read_concepts, require, split, to_float
from clipfast.metrics import retrieval_metrics
from clipfast.models import CLIP, CONFIGS, TEXT_ENCODERS, build_model, classify, zero_shot_weights
from clipfast.modules import ContrastiveLoss
from clipfast.training.checkpoint import check_optimizer, check_parts, check_tensors, locked, save_checkpoint, write_log

VIT_ADAM: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-6}
RESNET_ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
MAX_LOGIT_SCALE = math.log(100)
WARMUP = 0.1  # of the steps
VOCAB_SIZE, CONTEXT_LENGTH = 1000, 32
KS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
RECALLS = tuple(f"{direction}_R@{k}" for direction in DIRECTIONS for k in KS)
COLUMNS = ("epoch", "step", "lr", "train_loss", "held_out_loss", "logit_scale", *RECALLS)
PARTS = {"config": dict, "epoch": int, "history": list, "tokenizer": str, "model": dict, "optimizer": dict}
SHEET_PICTURES, SHEET_PIXELS = 12, 144


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run.

    Args:
        out: the folder that gets checkpoint.pt, log.csv, the pictures and the TensorBoard files.
        model: a row of `clipfast.models.CONFIGS`.
        text: the text encoder, "transformer" or "cbow".
        epochs: passes over the training concepts.
        batch_size: pairs in a step.
        lr: peak learning rate.
        weight_decay: on matrices and convolutions.
        dropout: of the encoders.
        seed: of the held-out concepts, the initial weights and all batches.

    Raises:
        ValueError: a value is out of range or of another type; the message names it.
    """

    out: str = "runs/demo"
    model: str = "resnet-tiny"
    text: str = "cbow"
    epochs: int = 80
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.2
    dropout: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, value = type(field.default), getattr(self, field.name)
            if not isinstance(value, (float, int) if kind is float else kind) or isinstance(value, bool):
                raise ValueError(f"{field.name}: got {value!r}; accepted is a value of type {kind.__name__}")
        if self.model not in CONFIGS:
            raise ValueError(f"model: got {self.model!r}; accepted are {', '.join(CONFIGS)}")
        if self.text not in TEXT_ENCODERS:
            raise ValueError(f"text: got {self.text!r}; accepted are {', '.join(TEXT_ENCODERS)}")
        if self.epochs < 1:
            raise ValueError(f"epochs: got {self.epochs}; accepted is a number from 1")
        if self.batch_size < 2:
            raise ValueError(f"batch_size: got {self.batch_size}; accepted is a number from 2")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: got {self.lr}; accepted is a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: got {self.weight_decay}; accepted is a number from 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}; accepted is a number from 0, below 1")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}; accepted is a number from 0")


@dataclass(frozen=True)
class Result:
    """What a run leaves: the model in eval mode, its tokenizer, and one row of figures for each epoch."""

    config: TrainConfig
    model: CLIP
    tokenizer: Tokenizer
    history: list[dict[str, float]]
    held_out: list[Concept]

    @property
    def diverged(self) -> bool:
        """Whether the last epoch has a figure that is not finite; it is the last one then, and in no checkpoint."""
        return not all(map(math.isfinite, self.history[-1].values()))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters for AdamW: weight decay on matrices and convolutions, none on gains, biases and temperature."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of step 0..steps-1: a linear warm-up to the peak, then half a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_step(model: CLIP, optimizer: torch.optim.Optimizer, images: Tensor, tokens: Tensor, lr: float) -> Tensor:
    """One step on images [b, 3, h, w] and tokens [b, s]; returns the loss, 0-D, and keeps exp(t) at most 100."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss: Tensor = ContrastiveLoss()(**model(images, tokens))
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    with torch.no_grad():
        model.head.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    return loss.detach()


@torch.no_grad()
def evaluate(model: CLIP, tokenizer: Tokenizer, pairs: Pairs) -> dict[str, float]:
    """Loss, temperature and recall in both directions on one plain picture and name of each held-out concept."""
    device = model.head.logit_scale.device
    model.eval()
    names = [captions[0] for captions in pairs.captions]
    outputs = model(to_float(pairs.images).to(device), tokenizer(names).to(device))
    recall = retrieval_metrics(outputs["image_features"], outputs["text_features"], KS)
    return {
        "held_out_loss": ContrastiveLoss()(**outputs).item(),
        "logit_scale": outputs["logit_scale"].item(),
        **{name: recall[name] for name in RECALLS},
    }


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state of a run: its config, epoch, history, tokenizer, model and optimizer, all whole and fit for each other.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of `clipfast.train`; the message says what is wrong with it.
        ImportError: a package of the demo is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"resume: there is no checkpoint {path}")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        _check(state)
    except ImportError:
        raise
    except Exception as error:
        # What torch.load has to say of a broken file is long, and not about this file.
        why = f": {error}" if isinstance(error, ValueError) else ""
        raise ValueError(f"resume: {path} is no checkpoint of clipfast.train{why}") from error
    return state


def _check(state: Any) -> None:
    check_parts("the file", state, PARTS)
    check_parts("config", state["config"], dict.fromkeys(asdict(TrainConfig()), (int, float, str)))
    config, epoch, history = TrainConfig(**state["config"]), state["epoch"], state["history"]
    if not 1 <= epoch <= config.epochs:
        raise ValueError(f"epoch is {epoch}, not a number from 1 to the run's {config.epochs} epochs")
    if len(history) != epoch:
        raise ValueError(f"history has {len(history)} rows, not one for each of {epoch} epochs")
    for number, row in enumerate(history, 1):
        check_parts(f"row {number} of history", row, dict.fromkeys(COLUMNS, (int, float)))
        if row["epoch"] != number or not all(map(math.isfinite, row.values())):
            raise ValueError(f"row {number} of history is not that of epoch {number}, or not finite: {row!r:.100}")
    require("tokenizers")
    try:
        tokenizer = Tokenizer(state["tokenizer"])
    except Exception as error:  # the package has no class of errors of its own
        raise ValueError(f"tokenizer: {error}") from error
    model = _build(config, tokenizer)
    check_tensors("model", state["model"], model.state_dict())
    check_optimizer("optimizer", state["optimizer"], model, _optimizer(config, model))


def _build(config: TrainConfig, tokenizer: Tokenizer) -> CLIP:
    return build_model(config.model, tokenizer.vocab_size, CONTEXT_LENGTH, config.text, config.dropout)


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    adam = RESNET_ADAM if CONFIGS[config.model].patch_size is None else VIT_ADAM
    return torch.optim.AdamW(parameter_groups(model, config.weight_decay), **adam)


def rebuild(state: Mapping[str, Any]) -> tuple[CLIP, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a checkpoint."""
    tokenizer = Tokenizer(state["tokenizer"])
    model = _build(TrainConfig(**state["config"]), tokenizer)
    model.load_state_dict(state["model"])
    return model.eval(), tokenizer


def train(config: TrainConfig) -> Result:
    """A new run; it ends with the first epoch that is not finite.

    Raises:
        FileExistsError: the folder already holds a run.
        OSError: the folder cannot be written, or another run is at work in it.
        ValueError: a batch is larger than the training set.
        ImportError: a package of the demo is missing.
    """
    checkpoint = Path(config.out, "checkpoint.pt")
    with locked(checkpoint.parent):
        if checkpoint.exists():
            raise FileExistsError(f"out: {config.out} holds a run; give another folder, or --resume {checkpoint}")
        return _run(config, None)


def resume(checkpoint: Path) -> Result:
    """Go on with a run, from its last evaluation, exactly as it would have gone on; all settings are the run's own.

    Raises:
        FileNotFoundError, ValueError: see `load_checkpoint`; otherwise as `train`.
    """
    load_checkpoint(checkpoint)  # before anything is written beside a file that is none
    with locked(checkpoint.parent):
        state = load_checkpoint(checkpoint)
        return _run(TrainConfig(**{**state["config"], "out": str(checkpoint.parent)}), state)


def _run(config: TrainConfig, state: Mapping[str, Any] | None) -> Result:
    tqdm, tensorboard = require("tqdm").tqdm, require("torch.utils.tensorboard")
    require("clipfast.emoji.pictures")
    out = Path(config.out)

    training, held_out = split(read_concepts(), config.seed)
    if config.batch_size > len(training):
        raise ValueError(f"batch_size: got {config.batch_size}; accepted are up to {len(training)} training concepts")
    size = CONFIGS[config.model].image_size
    pairs, held_out_pairs = Pairs(training, size), Pairs(held_out, size, plain=True)

    torch.manual_seed(config.seed)
    if state is None:
        captions = [caption for captions in pairs.captions for caption in captions]
        tokenizer = Tokenizer.train(captions, VOCAB_SIZE, CONTEXT_LENGTH)
        model = _build(config, tokenizer)
        first_epoch, history = 0, []
    else:
        model, tokenizer = rebuild(state)
        first_epoch, history = state["epoch"], list(state["history"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    optimizer = _optimizer(config, model)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])

    steps_per_epoch = len(training) // config.batch_size
    steps = config.epochs * steps_per_epoch
    step = first_epoch * steps_per_epoch
    with (
        tensorboard.SummaryWriter(str(out / "tensorboard"), purge_step=step) as writer,
        tqdm(total=steps, initial=step, desc="training", unit="step") as bar,
    ):
        for epoch in range(first_epoch, config.epochs):
            generator = torch.manual_seed(config.seed * 1_000_003 + epoch + 1)
            model.train()
            losses = []
            for images, captions in pairs.batches(config.batch_size, generator):
                lr = learning_rate(step, steps, config.lr)
                images = images.to(device, memory_format=torch.channels_last)  # faster on a CPU
                tokens = tokenizer(captions).to(device)
                losses.append(train_step(model, optimizer, images, tokens, lr).item())
                step += 1
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                if not math.isfinite(losses[-1]):
                    break
            row = {"epoch": epoch + 1, "step": step, "lr": lr, "train_loss": sum(losses) / len(losses)}
            row |= evaluate(model, tokenizer, held_out_pairs)
            history.append(row)
            for name, value in row.items():
                writer.add_scalar(name, value, step)
            write_log(out / "log.csv", history)
            if not all(map(math.isfinite, row.values())):
                break  # the checkpoint stays the last good one
            save_checkpoint(
                out / "checkpoint.pt",
                {
                    "config": asdict(config),
                    "epoch": epoch + 1,
                    "history": history,
                    "tokenizer": tokenizer.to_json(),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
            )
    result = Result(config, model.eval(), tokenizer, history, held_out)
    _draw_pictures(result, held_out_pairs.images[:SHEET_PICTURES])
    return result


def _draw_pictures(result: Result, images: Tensor) -> None:
    """loss.png, and retrieval.png with images [n, 3, h, w], the first held-out ones, ranked by zero-shot prompts.

    A model that diverged ranks nothing.
    """
    pictures, out, model, held_out = (
        require("clipfast.emoji.pictures"),
        Path(result.config.out),
        result.model,
        result.held_out,
    )
    pictures.plot_loss(out / "loss.png", result.history, math.log(result.config.batch_size), math.log(len(held_out)))
    if result.diverged:
        return
    device = model.head.logit_scale.device
    names = [concept.name for concept in held_out]
    weights = zero_shot_weights(model, lambda texts: result.tokenizer(texts).to(device), names, TEMPLATES)
    probabilities = classify(model, to_float(images).to(device), weights).cpu()
    large = draw([concept.pictures[0].file for concept in held_out[: len(images)]], SHEET_PIXELS)
    pictures.plot_retrieval(out / "retrieval.png", large, names, probabilities)


def report(result: Result) -> str:
    """A small table: recall on the held-out concepts next to chance, k / n; and whether the run diverged."""
    row, n = result.history[-1], len(result.held_out)
    lines = [f"{n} held-out concepts" + "".join(f"{f'R@{k}':>10}" for k in KS)]
    width = len(lines[0]) - 10 * len(KS)

    def line(title: str, cells: Sequence[str]) -> str:
        return f"{title:<{width}}" + "".join(f"{cell:>10}" for cell in cells)

    lines.append(line("chance", [f"{k / n:.1%}" for k in KS]))
    for direction in DIRECTIONS:
        recall = [row[f"{direction}_R@{k}"] for k in KS]
        lines.append(line(direction.replace("_", " "), [f"{value:.1%}" for value in recall]))
        lines.append(line("  times chance", [f"{value * n / k:.1f}" for value, k in zip(recall, KS, strict=True)]))
    if result.diverged:
        figures = ", ".join(f"{name} {value}" for name, value in row.items() if not math.isfinite(value))
        lines.append(f"diverged in epoch {row['epoch']:.0f} at learning rate {row['lr']:.3g}: {figures}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 after an error or a run that diverged, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m clipfast.train", description=__doc__.splitlines()[0])
    for field in fields(TrainConfig):
        accepted = {"model": tuple(CONFIGS), "text": TEXT_ENCODERS}.get(field.name)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            choices=accepted,
            default=argparse.SUPPRESS,
            help=f"default: {field.default}",
        )
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="go on with a run; takes no other option")
    options = vars(parser.parse_args(arguments))
    checkpoint: Path | None = options.pop("resume")
    if checkpoint is not None and options:
        parser.error(f"--resume takes the run's own settings; leave out --{next(iter(options))}")
    try:
        if checkpoint is None:
            config = TrainConfig(**options)
            checkpoint = Path(config.out, "checkpoint.pt")
            result = train(config)
        else:
            result = resume(checkpoint)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        assert checkpoint is not None
        how = f"go on with: python -m clipfast.train --resume {checkpoint}"
        print(f"interrupted; {how if checkpoint.exists() else 'no epoch was finished'}", file=sys.stderr)
        return 130
    print(report(result))
    print(f"the run's files: {result.config.out}")
    return 1 if result.diverged else 0
