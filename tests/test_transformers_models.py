"""Which models of transformers the patch reaches, and what it says of the others (trap 18)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from clip_models import (
    LOGITS,
    SIZE,
    VOCABULARY,
    WORDS,
    assert_same,
    distance,
    gradients,
    make_batch,
    norm,
    transformers,
)
from torch import nn

integration = importlib.import_module("clipfast.integrations.transformers")


@pytest.fixture(autouse=True)
def _unpatch() -> Iterator[None]:
    yield
    integration.unpatch()


def other_model(name: str) -> tuple[Any, dict[str, Any]]:
    """A small model of another class of the table, and a batch for it."""
    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = width | {"vocab_size": VOCABULARY, "max_position_embeddings": WORDS + 2, "eos_token_id": VOCABULARY - 1}
    config = getattr(transformers, name.replace("Model", "Config"))(
        text_config=text | {"bos_token_id": 0, "pad_token_id": 1},
        vision_config=width | {"image_size": SIZE, "patch_size": 10},
        projection_dim=24,
    )
    batch = make_batch()
    if name == "ChineseCLIPModel":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    return getattr(transformers, name)(config).train(), batch


def test_the_table_holds_what_the_docstring_says() -> None:
    reached = integration.__doc__.partition("not reached")[0]
    for model in integration.MODELS:
        assert model.__name__ in reached


@pytest.mark.parametrize("name", [model.__name__ for model in integration.MODELS])
def test_every_model_that_is_reached(name: str) -> None:
    """Outputs, gradients and signature as transformers'."""
    model, batch = other_model(name)
    model.set_attn_implementation("eager")
    expected = model(**batch)
    expected_gradients = gradients(model, expected.loss)
    before = [*inspect.signature(model.forward).parameters]
    model.zero_grad()
    integration.patch(model)
    assert [*inspect.signature(model.forward).parameters] == [*before[:-1], "return_logits", before[-1]]
    output = model(**batch)
    assert_same(output, expected, apart=LOGITS)
    assert distance(gradients(model, output.loss), expected_gradients) <= 1e-5 * norm(expected_gradients)
    assert_same(model(**batch, return_logits=True, output_hidden_states=True).to_tuple()[1:3], expected.to_tuple()[1:3])


@pytest.mark.parametrize("name", ["AltCLIPModel", "GroupViTModel", "SiglipModel", "VisionTextDualEncoderModel"])
def test_a_model_that_is_not_reached_is_named(name: str) -> None:
    """By patch, before anything is replaced, and in the docstring."""
    model = nn.Module.__new__(getattr(transformers, name))
    with pytest.raises(TypeError, match=f"model: the patch does not reach {name}; it reaches the forward of CLIPModel"):
        integration.patch(model)
    assert all(one.forward is own for one, own in integration.TRANSFORMERS_FORWARDS.items())
    not_reached = integration.__doc__.partition("not reached")[2].partition("What is not")[0]
    assert name.removesuffix("Model").removesuffix("lipModel").lower() in not_reached.lower()


def test_a_subclass_with_a_forward_of_its_own_is_not_reached() -> None:
    class Mine(transformers.CLIPModel):  # type: ignore[misc]
        def forward(self, **inputs: Any) -> None:
            pass

    class Theirs(transformers.CLIPModel):  # type: ignore[misc]
        pass

    for _ in range(2):  # the second time patched already
        with integration.patched(nn.Module.__new__(Theirs)):
            pass
        with pytest.raises(TypeError, match="does not reach Mine"):
            integration.patch(nn.Module.__new__(Mine))
        integration.patch()
