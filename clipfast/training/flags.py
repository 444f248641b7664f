"""The command line: open_clip's names and defaults where it has them, and what a run that goes on may change."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

from clipfast.models import CONFIGS, TEXT_ENCODERS

DATASET_TYPES = ("webdataset", "csv", "synthetic", "openmoji")
PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "pure_bf16", "fp32")
SCHEDULERS = ("cosine", "const", "const-cooldown")
# What a resumed run may have of its own; everything else is the first run's.
FREE = {
    "epochs", "batch_size", "accum_freq", "workers", "resume", "save_frequency", "save_every_n_steps", "logs", "name",
    "report_to", "log_every_n_steps", "val_frequency", "zeroshot_frequency", "fsdp", "torchcompile",
    "grad_checkpointing", "local_loss", "gather_with_grad",
}  # fmt: skip
EPILOG = """Run it by python, or in several processes by torchrun --nproc-per-node N -m clipfast.train -- FLAGS; without
the two dashes torchrun takes --logs for its own. The exit status is 0; 1 after an error or a run that diverged; 130 or
143 after Ctrl-C or SIGTERM, which save and say how to go on."""


class Refused(ValueError):
    """What the user gave cannot be; the text names the flag, and the file if there is one."""


class _Group:
    """Adds flags whose help ends with their default."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self.group = parser.add_argument_group(title)

    def __call__(self, name: str, default: Any, text: str, **given: Any) -> None:
        if isinstance(default, bool):
            given["action"] = "store_true"
        elif "type" not in given:
            given["type"] = type(default)
        shown = "" if default in (None, False) else f" (default: {default!r})".replace("%", "%%")
        self.group.add_argument(name, default=default, help=text + shown, **given)


def parser() -> argparse.ArgumentParser:
    """All flags, in groups."""
    made = argparse.ArgumentParser(
        prog="python -m clipfast.train",
        description="Train CLIP at a batch size that its encoders' memory would not allow, on your pairs.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    add = _Group(made, "data")
    add("--dataset-type", "webdataset", "where the pairs come from", choices=DATASET_TYPES)
    add("--train-data", None, "tars, as shards/{00000..00099}.tar, several joined by ::; or a csv file", type=str)
    add("--val-data", None, "pairs of the same type to evaluate on; openmoji holds out its own", type=str)
    add("--train-num-samples", None, "pairs of the synthetic data (default: 10000)", type=int)
    add("--csv-separator", "\t", "of the columns")
    add("--csv-img-key", "filepath", "the column with the pictures' files")
    add("--csv-caption-key", "title", "the column with their captions")
    add(
        "--tokenizer",
        None,
        "a JSON file of the package tokenizers, or clip: open_clip's merges; without, one is learned from the captions",
        type=str,
    )
    add("--vocab-size", 49_408, "most tokens of a learned tokenizer")
    add("--workers", 4, "processes that read, for each rank; any number gives the same batches")
    add = _Group(made, "model")
    add("--model", "RN50", "the encoders", choices=tuple(CONFIGS))
    add("--text", "transformer", "the text encoder", choices=TEXT_ENCODERS)
    add("--siglip", False, "the sigmoid loss, with a bias")
    add("--lock-image", False, "freeze the image encoder")
    add("--lock-text", False, "freeze the text encoder")
    add = _Group(made, "batch and memory")
    add("--batch-size", 64, "pairs of a step for each process")
    add(
        "--accum-freq",
        1,
        "cut the batch of each process into so many micro-batches: their activations alone are in memory, and the "
        "gradients are those of the whole batch. Unlike in open_clip the batch does not grow with it",
    )
    add("--grad-checkpointing", False, "compute the transformers' blocks again in the backward pass")
    add("--precision", "amp", "amp: float16 on GPUs, bfloat16 on CPUs", choices=PRECISIONS)
    add("--torchcompile", False, "compile the model")
    add("--fsdp", False, "shard the model over the processes (FSDP2) instead of replicating it (DDP)")
    add("--local-loss", False, "accepted, without effect: the loss is exact over all processes")
    add("--gather-with-grad", False, "accepted, without effect")
    add = _Group(made, "optimization")
    add("--epochs", 32, "passes over the data; a resumed run may have more")
    add("--lr", 5e-4, "peak learning rate")
    add("--wd", 0.2, "weight decay, on matrices and convolutions alone")
    add("--beta1", 0.9, "of AdamW")
    add("--beta2", None, "of AdamW (default: 0.98 for a ViT, else 0.999)", type=float)
    add("--eps", None, "of AdamW (default: 1e-6 for a ViT, else 1e-8)", type=float)
    add("--warmup", 10_000, "steps to the peak")
    add("--lr-scheduler", "cosine", "after the warm-up", choices=SCHEDULERS)
    add("--epochs-cooldown", None, "last epochs of const-cooldown, in which the rate falls to 0", type=int)
    add("--grad-clip-norm", None, "largest norm of the gradient", type=float)
    add("--seed", 0, "of the weights, the order and all augmentation")
    add = _Group(made, "the run's folder")
    add("--logs", "./logs/", "holds the runs' folders")
    add("--name", None, "of the run's folder (default: date, model, batch size)", type=str)
    add(
        "--resume",
        None,
        "go on: latest, with --name, or a run's or a checkpoint's folder; settings are its own",
        type=str,
    )
    add("--save-frequency", 1, "epochs from one checkpoint to the next")
    add("--save-every-n-steps", 0, "also save at every n-th step; the newest of these is kept")
    add("--report-to", "", "tensorboard, or nothing; log.csv is always written", choices=("", "tensorboard"))
    add("--log-every-n-steps", 100, "steps from one line of log.csv to the next")
    add("--val-frequency", 1, "epochs from one evaluation to the next")
    add("--zeroshot-frequency", 2, "epochs from one zero-shot classification by all captions of --val-data to the next")
    return made


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """The settings, and the names of those that were given.

    Raises:
        Refused: a value is out of range.
    """
    made = parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = arguments[arguments[:1] == ["--"] :]  # torchrun's, which some versions of Python leave
    settings = made.parse_args(arguments)
    for action in made._actions:
        action.default = argparse.SUPPRESS
    given = set(vars(made.parse_args(arguments)))
    if settings.resume is None:  # else the first run's settings come in between
        check(settings)
    return settings, given


def check(settings: argparse.Namespace) -> None:
    """The ranges of the numbers.

    Raises:
        Refused: one is out of range.
    """
    for name in ("batch_size", "accum_freq", "epochs", "save_frequency", "log_every_n_steps", "train_num_samples"):
        _from(settings, name, 1)
    for name in ("workers", "warmup", "seed", "save_every_n_steps", "wd", "val_frequency", "zeroshot_frequency"):
        _from(settings, name, 0)
    for name in ("lr", "eps", "grad_clip_norm"):
        if (value := getattr(settings, name)) is not None and not 0 < value < math.inf:
            raise Refused(f"{flag(name)}: got {value}; accepted is a positive number")
    for name in ("beta1", "beta2"):
        if (value := getattr(settings, name)) is not None and not 0 <= value < 1:
            raise Refused(f"{flag(name)}: got {value}; accepted is a number from 0, below 1")
    if len(settings.csv_separator) != 1:
        raise Refused(f"--csv-separator: got {settings.csv_separator!r}; accepted is one character")
    if settings.accum_freq > settings.batch_size:
        raise Refused(f"--accum-freq: got {settings.accum_freq}; accepted are up to --batch-size {settings.batch_size}")
    if settings.lr_scheduler == "const-cooldown" and not 0 < (settings.epochs_cooldown or 0) <= settings.epochs:
        raise Refused(f"--epochs-cooldown: got {settings.epochs_cooldown}; accepted are 1 to {settings.epochs} epochs")
    if settings.dataset_type in ("webdataset", "csv") and not settings.train_data:
        raise Refused(f"--train-data: got none; --dataset-type {settings.dataset_type} needs it")
    if settings.name is not None and settings.name in ("", ".", ".."):
        raise Refused(f"--name: got {settings.name!r}; accepted is a folder's name")


def _from(settings: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(settings, name)
    if value is not None and not least <= value < math.inf:
        raise Refused(f"{flag(name)}: got {value}; accepted is a number from {least}")


def flag(name: str) -> str:
    """As it is written on the command line."""
    return "--" + name.replace("_", "-")


def go_on(settings: argparse.Namespace, given: set[str], first: dict[str, Any], world: int) -> argparse.Namespace:
    """The first run's settings with what may change from those given; `first` is what its settings.json holds.

    Raises:
        Refused: another setting was given, or the global batch is another one.
    """
    kept = dict(first["flags"])
    for name in sorted(given - FREE):
        if getattr(settings, name) != kept[name]:
            raise Refused(f"{flag(name)}: got {getattr(settings, name)!r}; the run that goes on has {kept[name]!r}")
    merged = vars(settings) | kept | {name: getattr(settings, name) for name in given & FREE}
    merged |= {name: getattr(settings, name) for name in ("logs", "name", "resume")}
    batch = first["global_batch"]
    if "batch_size" not in given:
        if batch % world:
            raise Refused(f"--batch-size: the run's {batch} pairs of a step do not divide among {world} processes")
        merged["batch_size"] = batch // world
        if "accum_freq" not in given:  # the same micro-batches
            merged["accum_freq"] = max(1, round(kept["accum_freq"] * first["processes"] / world))
    elif settings.batch_size * world != batch:
        raise Refused(
            f"--batch-size: got {settings.batch_size} for each of {world} processes; the run's step has {batch} pairs"
        )
    if merged["epochs"] < kept["epochs"]:
        raise Refused(f"--epochs: got {merged['epochs']}; the run that goes on has {kept['epochs']}, accepted are more")
    chosen = argparse.Namespace(**merged)
    check(chosen)
    return chosen
