"""Evaluate a model of the demo: `python -m clipfast.emoji.evaluate runs/demo/model.pt`.

On its held-out concepts: the kind of thing by prompts, with one template and with the ensemble of all, and retrieval
with several captions for each drawing. On scikit-learn's 1,797 written digits, which it never saw: zero-shot by
prompts, and a linear probe, next to the same probe on the pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from clipfast.emoji.data import Pairs, require, to_float
from clipfast.emoji.demo import PROMPTS, SIZE, Demo, Emoji, Run, captions_of, kind_of
from clipfast.emoji.words import KINDS
from clipfast.models import CLIP, caption_retrieval, classify, linear_probe, zero_shot_weights

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PROMPTS = ("{}", "the number {}", "the digit {}", "keycap: {}")
CAPTIONS = 5


def load(path: Path, emoji: Emoji) -> Run:
    """The run that a model.pt comes from, with its trained model.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no model of the demo.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        run = Run(Demo(**state["demo"]), emoji)
        run.model.load_state_dict(state["model"])
    except ImportError:
        raise
    except Exception as error:  # what torch.load has to say of a broken file is of many classes
        raise ValueError(f"checkpoint: {path} is no model of clipfast.emoji") from error
    run.model.eval()
    return run


@torch.no_grad()
def on_held_out(run: Run) -> dict[str, float]:
    """Accuracy over the kinds with one template and with all, and recall with five captions for each drawing."""
    images = to_float(Pairs(run.held_out, SIZE, plain=True).images)
    right = torch.tensor([kind_of(concept) for concept in run.held_out])
    result = {}
    for name, templates in (("one template", PROMPTS[:1]), ("all templates", PROMPTS)):
        weights = zero_shot_weights(run.model, run.tokenize, list(KINDS), templates)
        result[f"kind, {name}"] = _accuracy(run.model, images, weights, right)
    captions = [(captions_of(concept) * CAPTIONS)[:CAPTIONS] for concept in run.held_out]
    texts = run.model.encode_text(run.tokenize([caption for some in captions for caption in some]))
    recall = caption_retrieval(run.model.encode_image(images), texts.view(len(images), CAPTIONS, -1))
    return result | {f"{CAPTIONS} captions, {name}": value for name, value in recall.items() if "R@" in name}


@torch.no_grad()
def on_digits(run: Run) -> dict[str, float]:
    """Zero-shot and linear-probe accuracy on the last third of the digits, and the probe's on their pixels."""
    digits: Any = require("sklearn.datasets").load_digits()
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = torch.from_numpy(digits.images).float()[order], labels[order]
    gray = interpolate(pixels.unsqueeze(1), SIZE, mode="bilinear")
    images = (-2 * gray / 16).expand(-1, 3, -1, -1)  # dark on white, as the drawings
    training, test = slice(0, len(labels) * 2 // 3), slice(len(labels) * 2 // 3, None)
    weights = zero_shot_weights(run.model, run.tokenize, DIGITS, DIGIT_PROMPTS)
    features = torch.cat([run.model.image_encoder(part) for part in torch.split(images, 256)])
    flat = pixels.flatten(1)
    return {
        "digits, zero-shot": _accuracy(run.model, images[test], weights, labels[test]),
        "digits, linear probe": linear_probe(features[training], labels[training], features[test], labels[test]),
        "digits, probe on pixels": linear_probe(flat[training], labels[training], flat[test], labels[test]),
    }


def _accuracy(model: CLIP, images: Tensor, weights: Tensor, labels: Tensor) -> float:
    return (classify(model, images, weights).argmax(dim=-1) == labels).double().mean().item()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 after an error."""
    parser = argparse.ArgumentParser(prog="python -m clipfast.emoji.evaluate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="model.pt of a run of python -m clipfast.emoji")
    options = parser.parse_args(arguments)
    try:
        run = load(options.checkpoint, Emoji())
        for name, value in (on_held_out(run) | on_digits(run)).items():
            print(f"{name:<32}{value:8.1%}")
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
