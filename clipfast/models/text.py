"""CLIP's text encoders in plain PyTorch (Radford et al. 2021, arXiv:2103.00020, section 2.4): transformer and CBOW.

Token ids follow the paper's code: 0 pads, and the end-of-text token has the largest id of the vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from clipfast.models.transformer import check_divides, check_positive, transformer

PAD = 0


class TextTransformer(nn.Module):
    """A causal pre-norm transformer; a text's features are those of its end-of-text token.

    Args:
        vocab_size: number of token ids; the largest is the end-of-text token.
        context_length: most tokens in a text.
        width: channels of a token.
        layers: transformer blocks.
        heads: attention heads, a divisor of width.
        dropout: of the token embeddings and of each residual branch.
        quick_gelu: the activation of OpenAI's weights in place of GELU.

    Raises:
        ValueError: a size is not positive, or heads does not divide width.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, context_length=context_length, layers=layers)
        check_divides(width, heads)
        self.output_dim = width
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = transformer(width, layers, heads, causal=True, dropout=dropout, quick_gelu=quick_gelu)
        self.norm_post = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def hidden(self, tokens: Tensor) -> Tensor:  # [b, s] -> [b, s, width], s <= context_length
        """Features of every token; those of token i depend on tokens up to i."""
        x = self.dropout(self.tokens(tokens) + self.positions[: tokens.shape[1]])
        return cast(Tensor, self.norm_post(self.blocks(x)))

    def forward(self, tokens: Tensor) -> Tensor:  # [b, s] -> [b, width]
        end = tokens.argmax(dim=-1)
        return self.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), end]


class CBOW(nn.Module):
    """A bag of words: the mean of the token embeddings without padding, then a residual MLP.

    Args:
        vocab_size: number of token ids, 0 pads.
        width: channels of a token.
        dropout: of whole token embeddings' channels and of the MLP.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, vocab_size: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, width=width)
        self.output_dim = width
        self.tokens = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.norm_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm_2 = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # [b, s] -> [b, width]
        present = (tokens != PAD).unsqueeze(-1)  # [b, s, 1]
        mean = (self.tokens(tokens) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        x = self.dropout(self.norm_1(mean))
        return cast(Tensor, self.norm_2(x + self.dropout(self.mlp(x))))
