"""The patch in open_clip's own training loop, and the losses that its command line makes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from open_clip_setup import arguments, dense_loss, integration, open_clip, train
from oracle import assert_three_way, error, features
from torch import Tensor, nn

import clipfast
from clipfast import reference

CAPTIONS = ("a cat", "two dogs", "the sea", "a red car", "an old man reading", "trees", "bread and butter", "a sheep")
LOSS_FLAGS: dict[str, list[str]] = {
    "ClipLoss": ["--model", "RN50"],
    "CoCaLoss": ["--model", "coca_ViT-B-32"],
    "SigLipLoss": ["--model", "ViT-B-32", "--siglip"],
    "DistillClipLoss": ["--model", "RN50", "--distill-model", "RN50", "--distill-pretrained", "none"],
}


@pytest.fixture(autouse=True)
def _unpatch() -> Iterator[None]:
    yield
    integration.unpatch()


class Recorder(nn.Module):
    """A loss that keeps the features that it was given."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.seen: tuple[Tensor, ...] = ()

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool
    ) -> dict[str, Tensor]:
        self.seen = image_features.detach(), text_features.detach(), logit_scale.detach()
        losses: dict[str, Tensor] = self.loss(image_features, text_features, logit_scale, output_dict=output_dict)
        return losses


class ExactLoss(nn.Module):
    """The dense formula in float64."""

    def forward(self, x: Tensor, y: Tensor, logit_scale: Tensor, output_dict: bool) -> dict[str, Tensor]:
        return {"contrastive_loss": reference.contrastive_loss(x.double(), y.double(), logit_scale.double())}


class BatchList(list[tuple[Tensor, Tensor]]):
    """A data loader of a single batch, which tells its size as open_clip's do."""

    num_batches = 1
    num_samples = len(CAPTIONS)


@dataclass
class Step:
    seen: tuple[Tensor, ...]  # image features, text features, logit_scale
    gradients: dict[str, Tensor]


def training_step(model_name: str, loss: nn.Module | None = None) -> Step:
    """One epoch of a single batch in open_clip's own training loop, always from the same weights and data."""
    args = arguments("--model", model_name, "--batch-size", str(len(CAPTIONS)))
    torch.manual_seed(0)
    model = open_clip.create_model(model_name, output_dict=True)
    size = open_clip.get_model_config(model_name)["vision_cfg"]["image_size"]
    images, texts = torch.randn(len(CAPTIONS), 3, size, size), open_clip.get_tokenizer(model_name)(CAPTIONS)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=BatchList([(images, texts)]))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(open_clip.create_loss(args) if loss is None else loss)
    before = model.text_projection.detach().clone()
    train.train_one_epoch(model, data, recorder, 0, optimizer, None, None, None, args)
    assert torch.equal(model.text_projection.detach(), before.add(model.text_projection.grad, alpha=-0.1))
    return Step(recorder.seen, {name: parameter.grad for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("model_name", ["RN50", "ViT-B-32"])
def test_training_step(model_name: str) -> None:
    """A step with the patch is as near to the step with a float64 loss as open_clip's own.

    err(patched) <= 2 err(open_clip) + rounding for the gradient of every parameter, in the 2-norm. The SGD update is a
    constant times it. All three steps see bitwise the same features, so the errors are the loss's, carried through the
    same encoders. The rounding is the oracle's: what eps |L| in every logit does to the gradient of the features, and
    so to whatever is linear in it.
    """
    exact = training_step(model_name, ExactLoss())
    dense = training_step(model_name)
    dense_errors = {name: distance(dense.gradients[name], gradient) for name, gradient in exact.gradients.items()}
    dense.gradients.clear()
    integration.patch()
    patched = training_step(model_name)

    for got, expected in zip(patched.seen, exact.seen, strict=True):
        assert torch.equal(got, expected)
    x, y, scale = patched.seen
    rounding = torch.finfo(torch.float32).eps * (scale.item() + 2 + math.sqrt(len(x)))
    for name, gradient in exact.gradients.items():
        term = 2 * scale.item() if name == "logit_scale" else gradient.double().norm().item()
        bound = 2 * dense_errors[name] + rounding * term
        got_error = distance(patched.gradients[name], gradient)
        assert got_error <= bound, f"{name}: {got_error:.3g} > {bound:.3g}"
    for name in clipfast.backends():
        if not clipfast.backends()[name]:
            assert_three_way(x, y, scale.item(), backend=name, formula=dense_loss)


def distance(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact.double()).norm().item()


@pytest.mark.parametrize("class_name", LOSS_FLAGS)
def test_create_loss(class_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss computes what it did, in the same form, without logits."""
    loss = open_clip.create_loss(arguments(*LOSS_FLAGS[class_name]))
    assert type(loss) is getattr(open_clip.loss, class_name)
    x, y = features("trained", 9, 9, 12)
    inputs = {"image_features": x, "text_features": y, "logit_scale": torch.tensor(14.3)}
    if class_name == "CoCaLoss":
        inputs |= {"logits": torch.randn(9, 7, 50), "labels": torch.randint(50, (9, 7))}
    elif class_name == "SigLipLoss":
        inputs |= {"logit_bias": torch.tensor(-10.0)}
    elif class_name == "DistillClipLoss":
        inputs |= {"dist_image_features": y, "dist_text_features": x, "dist_logit_scale": torch.tensor(20.0)}
    before, before_values = loss(**inputs, output_dict=True), loss(**inputs)
    integration.patch()
    after, after_values = loss(**inputs, output_dict=True), loss(**inputs)

    assert list(after) == list(before)
    assert type(after_values) is type(before_values)
    # SigLIP's loss is a sum over columns, and distillation's is above 1.
    for name, value in before.items():
        relative = class_name in ("SigLipLoss", "DistillClipLoss")
        bound = 1e-6 * max(1.0, value.item()) if relative else 1e-6
        assert error(after[name], value) <= (0 if name == "caption_loss" else bound)
    monkeypatch.setattr(loss, "get_logits", None)
    loss(**inputs)
