"""Which models of transformers the patch reaches, and what it says of the others (trap 18)."""

from __future__ import annotations

import importlib
import inspect
import math
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
from oracle import assert_three_way, error, evaluate
from torch import Tensor, nn

import clipfast

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
    assert_same(output, expected, apart=(*LOGITS, "loss") if name == "SiglipModel" else LOGITS)
    assert error(output.loss, expected.loss) <= 1e-6 * max(1.0, expected.loss.item())  # SigLIP's is a sum over columns
    assert distance(gradients(model, output.loss), expected_gradients) <= 1e-5 * norm(expected_gradients)
    assert_same(model(**batch, return_logits=True, output_hidden_states=True).to_tuple()[1:3], expected.to_tuple()[1:3])


def siglip_formula(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """transformers' SiglipModel."""
    logits = x @ y.t() * s + b
    labels = -torch.ones_like(logits) + 2 * torch.eye(len(x), dtype=logits.dtype)
    return -torch.nn.functional.logsigmoid(labels * logits).sum(dim=-1).mean()


@pytest.mark.needs("sigmoid")
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("bias", [0.0, -10.0])
def test_gradients_of_siglip_embeddings(scale: float, bias: float, backend: str) -> None:
    """Judged three ways on the embeddings of the model; what goes back into the encoders is that, bitwise."""
    model, batch = other_model("SiglipModel")
    with torch.no_grad():
        model.logit_scale.fill_(math.log(scale))
        model.logit_bias.fill_(bias)
    integration.patch(model, backend=backend, label_smoothing=0.1)
    output = model(**batch)
    for embeds in (output.text_embeds, output.image_embeds):
        embeds.retain_grad()
    output.loss.backward()
    x, y = output.text_embeds.detach(), output.image_embeds.detach()
    scale = model.logit_scale.exp().item()
    logits = scale * x.double() @ y.double().T + bias
    g = torch.where(torch.eye(len(x), dtype=torch.bool), (-logits).sigmoid(), logits.sigmoid())
    assert_three_way(
        x, y, scale, bias, backend=backend, formula=siglip_formula, exact_formula=siglip_formula,
        loss_fn=clipfast.siglip_loss, gradient_sum=max(g.sum(1).max().item(), g.sum(0).max().item()),
    )  # fmt: skip
    expected = evaluate(lambda *inputs: clipfast.siglip_loss(*inputs, backend=backend), x, y, scale, bias)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.text_embeds.grad, expected.dx)
    assert torch.equal(output.image_embeds.grad, expected.dy)
    assert torch.equal(model.logit_bias.grad, expected.dbias.reshape(1))
    assert error(model.logit_scale.grad, expected.dscale * scale) <= 1e-6 * max(1.0, expected.dscale.abs().item())


def test_a_step_of_siglip_in_float64() -> None:
    """Every parameter's gradient, one by one; the logits in evaluation mode, bitwise."""
    model, batch = other_model("SiglipModel")
    model, batch["pixel_values"] = model.double(), batch["pixel_values"].double()
    expected = gradients(model, model(**batch).loss)
    logits = model.eval()(**batch)[1:3]
    model.train().zero_grad()
    with integration.patched(model):
        got = gradients(model, model(**batch).loss)
        assert_same(model.eval()(**batch)[1:3], logits)
    assert {"logit_scale", "logit_bias"} < got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert error(got[name], gradient) <= 1e-12 * max(1.0, norm(expected)), name


@pytest.mark.parametrize("name", ["AltCLIPModel", "GroupViTModel", "Siglip2Model", "VisionTextDualEncoderModel"])
def test_a_model_that_is_not_reached_is_named(name: str) -> None:
    """By patch, before anything is replaced, and in the docstring."""
    model = nn.Module.__new__(getattr(transformers, name))
    with pytest.raises(TypeError, match=f"model: the patch does not reach {name}; it reaches the forward of CLIPModel"):
        integration.patch(model)
    assert all(one.forward is own for one, own in integration.TRANSFORMERS_FORWARDS.items())
    not_reached = integration.__doc__.partition("not reached")[2].partition("What is not")[0]
    assert name.removesuffix("Model").lower() in not_reached.lower()


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
