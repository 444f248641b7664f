"""Small models of transformers' CLIP kind, a batch for them, and what compares their outputs and gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from oracle import error
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is missing; the extra `transformers` brings it")

N, WORDS, VOCABULARY, SIZE = 37, 8, 99, 30
LOGITS = ("logits_per_text", "logits_per_image")


def make_model(scale: float = 14.3) -> Any:
    """A CLIPModel of about 50 thousand parameters in training mode; the same at every call."""
    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": WORDS, "eos_token_id": VOCABULARY - 1}
    vision = {"image_size": SIZE, "patch_size": 10}
    config = transformers.CLIPConfig(
        text_config=width | text | {"bos_token_id": 0, "pad_token_id": 1},
        vision_config=width | vision,
        projection_dim=24,
        logit_scale_init_value=math.log(scale),
    )
    return transformers.CLIPModel(config).train()


def make_batch() -> dict[str, Any]:
    """Texts of several lengths, and pictures."""
    torch.manual_seed(1)
    tokens = torch.randint(2, VOCABULARY - 1, (N, WORDS))
    end = torch.randint(2, WORDS, (N, 1))
    positions = torch.arange(WORDS)
    tokens = tokens.masked_fill(positions == end, VOCABULARY - 1).masked_fill(positions > end, 1)
    return {
        "input_ids": tokens,
        "attention_mask": (positions <= end).long(),
        "pixel_values": torch.randn(N, 3, SIZE, SIZE),
        "return_loss": True,
    }


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def distance(values: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return norm({name: values[name].double() - value for name, value in exact.items()})


def norm(values: dict[str, Tensor]) -> float:
    return math.sqrt(sum(value.double().square().sum().item() for value in values.values()))


def flat(output: Any) -> dict[str, Tensor]:
    """Every tensor or array of an output, by its place."""
    if isinstance(output, Tensor | np.ndarray):
        return {"": torch.as_tensor(output)}
    if output is None:
        return {}
    items = output.items() if hasattr(output, "items") else enumerate(output)
    return {f"{key}.{place}": tensor for key, value in items for place, tensor in flat(value).items()}


def assert_same(output: Any, expected: Any, apart: tuple[str, ...] = ()) -> None:
    """Every tensor in its place with the same bits; the loss up to rounding, and not the fields `apart`."""
    before, after = flat(expected), flat(output)
    assert list(after) == list(before)
    for place, value in before.items():
        field = place.partition(".")[0]
        if field in apart:
            continue
        if field == "loss":
            assert error(after[place], value) <= 1e-6
        else:
            assert torch.equal(after[place], value), place
