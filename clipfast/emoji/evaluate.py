"""Evaluate a model on emoji and digits: `python -m clipfast.emoji.evaluate CHECKPOINT`.

A checkpoint is model.pt of the demo, or of `python -m clipfast.train` a run's folder or one of its steps.

On held-out concepts: the kind of thing by prompts, with one template and with the ensemble of all, and retrieval
with several captions for each drawing. On scikit-learn's 1,797 written digits, which it never saw: zero-shot by
prompts, and a linear probe, next to the same probe on the pixels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from clipfast.emoji.data import Concept, Pairs, Tokenizer, read_concepts, require, split, to_float
from clipfast.emoji.demo import PROMPTS, SIZE, Demo, Emoji, Run, captions_of, kind_of
from clipfast.emoji.words import KINDS
from clipfast.models import CLIP, caption_retrieval, classify, linear_probe, zero_shot_weights
from clipfast.training.batches import MEAN, STD
from clipfast.training.checkpoint import MODEL, STEP, checkpoints
from clipfast.training.folder import SETTINGS, TOKENIZER
from clipfast.training.model import build, clip_of, image_size

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PROMPTS = ("{}", "the number {}", "the digit {}", "keycap: {}")
CAPTIONS = 5


@dataclass(frozen=True)
class Judged:
    """A model in eval mode, and what it takes."""

    model: CLIP
    tokenize: Callable[[Sequence[str]], Tensor]
    pixels: Callable[[Tensor], Tensor]  # uint8 [n, 3, size, size] -> the model's floats
    size: int
    held_out: list[Concept]


def load(path: Path) -> Judged:
    """The model of a checkpoint, with the concepts that its seed holds out.

    Of a run of `clipfast.train` those are unseen only if it trained on `--dataset-type openmoji` or on shards with the
    same concepts left out.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no such model.
    """
    if path.is_dir():
        return _of_training(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        run = Run(Demo(**state["demo"]), Emoji())
        run.model.load_state_dict(state["model"])
    except ImportError:
        raise
    except Exception as error:  # what torch.load has to say of a broken file is of many classes
        raise ValueError(f"checkpoint: {path} is no model of clipfast.emoji") from error
    run.model.eval()
    return Judged(run.model, run.tokenize, to_float, SIZE, run.held_out)


def _of_training(path: Path) -> Judged:
    step = path if STEP.fullmatch(path.name) else next(reversed(checkpoints(path)), None)
    if step is None:
        raise ValueError(f"checkpoint: {path} holds no step of clipfast.train")
    folder = step.parent
    try:
        settings = argparse.Namespace(**json.loads((folder / SETTINGS).read_bytes())["flags"])
        tokenize = Tokenizer((folder / TOKENIZER).read_text())
        model = build(settings, tokenize.vocab_size).eval()
        model.load_state_dict(require("safetensors.torch").load_file(step / MODEL))
    except ImportError:
        raise
    except Exception as error:  # safetensors' errors share no other class
        raise ValueError(f"checkpoint: {step} is no checkpoint of clipfast.train: {error}") from error
    mean, deviation = (torch.from_numpy(of).view(3, 1, 1) for of in (MEAN, STD))
    _, held_out = split(read_concepts(), settings.seed)
    return Judged(
        clip_of(model).float(), tokenize, lambda x: (x.float() / 255 - mean) / deviation, image_size(settings), held_out
    )


@torch.no_grad()
def on_held_out(judged: Judged) -> dict[str, float]:
    """Accuracy over the kinds with one template and with all, and recall with five captions for each drawing."""
    images = judged.pixels(Pairs(judged.held_out, judged.size, plain=True).images)
    right = torch.tensor([kind_of(concept) for concept in judged.held_out])
    result = {}
    for name, templates in (("one template", PROMPTS[:1]), ("all templates", PROMPTS)):
        weights = zero_shot_weights(judged.model, judged.tokenize, list(KINDS), templates)
        result[f"kind, {name}"] = _accuracy(judged.model, images, weights, right)
    captions = [(captions_of(concept) * CAPTIONS)[:CAPTIONS] for concept in judged.held_out]
    texts = judged.model.encode_text(judged.tokenize([caption for some in captions for caption in some]))
    recall = caption_retrieval(judged.model.encode_image(images), texts.view(len(images), CAPTIONS, -1))
    return result | {f"{CAPTIONS} captions, {name}": value for name, value in recall.items() if "R@" in name}


@torch.no_grad()
def on_digits(judged: Judged) -> dict[str, float]:
    """Zero-shot and linear-probe accuracy on the last third of the digits, and the probe's on their pixels."""
    digits: Any = require("sklearn.datasets").load_digits()
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = torch.from_numpy(digits.images).float()[order], labels[order]
    gray = interpolate(pixels.unsqueeze(1), judged.size, mode="bilinear")
    images = judged.pixels((255 - 255 * gray / 16).expand(-1, 3, -1, -1))  # dark on white, as the drawings
    training, test = slice(0, len(labels) * 2 // 3), slice(len(labels) * 2 // 3, None)
    weights = zero_shot_weights(judged.model, judged.tokenize, DIGITS, DIGIT_PROMPTS)
    features = torch.cat([judged.model.image_encoder(part) for part in torch.split(images, 256)])
    flat = pixels.flatten(1)
    return {
        "digits, zero-shot": _accuracy(judged.model, images[test], weights, labels[test]),
        "digits, linear probe": linear_probe(features[training], labels[training], features[test], labels[test]),
        "digits, probe on pixels": linear_probe(flat[training], labels[training], flat[test], labels[test]),
    }


def _accuracy(model: CLIP, images: Tensor, weights: Tensor, labels: Tensor) -> float:
    return (classify(model, images, weights).argmax(dim=-1) == labels).double().mean().item()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m clipfast.emoji.evaluate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="model.pt, or a folder of python -m clipfast.train")
    options = parser.parse_args(arguments)
    try:
        judged = load(options.checkpoint)
        for name, value in (on_held_out(judged) | on_digits(judged)).items():
            print(f"{name:<32}{value:8.1%}")
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
