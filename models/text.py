"""The text encoder: token and position embeddings, then pre-norm blocks that ignore padding.

Next: `models/block.py`; `export/tokenizer.py` makes the ids.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.block import Block
from models.encoder import Encoder, Source
from wire.errors import UserError
from wire.manifest import TensorSpec

TOKENIZER = "tokenizer.model"  # the bundle's sentencepiece file


class TokenStem(nn.Module):
    """int64 [B, length], ids below `vocabulary` -> float32 [B, length, width]."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Padding is embedded like any token; the mask keeps it out of everything that follows."""
        embedded: Tensor = self.embed(text)
        return embedded + self.positions


def text_encoder(*, vocabulary: int, length: int, width: int, heads: int, blocks: int) -> Encoder:
    """A transformer over at most `length` tokens. Raises `UserError` for sizes that do not fit."""
    if heads < 1 or width % heads:
        raise UserError(f"{heads} heads do not divide a width of {width}", "choose a divisor")
    if vocabulary < 2 or length < 1:
        raise UserError(f"no text fits {length} tokens of {vocabulary}", "choose larger numbers")
    return Encoder(
        TokenStem(vocabulary, length, width),
        [Block(width, heads) for _ in range(blocks)],
        Source(
            kind="text",
            raw=TensorSpec((length,), "int64"),
            features=TensorSpec((length, width), "float32"),
            masked=True,
            options={"tokenizer": TOKENIZER, "vocabulary": vocabulary, "length": length},
        ),
    )
