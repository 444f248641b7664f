"""The reference CLIP: its encoders, their configurations, zero-shot classification."""

from clipfast.models.clip import (
    CBOW,
    CLIP,
    CONFIGS,
    TEXT_ENCODERS,
    Config,
    ResNet,
    TextTransformer,
    VisionTransformer,
    build_model,
    classify,
    zero_shot_weights,
)

__all__ = [
    "CBOW",
    "CLIP",
    "CONFIGS",
    "TEXT_ENCODERS",
    "Config",
    "ResNet",
    "TextTransformer",
    "VisionTransformer",
    "build_model",
    "classify",
    "zero_shot_weights",
]
