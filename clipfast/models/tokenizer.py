"""CLIP's byte-pair encoding: the merges that open_clip ships, run by the package tokenizers."""

from __future__ import annotations

import gzip
import html
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.models.clip import CONTEXT_LENGTH, VOCAB_SIZE

START, END = VOCAB_SIZE - 2, VOCAB_SIZE - 1
# A word's beginning or a contraction, a digit, or other signs; spaces are left out.
WORDS = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class BPETokenizer:
    """The tokenizer of the paper's models: ids equal to those of open_clip's, in the compiled code of tokenizers.

    Args:
        context_length: ids in a row.

    Raises:
        ImportError: tokenizers or open_clip, which ships the merges, is missing: `pip install "clipfast[open-clip]"`.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        if context_length < 2:
            raise ValueError(f"context_length: got {context_length}; accepted is a number from 2")
        self._tokenizers = tokenizers = _require("tokenizers")
        self._fix_text = _require("ftfy").fix_text
        byte_signs = _byte_signs()
        merges = [tuple(line.split()) for line in _merges()[1 : VOCAB_SIZE - 2 * 256 - 2 + 1]]
        vocabulary = [*byte_signs, *(sign + "</w>" for sign in byte_signs), *map("".join, merges)]
        bpe = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab={token: index for index, token in enumerate(vocabulary)},
                merges=merges,
                end_of_word_suffix="</w>",
            )
        )
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.add_special_tokens(["<start_of_text>", "<end_of_text>"])
        self._bpe, self.context_length = bpe, context_length

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without those of start and end."""
        clean = html.unescape(html.unescape(self._fix_text(text))).strip()
        return list(self._bpe.encode(" ".join(clean.split()).lower(), add_special_tokens=False).ids)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:  # [b, context_length]
        """Token ids, filled up with 0; a text that is too long is cut before its end token."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            ids = [START, *self.encode(text)[: self.context_length - 2], END]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def to_json(self) -> str:
        """A tokenizer of the package tokenizers with the same ids, but for texts that ftfy repairs and HTML's entities.

        It puts START and END around a text, cuts it to context_length and fills up to the longest with 0.
        """
        bpe = self._tokenizers.Tokenizer.from_str(self._bpe.to_str())
        normalizers = self._tokenizers.normalizers
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Replace(self._tokenizers.Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
        )
        bpe.post_processor = self._tokenizers.processors.TemplateProcessing(
            single="<start_of_text> $A <end_of_text>",
            special_tokens=[("<start_of_text>", START), ("<end_of_text>", END)],
        )
        bpe.enable_truncation(self.context_length)
        bpe.enable_padding(pad_id=0, pad_token="!")
        return str(bpe.to_str())


def _require(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f'the package {module} is missing: pip install "clipfast[open-clip]"') from error


def _merges() -> list[str]:
    spec = find_spec("open_clip")  # without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('the package open_clip is missing: pip install "clipfast[open-clip]"')
    with gzip.open(
        Path(spec.submodule_search_locations[0], "bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8"
    ) as f:
        return f.read().split("\n")


def _byte_signs() -> list[str]:
    """A visible character for each byte, in the order of the vocabulary: bytes that are visible ones stand first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + place) for place in range(len(hidden))]
