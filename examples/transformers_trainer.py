"""transformers' Trainer with clipfast's loss: a small CLIPModel learns OpenMoji drawings and their names.

    pip install "clipfast[demo,transformers]"
    python examples/transformers_trainer.py --steps 300

The one line for clipfast is `clipfast_transformers.patch()`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

import clipfast
from clipfast.emoji.data import Pairs, Tokenizer, read_concepts, to_float
from clipfast.integrations import transformers as clipfast_transformers

SIZE, WORDS = 48, 24


class Drawings(torch.utils.data.Dataset[dict[str, Any]]):
    """One drawing and its name for each concept."""

    def __init__(self, concepts: int) -> None:
        pairs = Pairs(read_concepts()[:concepts], SIZE, plain=True)
        self.images = to_float(pairs.images)
        self.names = [captions[0] for captions in pairs.captions]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "name": self.names[index]}


def collate(rows: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """A batch as CLIPModel takes it; return_loss makes it compute the loss."""
    tokens = tokenizer([row["name"] for row in rows])
    return {
        "pixel_values": torch.stack([row["image"] for row in rows]),
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "return_loss": True,
    }


def small_model(vocab_size: int) -> CLIPModel:
    width = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    # The tokenizer's last two ids open and close a text, and 0 fills it up.
    special = {"pad_token_id": 0, "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    config = CLIPConfig(
        text_config=width | special | {"vocab_size": vocab_size, "max_position_embeddings": WORDS},
        vision_config=width | {"image_size": SIZE, "patch_size": 8},
        projection_dim=128,
    )
    return CLIPModel(config)


@torch.no_grad()
def evaluate(model: CLIPModel, batch: dict[str, Any]) -> dict[str, float]:
    """Recall at 1, 5 and 10 among all pairs of the batch."""
    model = model.eval().cpu()
    images = model.get_image_features(batch["pixel_values"]).pooler_output
    texts = model.get_text_features(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    return clipfast.retrieval_metrics(images, texts)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, print and return the mean loss of the run and the recall on the pairs that it learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/transformers", help="folder for Trainer's files (%(default)s)")
    parser.add_argument("--concepts", type=int, default=1000, help="pairs to learn (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=200, help="pairs in a step (%(default)s)")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = Drawings(options.concepts)
    tokenizer = Tokenizer.train(data.names, vocab_size=1000, context_length=WORDS)

    def collator(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return collate(rows, tokenizer)

    clipfast_transformers.patch()
    settings = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        dataloader_drop_last=True,
        learning_rate=1e-3,
        warmup_steps=options.steps // 10,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # the collator makes CLIPModel's arguments of them
    )
    model = small_model(tokenizer.vocab_size)
    trained = Trainer(model=model, args=settings, train_dataset=data, data_collator=collator).train()
    metrics = {"train_loss": trained.training_loss} | evaluate(
        model, collator([*map(data.__getitem__, range(len(data)))])
    )
    for name, value in metrics.items():
        print(f"{name}: {value:.4g}")
    return metrics


if __name__ == "__main__":
    main()
