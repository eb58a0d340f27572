"""A pre-norm transformer block from plain operations, the unit that a stage attaches and trains.

Rules: every operation has a gradient in ONNX Runtime Training, so attention is written out. The key
projection has no bias: softmax cancels it, its gradient would be rounding noise that Adam turns into
full steps.

Vaswani et al., arXiv 1706.03762; pre-norm: Xiong et al., arXiv 2002.04745.
Next: `models/encoder.py`, which stacks blocks on a stem.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MASKED = -1e9  # added to a padding key's score; exp of it is exactly 0


class Attention(nn.Module):
    """Multi-head self-attention, float32 [B, T, width] -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: float32 [B, T], 1 for a key to attend to, 0 for padding."""
        tokens, width = x.shape[1], x.shape[2]
        split = (-1, tokens, self.heads, width // self.heads)
        query = self.query(x).reshape(split).permute(0, 2, 1, 3) * self.scale
        key = self.key(x).reshape(split).permute(0, 2, 3, 1)
        value = self.value(x).reshape(split).permute(0, 2, 1, 3)
        scores = query @ key
        if mask is not None:
            scores = scores + ((1.0 - mask) * MASKED)[:, None, None, :]
        mixed = torch.softmax(scores, dim=-1) @ value
        out: Tensor = self.out(mixed.permute(0, 2, 1, 3).reshape((-1, tokens, width)))
        return out


class Block(nn.Module):
    """Attention, then a GELU layer `expansion` times as wide; float32 [B, T, width] -> the same shape."""

    def __init__(self, width: int, heads: int, expansion: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` as in `Attention`."""
        x = x + self.attention(self.norm1(x), mask)
        down: Tensor = self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x + down


def initialise(module: nn.Module) -> None:
    """In place: weights keep the variance of their input (LeCun's), biases are zero.

    The 0.02 of BERT and ViT fits widths near 768; at 128 it makes the first steps four times too small.
    All blocks of a list but the first start as the identity: attaching one changes nothing at first.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=part.weight[0].numel() ** -0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=part.embedding_dim**-0.5)
    for blocks in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
        for block in list(blocks)[1:]:
            if isinstance(block, Block):
                nn.init.zeros_(block.attention.out.weight)
                nn.init.zeros_(block.down.weight)
