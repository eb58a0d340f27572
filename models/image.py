"""The image encoder: a ViT (Dosovitskiy et al., arXiv 2010.11929) with mean pooling in the head.

Next: `models/block.py`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from models.block import Block
from models.encoder import Encoder, Source, Stem
from wire.errors import UserError
from wire.manifest import TensorSpec


class ConvStem(nn.Module):
    """3 x 3 convolutions of stride 2 down to the patch grid, then positions; shapes as of `PatchStem`.

    It learns faster than patches from few images: Xiao et al., arXiv 2106.14881. `patch`: a power of 2.
    """

    def __init__(self, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.tokens = (size // patch) ** 2
        halvings = patch.bit_length() - 1
        widths = [3, *(max(8, width >> (halvings - step)) for step in range(1, halvings)), width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)
            for before, after in pairwise(widths)
        )
        self.embed = nn.Conv2d(width, width, kernel_size=1)
        self.positions = nn.Parameter(torch.empty(self.tokens, width))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        """The grid row by row."""
        for convolution in self.convolutions:
            image = nn.functional.gelu(convolution(image))
        grid: Tensor = self.embed(image)
        return grid.reshape(-1, grid.shape[1], self.tokens).permute(0, 2, 1) + self.positions


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


def image_encoder(
    *,
    size: int,
    patch: int,
    width: int,
    heads: int,
    blocks: int,
    stem: Stem = "patch",
    mean: float = 0.5,
    std: float = 0.5,
) -> Encoder:
    """A ViT for RGB images of `size` x `size` pixels. Raises `UserError` for sizes that do not divide.

    mean, std: of values from 0 to 1; as they are, pixels go from -1 to 1.
    """
    if stem not in ("patch", "conv"):
        raise UserError(f"there is no stem {stem!r}", "choose patch or conv")
    if patch < 1 or size % patch:
        raise UserError(f"patches of {patch} pixels do not tile an image of {size}", "choose a divisor")
    if stem == "conv" and (patch < 2 or patch & (patch - 1)):
        raise UserError(
            f"a conv stem halves the image, which never gives patches of {patch}", "choose 4 or 8"
        )
    if heads < 1 or width % heads:
        raise UserError(f"{heads} heads do not divide a width of {width}", "choose a divisor")
    return Encoder(
        ConvStem(size, patch, width) if stem == "conv" else PatchStem(size, patch, width),
        [Block(width, heads) for _ in range(blocks)],
        Source(
            kind="image",
            raw=TensorSpec((3, size, size), "float32"),
            features=TensorSpec(((size // patch) ** 2, width), "float32"),
            options={"size": size, "mean": mean, "std": std},
        ),
    )
