"""The reference CLIP: the paper's encoders by name, weights from other packages, tokens, zero-shot classification."""

from clipfast.models.clip import CLIP, CONFIGS, TEXT_ENCODERS, Config, build_model, create_model
from clipfast.models.convert import from_open_clip, from_transformers, to_open_clip, to_transformers
from clipfast.models.evaluation import caption_retrieval, linear_probe
from clipfast.models.image import ResNet, VisionTransformer
from clipfast.models.text import CBOW, TextTransformer
from clipfast.models.tokenizer import BPETokenizer
from clipfast.models.zero_shot import classify, zero_shot_weights

__all__ = [
    "CBOW",
    "CLIP",
    "CONFIGS",
    "TEXT_ENCODERS",
    "BPETokenizer",
    "Config",
    "ResNet",
    "TextTransformer",
    "VisionTransformer",
    "build_model",
    "caption_retrieval",
    "classify",
    "create_model",
    "from_open_clip",
    "from_transformers",
    "linear_probe",
    "to_open_clip",
    "to_transformers",
    "zero_shot_weights",
]
