"""`python -m clipfast.train`: train CLIP on pairs, in one process or many, and go on exactly after any end.

A step's rows, their augmentation and the learning rate are functions of the settings and the step's number; weights and
moments come from the checkpoint. So a run that goes on, at any step, computes what it would have computed.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.emoji.data import Tokenizer, require
from clipfast.models import BPETokenizer
from clipfast.training import checkpoint, flags
from clipfast.training.batches import Batch, Pairs, Steps, learn_tokenizer, loader, number
from clipfast.training.checkpoint import write_whole
from clipfast.training.evaluation import evaluate
from clipfast.training.flags import Refused
from clipfast.training.folder import TOKENIZER, Start, describe, prepare
from clipfast.training.job import Elsewhere, Job
from clipfast.training.logs import Logs
from clipfast.training.model import CONTEXT_LENGTH, autocast_of, build, image_size, make_loss, set_training, spread
from clipfast.training.optimization import learning_rate, make_optimizer, train_step
from clipfast.training.sources import Source, open_source

FEWEST_UNREADABLE = 10  # before data is called mostly bad


class Diverged(Exception):
    """The loss is not finite."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    job = Job()
    try:
        settings, given = flags.parse(arguments)
        with job.running(), ExitStack() as stack:
            start = job.first(lambda: prepare(settings, given, job.world, stack))
            run = Run(job, start)
            with run.logs() as logs:
                return run.train(logs)
    except (Refused, Diverged, OSError, ImportError) as error:
        if job.is_first or not isinstance(error, Refused | Diverged):  # these are the same on all ranks
            print(f"error: {error}", file=sys.stderr)
        return 1
    except Elsewhere:
        return 1
    except KeyboardInterrupt:
        return 130


class Run:
    """A run, ready for its first step.

    Raises:
        Refused, OSError, ImportError: something is not as it must be; nothing but the tokenizer has been written.
    """

    def __init__(self, job: Job, start: Start) -> None:
        self.job, self.settings, self.folder = job, start.settings, start.folder
        settings, size = self.settings, image_size(self.settings)
        source = open_source(settings, size, validation=False)
        assert source is not None
        self.validation = open_source(settings, size, validation=True)
        self.tokenizer = Tokenizer(job.first(lambda: self._tokenizer(source)))
        model = build(settings, self.tokenizer.vocab_size)
        set_training(model, settings)
        self.model = spread(model, settings, job.device)
        self.optimizer = make_optimizer(self.model, settings)
        is_half = job.device.type == "cuda" and settings.precision == "amp"
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=is_half)
        self.step, self.unreadable, self.seen = 0, 0, [0, 0]
        if start.checkpoint is not None:
            self._restore(start.checkpoint)
        place = settings.seed, len(source), settings.batch_size, job.rank, job.world
        self.per_epoch = Steps(*place, 0, 0).per_epoch
        self.steps = settings.epochs * self.per_epoch
        self.batches = loader(
            Pairs(source, size, settings.seed), Steps(*place, self.step, self.steps), self.tokenizer, settings.workers
        )
        self.loss, self.autocast = make_loss(settings), autocast_of(settings, job.device)
        self.scale = torch.tensor(math.nan)
        self.named: set[str] = set()
        job.first(lambda: describe(start, job.world, len(source)))

    def _tokenizer(self, source: Source) -> str:
        """Its JSON; rank 0 learns or reads it once, and keeps it with the run."""
        path = self.folder / TOKENIZER
        if self.settings.resume is not None:
            return path.read_text()
        if self.settings.tokenizer is None:
            json = learn_tokenizer(source, self.settings.vocab_size, CONTEXT_LENGTH).to_json()
        elif self.settings.tokenizer == "clip":
            json = BPETokenizer(CONTEXT_LENGTH).to_json()
        else:
            try:
                bpe = require("tokenizers").Tokenizer.from_file(self.settings.tokenizer)
                bpe.enable_truncation(CONTEXT_LENGTH)
                bpe.enable_padding(pad_id=0)
                json = bpe.to_str()
            except ImportError:
                raise
            except Exception as error:  # the package has no class of errors of its own
                raise Refused(f"--tokenizer: {self.settings.tokenizer} cannot be read: {error}") from error
        write_whole(path, json.encode())
        return json

    def _restore(self, path: Path) -> None:
        try:
            *tensors, state = checkpoint.load(path)
            checkpoint.restore(path, self.model, self.optimizer, (tensors[0], tensors[1]))
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
        except ValueError as error:
            raise Refused(str(error)) from error
        self.step, self.unreadable = state["step"], state["unreadable"]

    def logs(self) -> Any:
        """Of rank 0; the others say nothing."""
        if not self.job.is_first:
            return ExitStack()
        batch = self.settings.batch_size * self.job.world
        return Logs(self.folder, self.settings.report_to, self.step, self.steps, batch)

    def train(self, logs: Any) -> int:
        """All steps that are left; returns the exit status."""
        saved = self.step
        for batch in self.batches:
            if self._must_stop(batch, logs):
                self._save()
                return self._stopped()
            lr = learning_rate(
                self.step,
                self.steps,
                self.settings.lr,
                self.settings.warmup,
                self.settings.lr_scheduler,
                (self.settings.epochs_cooldown or 0) * self.per_epoch,
            )
            loss = self._train_step(batch, lr)
            self.step += 1
            self._log(logs, loss, lr)
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {self.step}, learning rate {lr:.3g}")
            if self._is_due():
                saved = self.step
                weights = self._save()
                self._evaluate(logs, weights)
        if saved == self.step and self.job.is_first:
            print(f"trained to step {self.step} of {self.steps}; the run's files: {self.folder}")
        return 0

    def _train_step(self, batch: Batch, lr: float) -> float:
        torch.manual_seed(number(self.settings.seed, "step", self.step, self.job.rank))
        images = batch.images.to(self.job.device, memory_format=torch.channels_last, non_blocking=True)
        if self.settings.precision == "pure_bf16":
            images = images.to(torch.bfloat16)
        tokens = batch.tokens.to(self.job.device, non_blocking=True)
        micro_batch = -(-self.settings.batch_size // self.settings.accum_freq)
        with self.autocast():
            loss = train_step(
                self.model,
                self.optimizer,
                self._loss,
                (images, tokens),
                micro_batch,
                lr,
                self.scaler,
                self.settings.grad_clip_norm,
            )
        return loss.item()

    def _loss(self, **outputs: Tensor) -> Tensor:
        self.scale = outputs["logit_scale"].detach()
        value: Tensor = self.loss(**outputs)
        return value

    def _log(self, logs: Any, loss: float, lr: float) -> None:
        if not self.job.is_first:
            return
        row = {"step": self.step, "epoch": (self.step - 1) // self.per_epoch + 1, "lr": lr, "loss": loss}
        row["logit_scale"] = self.scale.item()
        if metrics := getattr(self.loss, "metrics", None):
            row["accuracy"] = (metrics["image_to_text_R@1"].item() + metrics["text_to_image_R@1"].item()) / 2
        row["unreadable"] = self.unreadable
        logs.step(row, write=self.step % self.settings.log_every_n_steps == 0 or self.step == self.steps)

    def _must_stop(self, batch: Batch, logs: Any) -> bool:
        """Whether any rank was asked to; raises if most pairs cannot be read. All ranks decide the same."""
        for name, reason in batch.unreadable:
            if name not in self.named:
                self.named.add(name)
                print(f"cannot be read, another pair takes its place: {name}: {reason}", file=sys.stderr)
        short = len(batch.images) < self.settings.batch_size
        stopped, failed, rows, hopeless = self.job.total(
            self.job.stopped_by is not None, len(batch.unreadable), len(batch.images), short
        )
        self.unreadable += failed
        self.seen = [self.seen[0] + failed, self.seen[1] + rows]
        if hopeless or (self.seen[0] >= FEWEST_UNREADABLE and self.seen[0] > self.seen[1]):
            raise Refused(
                f"--train-data: {self.seen[0]} of {sum(self.seen)} pairs cannot be read; the first are named above"
            )
        return stopped > 0

    def _stopped(self) -> int:
        number = self.job.largest(self.job.stopped_by or 0)
        if self.job.is_first:
            print(
                f"stopped at step {self.step} by {signal.Signals(number).name}; go on with: "
                f"python -m clipfast.train --resume {self.folder}",
                file=sys.stderr,
            )
        return 128 + number

    def _is_due(self) -> bool:
        """Whether a checkpoint is."""
        epoch, rest = divmod(self.step, self.per_epoch)
        if not rest and (epoch % self.settings.save_frequency == 0 or self.step == self.steps):
            return True
        return bool(self.settings.save_every_n_steps) and self.step % self.settings.save_every_n_steps == 0

    def _save(self) -> dict[str, Tensor]:
        """A checkpoint of now, all ranks together; earlier ones within an epoch go. Returns the weights, on rank 0."""
        weights, moments = checkpoint.gather(self.model, self.optimizer)
        state = {"step": self.step, "scaler": self.scaler.state_dict(), "unreadable": self.unreadable}

        def write() -> None:
            newest = checkpoint.save(self.folder, weights, moments, state)
            for path in checkpoint.checkpoints(self.folder):
                if path != newest and int(path.name.removeprefix("step-")) % self.per_epoch:
                    shutil.rmtree(path)

        self.job.first(write)
        return weights

    def _evaluate(self, logs: Any, weights: dict[str, Tensor]) -> None:
        """By rank 0, on a model of its own, so that no rank has to take part."""
        epoch, rest = divmod(self.step, self.per_epoch)
        frequency = self.settings.val_frequency
        if self.validation is None or rest or not frequency or epoch % frequency or not self.job.is_first:
            return
        plain: nn.Module = build(self.settings, self.tokenizer.vocab_size)
        plain.load_state_dict(weights)
        every = self.settings.zeroshot_frequency
        zero_shot = bool(every) and (epoch % every == 0 or self.step == self.steps)
        figures = evaluate(plain.to(self.job.device), self.validation, self.tokenizer, self.settings, zero_shot)
        logs.evaluated({"step": self.step, "epoch": epoch, **figures})
