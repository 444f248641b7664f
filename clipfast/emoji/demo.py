"""The demo: a small CLIP learns drawings from what is said of them, and is asked about things that it never saw.

Whole concepts are held out, the kangaroo among them, with the drawings of every artist. A caption says a thing's name,
what kind of thing it is, keywords: "cat, pet, an animal". Kinds are words in captions, never labels; that the drawing
of a kangaroo is an animal must come from the words that other drawings came with.

The text tower is a pretrained sentence encoder, frozen (Zhai et al. 2022, arXiv:2111.07991), or the paper's transformer
or bag of words from scratch. Frozen embeddings cost nothing to compare with: a concept's text is the mean of all its
captions', each picture is told from the texts of every training concept, not of the batch's only, and half of the loss
is how alike the texts are to each other, so that a cat is less wrong than a teapot.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from clipfast.emoji.data import Concept, Pairs, Tokenizer, augment, draw, read_concepts, require, split, to_float
from clipfast.emoji.encoder import DrawingEncoder
from clipfast.emoji.minilm import MiniLM
from clipfast.emoji.words import KINDS, words_of
from clipfast.functional import contrastive_loss, distillation_loss
from clipfast.metrics import retrieval_metrics
from clipfast.models import CBOW, CLIP, TextTransformer, zero_shot_weights

SIZE, EMBED_DIM = 48, 384
TEXTS = ("minilm", "transformer", "cbow")
PROMPTS = ("{}", "a picture of {}", "a drawing of {}", "an emoji of {}")
TEACHER_SCALE = 10.0
VIEWS = 8  # augmented, of each drawing that is asked about
VOCAB_SIZE, CONTEXT_LENGTH = 2000, 32
KEYWORD_CAPTIONS, KEYWORDS = 3, 3  # of each concept; in each caption
SHEET_PICTURES, SHEET_PIXELS = 12, 144
# Products of bfloat16 where the processor has them; elsewhere they would be slower than float32's.
CAPABILITIES: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
BFLOAT16 = bool(CAPABILITIES.get("avx512_bf16"))


@dataclass(frozen=True)
class Demo:
    """Everything that decides a run.

    Args:
        out: the folder that gets result.json, model.pt and retrieval.png.
        text: the text tower: "minilm", pretrained and frozen, or "transformer" or "cbow" from scratch.
        steps: of training.
        batch_size: pictures in a step.
        lr: peak learning rate.
        weight_decay: on matrices and convolutions.
        seed: of the held-out concepts, the initial weights and all batches.

    Raises:
        ValueError: the text tower is unknown, or a number is not positive.
    """

    out: str = "runs/demo"
    text: str = "minilm"
    steps: int = 2000
    batch_size: int = 64
    lr: float = 1.5e-3
    weight_decay: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise ValueError(f"text: got {self.text!r}; accepted are {', '.join(TEXTS)}")
        for name in ("steps", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted is a positive number")


def captions_of(concept: Concept) -> list[str]:
    """What may be said of a concept: its names, also with its kind, and with some of its keywords and its kind."""
    kind, keywords = words_of(concept.pictures[0].file.stem)
    names = list(dict.fromkeys(caption for picture in concept.pictures for caption in picture.captions))[:4]
    some = random.Random(concept.name)  # the same in every run
    captions = [*names, *(f"{name}, {kind}" for name in names)]
    for _ in range(KEYWORD_CAPTIONS):
        chosen = some.sample(keywords, min(KEYWORDS, len(keywords)))
        captions.append(", ".join([some.choice(names), *chosen, kind]))
    return list(dict.fromkeys(captions))


def kind_of(concept: Concept) -> int:
    """The place of a concept's kind in KINDS."""
    return list(KINDS).index(words_of(concept.pictures[0].file.stem)[0])


def may_be_mirrored(concept: Concept) -> bool:
    """Not flags and symbols, nor what has a side in its names."""
    said = " ".join(captions_of(concept))
    return list(KINDS)[kind_of(concept)] not in ("a symbol", "a flag") and not re.search(r"\b(left|right)", said)


class Embeddings(nn.Module):
    """In place of a text encoder where the tokens are a frozen tower's embeddings already: takes their mean off."""

    output_dim = MiniLM.output_dim
    mean: Tensor

    def __init__(self, mean: Tensor) -> None:  # [384]
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, embeddings: Tensor) -> Tensor:  # [b, 384] -> [b, 384]
        return normalize(embeddings - self.mean, dim=-1)


class Emoji:
    """What all runs share: every concept, drawn and put into words once, and the pretrained text tower."""

    def __init__(self) -> None:
        self.concepts = [_without_tones(concept) for concept in read_concepts(others=["twemoji"])]
        self.index = {concept.name: index for index, concept in enumerate(self.concepts)}
        self.pairs = Pairs(self.concepts, SIZE)
        self.captions = [captions_of(concept) for concept in self.concepts]
        self.mirrored = torch.tensor([may_be_mirrored(concept) for concept in self.concepts])
        self.minilm = cache(MiniLM)


def _without_tones(concept: Concept) -> Concept:
    """Each artist's first drawing under each name: the others differ in the colour of the skin."""
    first = {(picture.file.parent, picture.name): picture for picture in reversed(concept.pictures)}
    return Concept(tuple(picture for picture in concept.pictures if picture in first.values()))


class Run:
    """A model, its tokens, and the concepts on both sides."""

    def __init__(self, demo: Demo, emoji: Emoji) -> None:
        self.demo, self.emoji = demo, emoji
        training, self.held_out = split(emoji.concepts, demo.seed)
        self.training = [emoji.index[concept.name] for concept in training]
        torch.manual_seed(demo.seed)
        said = [caption for index in self.training for caption in emoji.captions[index]]
        self.tokenize: Callable[[Sequence[str]], Tensor]
        text_encoder: nn.Module
        if demo.text == "minilm":
            self.tokenize = emoji.minilm()
            text_encoder = Embeddings(self.tokenize(said).mean(dim=0))
            texts = [self.tokenize(emoji.captions[index]).mean(dim=0) for index in self.training]
            self.texts = dict(zip(self.training, texts, strict=True))
        else:
            self.tokenize = Tokenizer.train(said, VOCAB_SIZE, CONTEXT_LENGTH)
            size = self.tokenize.vocab_size
            if demo.text == "transformer":
                text_encoder = TextTransformer(size, CONTEXT_LENGTH, 256, 2, 4, 0.1)
            else:
                text_encoder = CBOW(size, 256, 0.3)
        self.model = CLIP(DrawingEncoder(), text_encoder, EMBED_DIM, image_bias=True)
        if demo.text == "minilm":  # the texts stay where they are
            nn.init.eye_(self.model.head.w_t.requires_grad_(False))
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every concept once in an epoch, as a random drawing; without end.

        Yields images [b, 3, h, w] and tokens [m, ...], m >= b: a random caption, or with a frozen tower the concept's
        text, and those of all other concepts in the further rows.
        """
        generator = torch.Generator().manual_seed(self.demo.seed)
        pairs, captions, size = self.emoji.pairs, self.emoji.captions, self.demo.batch_size

        def pick(options: Sequence[Any]) -> Any:
            return options[int(torch.randint(len(options), (), generator=generator))]

        while True:
            order = [self.training[i] for i in torch.randperm(len(self.training), generator=generator).tolist()]
            for begin in range(0, len(order) - size + 1, size):
                batch = order[begin : begin + size]
                drawings = pairs.images[[pick(pairs.rows[index]) for index in batch]]
                images = augment(drawings, generator, self.emoji.mirrored[batch])
                if self.demo.text == "minilm":
                    tokens = torch.stack([self.texts[index] for index in batch + order[:begin] + order[begin + size :]])
                else:
                    tokens = self.tokenize([pick(captions[index]) for index in batch])
                yield images.contiguous(memory_format=torch.channels_last), tokens

    def _loss(self, images: Tensor, tokens: Tensor) -> Tensor:
        head = self.model.head
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            features = self.model.image_encoder(images)
        x, y, scale = head.encode_image(features.float()), self.model.encode_text(tokens), head.logit_scale.exp()
        loss = contrastive_loss(x, y, scale)
        if self.demo.text != "minilm":
            return loss
        return (loss + distillation_loss(x, y, scale, y[: len(x)], y, TEACHER_SCALE)) / 2

    def train(self) -> None:
        """AdamW with a linear warm-up and a cosine."""
        demo, model = self.demo, self.model
        if demo.batch_size > len(self.training):
            raise ValueError(f"batch_size: got {demo.batch_size}; accepted are up to {len(self.training)}")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": demo.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=demo.lr, betas=(0.9, 0.98))
        warmup = max(1, demo.steps // 10)

        def rate(step: int) -> float:
            rest = (step - warmup) / max(1, demo.steps - warmup)
            return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * rest))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        model.train()
        with require("tqdm").tqdm(
            total=demo.steps, desc=f"training, seed {demo.seed}", unit="step", mininterval=1
        ) as bar:
            for images, tokens in islice(self._batches(), demo.steps):
                loss = self._loss(images, tokens)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    model.head.logit_scale.clamp_(max=math.log(100))
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        model.eval()

    @torch.no_grad()
    def _ask(self, concepts: Sequence[Concept]) -> Tensor:  # [n, d]
        """The plain drawings' embeddings: of each the mean over itself and augmented views."""
        drawings = Pairs(concepts, SIZE, plain=True).images
        mirrored = torch.tensor([may_be_mirrored(concept) for concept in concepts])
        generator = torch.Generator().manual_seed(self.demo.seed)
        views = [to_float(drawings), *(augment(drawings, generator, mirrored) for _ in range(VIEWS))]
        return normalize(torch.stack([self.model.encode_image(view) for view in views]).sum(dim=0), dim=-1)

    @torch.no_grad()
    def _kinds(self, images: Tensor) -> Tensor:  # [n, kinds]
        """Probabilities of the kinds: of what was said of the training concepts, those texts that say the kind.

        No text says two kinds, so they add up to 1.
        """
        known = [self.emoji.concepts[index] for index in self.training]
        kinds = torch.tensor([kind_of(concept) for concept in known])
        if self.demo.text == "minilm":
            tokens = torch.stack(list(self.texts.values()))
        else:
            tokens = self.tokenize([f"{concept.name}, {list(KINDS)[kind_of(concept)]}" for concept in known])
        logits = self.model.head.logit_scale.exp() * images @ self.model.encode_text(tokens).T
        return logits.softmax(dim=-1) @ one_hot(kinds, len(KINDS)).float()

    @torch.no_grad()
    def _names(self, images: Tensor) -> Tensor:  # [n, held-out]
        """Probabilities of the held-out names."""
        names = [concept.name for concept in self.held_out]
        weights = zero_shot_weights(self.model, self.tokenize, names, PROMPTS)
        return (self.model.head.logit_scale.exp() * images @ weights.T).softmax(dim=-1)

    @torch.no_grad()
    def result(self) -> dict[str, Any]:
        """Recall among the held-out names, and the kind that each held-out drawing is taken for, among all kinds."""
        images, names = self._ask(self.held_out), [concept.name for concept in self.held_out]
        prompts = zero_shot_weights(self.model, self.tokenize, names, PROMPTS)
        recall = retrieval_metrics(images, prompts)
        kinds = self._kinds(images)
        bare = images @ zero_shot_weights(self.model, self.tokenize, list(KINDS), PROMPTS).T
        right = torch.tensor([kind_of(concept) for concept in self.held_out])
        best, phrases = kinds.max(dim=-1), list(KINDS)
        return {
            **asdict(self.demo),
            "held_out": len(names),
            "largest_kind": right.bincount().max().item() / len(names),
            "accuracy": (best.indices == right).double().mean().item(),
            "accuracy_of_bare_prompts": (bare.argmax(dim=-1) == right).double().mean().item(),
            **{name: value for name, value in recall.items() if "R@" in name},
            "answers": [
                {"name": name, "kind": phrases[kind], "answer": phrases[index], "probability": round(value, 4)}
                for name, kind, index, value in zip(
                    names, right.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
                )
            ],
        }

    def draw(self, path: Path) -> None:
        """What the first held-out drawings are taken for; see `pictures.plot_answers`."""
        shown = self.held_out[:SHEET_PICTURES]
        images = self._ask(self.held_out)[: len(shown)]  # the same views as in the result
        questions = [
            (self._kinds(images), list(KINDS), [kind_of(concept) for concept in shown]),
            (self._names(images), [concept.name for concept in self.held_out], list(range(len(shown)))),
        ]
        large = draw([concept.pictures[0].file for concept in shown], SHEET_PIXELS)
        require("clipfast.emoji.pictures").plot_answers(path, large, questions)


def run(demo: Demo, emoji: Emoji) -> dict[str, Any]:
    """Train, write the folder's files, and return the result; see `Run.result`."""
    out = Path(demo.out)
    out.mkdir(parents=True, exist_ok=True)
    this = Run(demo, emoji)
    this.train()
    result = this.result()
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    torch.save({"demo": asdict(demo), "model": this.model.state_dict()}, out / "model.pt")
    this.draw(out / "retrieval.png")
    return result


def report(result: dict[str, Any]) -> str:
    """The figures next to chance, then what each of the first held-out things is, in words."""
    n, kinds = result["held_out"], len(KINDS)
    lines = [f"{n} things that no step has seen, neither drawings nor names"]
    for k in (1, 5, 10):
        names, drawings = (f"{result[f'{way}_R@{k}']:.1%}" for way in ("image_to_text", "text_to_image"))
        lines.append(f"recall@{k}: {names} by the drawing, {drawings} by the name (chance {k / n:.1%})")
    always = f"always the largest kind {result['largest_kind']:.1%}"
    lines.append(f"what is it? {result['accuracy']:.1%} right (chance {1 / kinds:.1%}, {always})")
    for answer in reversed(result["answers"][:SHEET_PICTURES]):
        wrong = "" if answer["answer"] == answer["kind"] else f"; wrong, it is {answer['kind']}"
        lines.append(f"{answer['name']}: {answer['answer']} ({answer['probability']:.2f}){wrong}")
    return "\n".join(lines)


def record(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One file of several seeds: the means, and of each seed its figures and what the first held-out thing is."""
    figures = [name for name in results[0] if "R@" in name or name.startswith("accuracy") or name == "largest_kind"]
    rows = [{name: result[name] for name in ("seed", *figures)} | result["answers"][0] for result in results]
    means = {name: sum(result[name] for result in results) / len(results) for name in figures}
    run_by = {name: results[0][name] for name in ("text", "steps", "batch_size", "lr", "weight_decay", "held_out")}
    machine = {"date": str(date.today()), "torch": torch.__version__, "threads": torch.get_num_threads()}
    path.write_text(json.dumps(machine | run_by | {"mean": means, "seeds": rows}, indent=1) + "\n")
