"""The image encoder: a ViT (Dosovitskiy et al., arXiv 2010.11929) with mean pooling in the head.

Next: `models/block.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.block import Block
from models.encoder import Encoder, Source
from wire.errors import UserError
from wire.manifest import TensorSpec


class PatchStem(nn.Module):
    """Square patches, linearly embedded, plus learned positions.

    float32 [B, 3, size, size] -> float32 [B, (size / patch)^2, width].
    """

    def __init__(self, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.grid = size // patch
        self.embed = nn.Linear(3 * patch * patch, width)
        self.positions = nn.Parameter(torch.empty(self.grid**2, width))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        """The patches row by row."""
        grid, patch = self.grid, self.patch
        patches = image.reshape(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        embedded: Tensor = self.embed(patches.reshape(-1, grid * grid, 3 * patch * patch))
        return embedded + self.positions


def image_encoder(*, size: int, patch: int, width: int, heads: int, blocks: int) -> Encoder:
    """A ViT for RGB images of `size` x `size` pixels. Raises `UserError` for sizes that do not divide."""
    if patch < 1 or size % patch:
        raise UserError(f"patches of {patch} pixels do not tile an image of {size}", "choose a divisor")
    if heads < 1 or width % heads:
        raise UserError(f"{heads} heads do not divide a width of {width}", "choose a divisor")
    return Encoder(
        PatchStem(size, patch, width),
        [Block(width, heads) for _ in range(blocks)],
        Source(
            kind="image",
            raw=TensorSpec((3, size, size), "float32"),
            features=TensorSpec(((size // patch) ** 2, width), "float32"),
            options={"size": size, "mean": 0.5, "std": 0.5},  # pixels from -1 to 1
        ),
    )
