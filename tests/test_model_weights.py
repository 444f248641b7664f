"""The paper's models by name: as large as open_clip's, and equal to other packages' with the same weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from clipfast import ContrastiveLoss
from clipfast.emoji.data import Tokenizer
from clipfast.models import (
    CONFIGS,
    BPETokenizer,
    create_model,
    from_open_clip,
    from_transformers,
    to_open_clip,
    to_transformers,
)

open_clip: Any = pytest.importorskip("open_clip", reason="open_clip is missing; the extra `open-clip` brings it")

PAPER = [name for name in CONFIGS if "tiny" not in name]
TEXT = {"context_length": 9, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
SMALL = {
    "vit": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
    "resnet": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
}
TOKENS = torch.tensor([[58, 4, 5, 59, 0, 0, 0, 0, 0], [58, 59, 0, 0, 0, 0, 0, 0, 0]])


def shuffled(model: nn.Module) -> Any:
    """The model in evaluation mode with random values for everything, also for what begins as zero or one."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim and tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model.eval()


def small(kind: str, quick_gelu: bool = False) -> Any:
    return shuffled(open_clip.model.CLIP(24, dict(SMALL[kind]), dict(TEXT), quick_gelu=quick_gelu))


def assert_same(outputs: dict[str, Tensor], images: Tensor, texts: Tensor, scale: Tensor) -> None:
    assert_close(outputs["image_features"], images, rtol=1e-4, atol=1e-5)
    assert_close(outputs["text_features"], texts, rtol=1e-4, atol=1e-5)
    assert_close(outputs["logit_scale"], scale.reshape(()))


@torch.no_grad()
def assert_as_open_clip(model: Any, images: Tensor, tokens: Tensor) -> None:
    converted = from_open_clip(model)
    expected, outputs = model(images, tokens), converted(images, tokens)
    assert_same(outputs, *expected[:3])
    assert ContrastiveLoss()(**outputs).isfinite()
    back = to_open_clip(converted)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", PAPER)
def test_as_many_parameters_as_open_clip(name: str) -> None:
    with torch.device("meta"):
        peer = open_clip.model.CLIP(**open_clip.get_model_config(name))
    model = create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
    shapes = {name: tensor.shape for name, tensor in to_open_clip(model).items()}
    assert shapes == {name: tensor.shape for name, tensor in peer.state_dict().items()}


def test_the_paper_s_text_encoders() -> None:
    text = create_model("ViT-B-32", device="meta").text_encoder
    assert round(sum(p.numel() for p in text.parameters()) / 1e6) == 63
    bag = create_model("ViT-B-32", text="cbow", device="meta").text_encoder
    assert sum(p.numel() for p in bag.parameters()) == 49_408 * 512 + 2 * 4 * 512**2 + 5 * 512 + 4 * 512


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
def test_outputs_of_open_clip(name: str) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    tokens = open_clip.get_tokenizer(name)(["a photo of a kangaroo", "a drawing of a teapot, an object"])
    assert_as_open_clip(model, torch.randn(2, 3, 224, 224), tokens)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_outputs_of_a_small_open_clip(kind: str, quick_gelu: bool) -> None:
    size = SMALL[kind]["image_size"]
    assert_as_open_clip(small(kind, quick_gelu), torch.randn(2, 3, size, size), TOKENS)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_outputs_of_transformers(activation: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    width = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": activation}
    text = {"hidden_size": 32, "intermediate_size": 128, "vocab_size": 60, "max_position_embeddings": 9}
    config = transformers.CLIPConfig(
        text_config=width | text | {"bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 0},
        vision_config=width | {"hidden_size": 48, "intermediate_size": 192, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model, images = shuffled(transformers.CLIPModel(config)), torch.randn(2, 3, 32, 32)
    converted = from_transformers(model)
    with torch.no_grad():
        expected = model(input_ids=TOKENS, pixel_values=images)
        outputs = converted(images, TOKENS)
    assert_same(outputs, expected.image_embeds, expected.text_embeds, model.logit_scale.exp())
    back = to_transformers(converted)
    model.load_state_dict(back)  # strict
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_a_copy_shares_nothing() -> None:
    model = small("vit")
    assert not from_open_clip(model).training
    assert from_open_clip(model.train()).training
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in from_open_clip(model).state_dict().values()}


def test_other_models_are_refused() -> None:
    model = small("vit")
    model.visual.pool_type = "avg"
    for convert, wrong in (
        (from_open_clip, model),
        (from_open_clip, nn.Linear(2, 2)),
        (to_open_clip, create_model("vit-tiny", 60, text="cbow")),
        (to_transformers, create_model("resnet-tiny", 60)),
    ):
        with pytest.raises(ValueError, match=r"^model: got"):
            convert(wrong)
    scaled = open_clip.model.CLIP(24, SMALL["vit"] | {"ls_init_value": 0.1}, dict(TEXT))
    with pytest.raises(ValueError, match=r"^model: got other weights than CLIP's, as"):
        from_open_clip(scaled)


TEXTS = [
    "a photo of a kangaroo",
    "Hello, World! it's 2026 &amp; &lt;b&gt; don't stop, they'll be 12.5% off",
    "ñandú  ZÜRICH\n\t你好 🦘🇦🇺 👩🏽‍🚀",
    "<start_of_text> quoted <end_of_text>",
    "schÃ¶n",  # what ftfy mends
    "",
    "word " * 100,
    "electroencephalographically antidisestablishmentarianism x" + "y" * 40,
]


def test_ids_of_open_clip() -> None:
    tokens = BPETokenizer()(TEXTS)
    assert torch.equal(tokens, open_clip.get_tokenizer("ViT-B-32")(TEXTS))
    assert torch.equal(BPETokenizer(5)("a photo of a kangaroo"), open_clip.SimpleTokenizer(context_length=5)(TEXTS[:1]))


def test_ids_of_open_clip_for_every_emoji() -> None:
    emoji = import_module("emoji") if pytest.importorskip("emoji") else None
    texts = [f"{character} {entry['en']}" for character, entry in emoji.EMOJI_DATA.items()][::7]  # type: ignore[union-attr]
    assert torch.equal(BPETokenizer()(texts), open_clip.get_tokenizer("ViT-B-32")(texts))


def test_the_tokenizer_as_a_file() -> None:
    """What the training command keeps: the same ids, padded to the longest text."""
    texts = [text for text in TEXTS if "&amp;" not in text and "schÃ¶n" not in text]
    tokens = Tokenizer(BPETokenizer(9).to_json())(texts)
    assert torch.equal(tokens, BPETokenizer(9)(texts)[:, : tokens.shape[1]])


def test_the_tokenizer_refuses() -> None:
    with pytest.raises(ValueError, match=r"^context_length: got 1"):
        BPETokenizer(1)
