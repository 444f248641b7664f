"""Weights from open_clip's and transformers' CLIP, and back: the same network under other names.

Neither package is imported: a model is read by its attributes and its state_dict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipfast.models.clip import CLIP, Config, create_model
from clipfast.models.image import VisionTransformer
from clipfast.models.text import TextTransformer
from clipfast.models.transformer import QuickGELU

Rules = tuple[tuple[str, str], ...]

# Names here, as patterns, and what open_clip calls them. The first that fits is taken.
OPEN_CLIP_BLOCK: Rules = (
    (r"norm_([12])", r"ln_\1"),
    (r"qkv\.(weight|bias)", r"attn.in_proj_\1"),
    (r"out", "attn.out_proj"),
    (r"mlp\.0", "mlp.c_fc"),
    (r"mlp\.2", "mlp.c_proj"),
)
OPEN_CLIP: Rules = (
    (r"head\.w_t", "text_projection"),
    (r"head\.b_i", "visual.attnpool.c_proj.bias"),
    (r"head\.logit_scale", "logit_scale"),
    (r"text_encoder\.tokens", "token_embedding"),
    (r"text_encoder\.positions", "positional_embedding"),
    (r"text_encoder\.blocks", "transformer.resblocks"),
    (r"text_encoder\.norm_post", "ln_final"),
    (r"image_encoder\.patches", "visual.conv1"),
    (r"image_encoder\.class_token", "visual.class_embedding"),
    (r"image_encoder\.positions", "visual.positional_embedding"),
    (r"image_encoder\.norm_pre", "visual.ln_pre"),
    (r"image_encoder\.norm_post", "visual.ln_post"),
    (r"image_encoder\.blocks", "visual.transformer.resblocks"),
    (r"image_encoder\.pool\.positions", "visual.attnpool.positional_embedding"),
    (r"image_encoder\.pool\.([qkv])", r"visual.attnpool.\1_proj"),
)
RESNET_STEM = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
RESNET_BLOCK = {f"residual.{i}": name for i, name in zip((0, 1, 3, 4, 7, 8), RESNET_STEM.values(), strict=True)}
RESNET_BLOCK |= {"shortcut.1": "downsample.0", "shortcut.2": "downsample.1"}

TRANSFORMERS_BLOCK: Rules = (
    (r"norm_([12])", r"layer_norm\1"),
    (r"out", "self_attn.out_proj"),
    (r"mlp\.0", "mlp.fc1"),
    (r"mlp\.2", "mlp.fc2"),
)
TRANSFORMERS: Rules = (
    (r"head\.logit_scale", "logit_scale"),
    (r"head\.w_t", "text_projection.weight"),
    (r"head\.w_i", "visual_projection.weight"),
    (r"text_encoder\.tokens", "text_model.embeddings.token_embedding"),
    (r"text_encoder\.positions", "text_model.embeddings.position_embedding.weight"),
    (r"text_encoder\.blocks", "text_model.encoder.layers"),
    (r"text_encoder\.norm_post", "text_model.final_layer_norm"),
    (r"image_encoder\.patches", "vision_model.embeddings.patch_embedding"),
    (r"image_encoder\.class_token", "vision_model.embeddings.class_embedding"),
    (r"image_encoder\.positions", "vision_model.embeddings.position_embedding.weight"),
    (r"image_encoder\.norm_pre", "vision_model.pre_layrnorm"),
    (r"image_encoder\.norm_post", "vision_model.post_layernorm"),
    (r"image_encoder\.blocks", "vision_model.encoder.layers"),
)


def from_open_clip(model: nn.Module) -> CLIP:
    """A copy of an open_clip.CLIP with a ViT or a ModifiedResNet, in the same mode, dtype and on the same device.

    Raises:
        ValueError: the model is of another kind; the message says what differs.
    """
    source: Any = model
    state = model.state_dict()
    if "visual.conv1.weight" not in state or "token_embedding.weight" not in state:
        raise ValueError(
            f"model: got {type(model).__name__}; accepted is open_clip.CLIP with a ViT or a ModifiedResNet"
        )
    visual, resblocks = source.visual, source.transformer.resblocks
    kinds = {"visual.pool_type": getattr(visual, "pool_type", "tok"), "text_pool_type": source.text_pool_type}
    if kinds != {"visual.pool_type": "tok", "text_pool_type": "argmax"} or source.attn_mask is None:
        raise ValueError(f"model: got pooling {kinds}; accepted are 'tok' and 'argmax' with a causal mask")
    layers: int | tuple[int, ...]
    if "visual.attnpool.positional_embedding" in state:
        layers = tuple(len(stage) for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4))
        width, heads, patch = len(state["visual.conv3.weight"]), visual.attnpool.num_heads, None
        positions, size = state["visual.attnpool.positional_embedding"], visual.image_size
    else:
        layers, width = len(visual.transformer.resblocks), len(state["visual.conv1.weight"])
        heads, patch = visual.transformer.resblocks[0].attn.num_heads, state["visual.conv1.weight"].shape[-1]
        positions, size = state["visual.positional_embedding"], visual.image_size
    side = size if isinstance(size, int) else size[0]
    if len(positions) != (side // (patch or 32)) ** 2 + 1:
        raise ValueError(f"model: got {len(positions)} positions for pictures of {size}; accepted are square pictures")
    text_width, embed_dim = state["text_projection"].shape
    config = Config(
        embed_dim, side, layers, width, heads, patch, len(resblocks), text_width, resblocks[0].attn.num_heads
    )
    quick = type(resblocks[0].mlp.gelu).__name__ == QuickGELU.__name__
    return _filled(config, quick, len(state["positional_embedding"]), state, _open_clip_names, model)


def from_transformers(model: nn.Module) -> CLIP:
    """A copy of a transformers.CLIPModel, in the same mode, dtype and on the same device.

    Raises:
        ValueError: the model is of another kind; the message says what differs.
    """
    state, source = model.state_dict(), cast(Any, model).config
    if "vision_model.embeddings.patch_embedding.weight" not in state or not hasattr(source, "text_config"):
        raise ValueError(f"model: got {type(model).__name__}; accepted is transformers.CLIPModel")
    image, text = source.vision_config, source.text_config
    for tower in (image, text):
        found = (tower.hidden_act, tower.layer_norm_eps, tower.intermediate_size / tower.hidden_size)
        if found[0] not in ("gelu", "quick_gelu") or found[0] != text.hidden_act or found[1:] != (1e-5, 4):
            raise ValueError(
                f"model: got (hidden_act, layer_norm_eps, intermediate / hidden size) {found}; accepted are gelu or "
                "quick_gelu in both towers, 1e-5 and 4"
            )
    if text.eos_token_id not in (2, text.vocab_size - 1):  # 2: the position of the largest id, as of old
        raise ValueError(f"model: got eos_token_id {text.eos_token_id}; accepted is the largest, {text.vocab_size - 1}")
    config = Config(
        source.projection_dim,
        image.image_size,
        image.num_hidden_layers,
        image.hidden_size,
        image.num_attention_heads,
        image.patch_size,
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
    )
    quick = text.hidden_act == "quick_gelu"
    return _filled(config, quick, text.max_position_embeddings, state, _transformers_names, model)


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """The state_dict of open_clip's CLIP with these weights.

    Raises:
        ValueError: the text encoder is not the transformer, of which open_clip's CLIP has one.
    """
    _check_text(model)
    return _renamed(model, _open_clip_names(model))


def to_transformers(model: CLIP) -> dict[str, Tensor]:
    """The state_dict of transformers' CLIPModel with these weights.

    Raises:
        ValueError: an encoder is not a transformer; transformers' CLIPModel has no ResNet and no bag of words.
    """
    _check_text(model)
    if not isinstance(model.image_encoder, VisionTransformer):
        raise ValueError(f"model: got a {type(model.image_encoder).__name__}; accepted is a VisionTransformer")
    return _renamed(model, _transformers_names(model))


def _check_text(model: CLIP) -> None:
    if not isinstance(model.text_encoder, TextTransformer):
        raise ValueError(f"model: got a {type(model.text_encoder).__name__}; accepted is a TextTransformer")


Names = dict[str, tuple[str, ...]]  # of one tensor here: of one there, or of three whose rows follow each other


def _filled(
    config: Config, quick_gelu: bool, context: int, state: Mapping[str, Tensor], names: Any, source: nn.Module
) -> CLIP:
    tokens = next(tensor for name, tensor in state.items() if name.endswith("token_embedding.weight"))
    model = create_model(config, len(tokens), context, quick_gelu=quick_gelu, device="meta")
    wanted: Names = names(model)
    theirs = {name for group in wanted.values() for name in group}
    if theirs != set(state):
        raise ValueError(f"model: got other weights than CLIP's, as {sorted(theirs ^ set(state))[:3]}")
    converted = {}
    for name, tensor in model.state_dict().items():
        value = torch.cat([state[part] for part in wanted[name]]) if len(wanted[name]) > 1 else state[wanted[name][0]]
        value = value.T if _is_transposed(name, wanted[name][0]) else value
        converted[name] = value.detach().reshape(tensor.shape).clone(memory_format=torch.contiguous_format)
    model.load_state_dict(converted, assign=True)
    return model.train(source.training)


def _renamed(model: CLIP, names: Names) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.T.contiguous() if _is_transposed(name, names[name][0]) else tensor
        state |= (
            dict(zip(names[name], value.chunk(len(names[name])), strict=True))
            if len(names[name]) > 1
            else {names[name][0]: value}
        )
    return state


def _is_transposed(name: str, theirs: str) -> bool:
    """A projection is a matrix [width, d] here, and there where it is a Linear's weight [d, width]."""
    return name in ("head.w_i", "head.w_t") and theirs.endswith(".weight")


def _rename(name: str, rules: Rules) -> str | None:
    for pattern, theirs in rules:
        if match := re.match(pattern + r"(?=\.|$)", name):
            return match.expand(theirs) + name[match.end() :]
    return None


def _block_names(name: str, rules: Rules, block: Rules) -> str | None:
    """The name there of a weight in a transformer's block here."""
    match = re.fullmatch(r"(.*\.blocks\.\d+)\.(.*)", name)
    if match is None:
        return _rename(name, rules)
    inner = _rename(match[2], block)
    return inner and f"{_rename(match[1], rules)}.{inner}"


def _open_clip_names(model: CLIP) -> Names:
    names: Names = {}
    layers: Any = getattr(model.image_encoder, "layers", ())
    places = [f"layer{stage}.{block}" for stage, blocks in enumerate(layers, 1) for block in range(blocks)]
    for name in model.state_dict():
        parts = name.split(".")
        if name == "head.w_i":
            theirs: str | None = "visual.attnpool.c_proj.weight" if layers else "visual.proj"
        elif parts[1] == "stem":
            theirs = f"visual.{RESNET_STEM[parts[2]]}.{parts[3]}"
        elif parts[1] == "stages":
            theirs = f"visual.{places[int(parts[2])]}.{RESNET_BLOCK['.'.join(parts[3:5])]}.{parts[5]}"
        else:
            theirs = _block_names(name, OPEN_CLIP, OPEN_CLIP_BLOCK)
        assert theirs is not None, name
        names[name] = (theirs,)
    return names


def _transformers_names(model: CLIP) -> Names:
    names: Names = {}
    for name in model.state_dict():
        if match := re.fullmatch(r"(.*\.blocks\.\d+)\.qkv\.(weight|bias)", name):
            block = _rename(match[1], TRANSFORMERS)
            names[name] = tuple(f"{block}.self_attn.{part}_proj.{match[2]}" for part in "qkv")
        else:
            theirs = _block_names(name, TRANSFORMERS, TRANSFORMERS_BLOCK)
            assert theirs is not None, name
            names[name] = (theirs,)
    return names
