from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from clipfast import ContrastiveLoss
from clipfast.models import (
    CBOW,
    CLIP,
    CONFIGS,
    TEXT_ENCODERS,
    ResNet,
    TextTransformer,
    VisionTransformer,
    build_model,
    classify,
    zero_shot_weights,
)

END = 49  # the largest id of a vocabulary of 50
TOKENS = torch.tensor([[48, 3, 4, 5, END, 0, 0], [48, 7, END, 0, 0, 0, 0], [48, 1, 2, 3, 4, 5, END]])
WORDS = {"cat": 3, "dog": 4, "a": 5}


def tokenize(texts: Sequence[str]) -> Tensor:
    ids = [[48, *(WORDS[word] for word in text.split()), END] for text in texts]
    return torch.tensor([row + [0] * (7 - len(row)) for row in ids])


@pytest.mark.parametrize(
    ("encoder", "size", "width"),
    [
        (VisionTransformer(32, 8, 24, 2, 3), 32, 24),
        (ResNet((1, 2), 8, 2, 32), 32, 64),
        (ResNet((1, 1, 1, 1), 8, 4, 32), 32, 256),
    ],
)
def test_image_encoder_shape(encoder: VisionTransformer | ResNet, size: int, width: int) -> None:
    assert encoder.output_dim == width
    assert encoder(torch.randn(3, 3, size, size)).shape == (3, width)


@pytest.mark.parametrize("encoder", [TextTransformer(50, 7, 24, 2, 3), CBOW(50, 24)])
def test_text_encoder_shape(encoder: TextTransformer | CBOW) -> None:
    assert encoder.output_dim == 24
    assert encoder(TOKENS).shape == (3, 24)


def test_later_tokens_do_not_change_earlier_ones() -> None:
    encoder = TextTransformer(50, 7, 24, 2, 3)
    changed = TOKENS.clone()
    changed[:, 4:] = 11
    before, after = encoder.hidden(TOKENS), encoder.hidden(changed)
    assert_close(before[:, :4], after[:, :4], rtol=0, atol=0)
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("encoder", [TextTransformer(50, 7, 24, 2, 3), CBOW(50, 24)])
def test_padding_changes_nothing(encoder: TextTransformer | CBOW) -> None:
    assert_close(encoder(TOKENS[:2, :5]), encoder(TOKENS[:2]))


def test_order_matters_to_the_transformer_only() -> None:
    swapped = TOKENS[:, [0, 2, 1, *range(3, 7)]]
    bag, transformer = CBOW(50, 24), TextTransformer(50, 7, 24, 2, 3)
    assert_close(bag(swapped[:1]), bag(TOKENS[:1]))
    assert (transformer(swapped[:1]) - transformer(TOKENS[:1])).abs().max() > 1e-3


def test_residual_blocks_begin_as_the_identity() -> None:
    encoder = ResNet((2,), 8, 2, 16)
    x = torch.rand(2, 32, 4, 4)
    assert_close(encoder.stages[1](x), x)


@pytest.mark.parametrize("text", TEXT_ENCODERS)
@pytest.mark.parametrize("name", ["vit-tiny", "resnet-tiny"])
def test_clip(name: str, text: str) -> None:
    model = build_model(name, 50, 7, text)
    images = torch.randn(3, 3, CONFIGS[name].image_size, CONFIGS[name].image_size)
    outputs = model(images, TOKENS)
    for features in (outputs["image_features"], outputs["text_features"]):
        assert features.shape == (3, CONFIGS[name].embed_dim)
        assert_close(features.norm(dim=-1), torch.ones(3))
    assert_close(model.head.logit_scale, torch.tensor(math.log(1 / 0.07)))
    assert_close(outputs["logit_scale"], torch.tensor(1 / 0.07))

    loss = ContrastiveLoss()(**outputs)
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_gradients_reach_every_parameter() -> None:
    """After one step, for the last gains of the residual branches begin at zero."""
    model = build_model("resnet-tiny", 50, 7, "transformer")
    images = torch.randn(3, 3, 48, 48)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        ContrastiveLoss()(**model(images, TOKENS)).backward()
        optimizer.step()
    # A bias of the keys moves all logits of a query alike: the softmax does not see it.
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert set(unreached) <= {"image_encoder.pool.k.bias"}


def test_the_initial_residual_branches_shrink_with_depth() -> None:
    deep, shallow = TextTransformer(50, 7, 64, 8, 4), TextTransformer(50, 7, 64, 2, 4)
    weights = dict(deep.named_parameters())
    ratio = shallow.get_parameter("blocks.0.out.weight").std() / weights["blocks.0.out.weight"].std()
    assert ratio.item() == pytest.approx(2, rel=0.1)
    assert weights["blocks.0.qkv.weight"].std().item() == pytest.approx(64**-0.5, rel=0.1)


def test_zero_shot() -> None:
    model = build_model("vit-tiny", 50, 7).eval()
    weights = zero_shot_weights(model, tokenize, ["cat", "dog"], ["{}", "a {}", "a a {}"])
    assert_close(weights.norm(dim=-1), torch.ones(2))
    prompts = model.encode_text(tokenize(["dog", "a dog", "a a dog"])).detach()
    assert_close(weights[1], prompts.mean(0) / prompts.mean(0).norm())

    images = torch.randn(4, 3, 48, 48)
    probabilities = classify(model, images, weights)
    assert_close(probabilities.sum(dim=-1), torch.ones(4))
    logits = model(images, tokenize(["a"] * 4))["image_features"].detach() @ weights.T / 0.07
    assert_close(probabilities, logits.softmax(dim=-1))


def test_zero_shot_finds_the_matching_class() -> None:
    class Pixels(nn.Module):
        output_dim = 2

        def forward(self, images: Tensor) -> Tensor:
            return images[:, :2, 0, 0]

    class FirstWord(nn.Module):
        output_dim = 2

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.eye(2)[tokens[:, 1] - WORDS["cat"]]

    model = CLIP(Pixels(), FirstWord(), 2)
    with torch.no_grad():
        model.head.w_i.copy_(torch.eye(2))
        model.head.w_t.copy_(torch.eye(2))
    images = torch.zeros(2, 3, 1, 1)
    images[0, 0] = images[1, 1] = 1
    probabilities = classify(model, images, zero_shot_weights(model, tokenize, ["cat", "dog"]))
    assert probabilities.argmax(dim=-1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: build_model("vit-huge", 50), "name"),
        (lambda: build_model("vit-tiny", 50, text="lstm"), "text"),
        (lambda: build_model("vit-tiny", 0), "vocab_size"),
        (lambda: build_model("vit-tiny", 50, 0), "context_length"),
        (lambda: VisionTransformer(32, 7, 24, 2, 3), "patch_size"),
        (lambda: VisionTransformer(32, 8, 24, 0, 3), "layers"),
        (lambda: VisionTransformer(32, 8, 25, 2, 3), "heads"),
        (lambda: ResNet((1, 1), 8, 2, 20), "image_size"),
        (lambda: ResNet((1, 0), 8, 2, 32), "layers"),
        (lambda: ResNet((), 8, 2, 32), "stages"),
        (lambda: ResNet((1,), 7, 2, 32), "width"),
        (lambda: ResNet((1,), 8, 5, 32), "heads"),
        (lambda: TextTransformer(50, 7, 24, 2, 5), "heads"),
        (lambda: CBOW(50, 0), "width"),
        (lambda: zero_shot_weights(build_model("vit-tiny", 50), tokenize, []), "class_names"),
        (lambda: zero_shot_weights(build_model("vit-tiny", 50), tokenize, ["cat"], []), "templates"),
        (lambda: zero_shot_weights(build_model("vit-tiny", 50), tokenize, ["cat"], ["a"]), "templates"),
    ],
)
def test_wrong_arguments_are_named(build: Callable[[], object], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        build()
