"""The encoder of a series: what is measured at a fixed rate, motion or the MFCC frames of a sound.

Rules: a patch is `patch` steps of all channels, so a token is a moment. A series shorter than `length` is
padded with zeros; where the encoder is `masked`, the mask has one value a token, and a token of nothing but
padding is kept out of everything that follows.

Next: `models/audio.py`, on the same stem; `models/block.py`; `inputs/series.py` reads the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.block import Block
from models.encoder import Encoder, Source, Stem
from wire.errors import UserError
from wire.manifest import TensorSpec

KERNEL = 5  # steps of a convolution


class ConvStem(nn.Module):
    """Two convolutions over time, the second of stride `patch`, then positions; shapes as of `PatchStem`.

    It overfits noise less than patches: steps around a moment count for it wherever they are. A convolution
    over time is one over pictures that are one pixel wide, for which every engine has a gradient.
    """

    def __init__(self, length: int, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.tokens = length // patch
        self.smooth = nn.Conv2d(channels, width, (KERNEL, 1), padding=(KERNEL // 2, 0))
        kernel = max(KERNEL, patch)
        self.embed = nn.Conv2d(
            width, width, (kernel, 1), stride=(patch, 1), padding=((kernel - patch + 1) // 2, 0)
        )
        self.positions = nn.Parameter(torch.empty(self.tokens, width))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, series: Tensor) -> Tensor:
        """The moments in order."""
        smooth = nn.functional.gelu(self.smooth(series.permute(0, 2, 1)[:, :, :, None]))
        embedded: Tensor = self.embed(smooth)
        return embedded.reshape(-1, embedded.shape[1], self.tokens).permute(0, 2, 1) + self.positions


class PatchStem(nn.Module):
    """Patches in time over all channels, linearly embedded, plus learned positions.

    float32 [B, length, channels] -> float32 [B, length / patch, width].
    """

    def __init__(self, length: int, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.tokens = length // patch
        self.embed = nn.Linear(patch * channels, width)
        self.positions = nn.Parameter(torch.empty(self.tokens, width))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, series: Tensor) -> Tensor:
        """The patches in order."""
        embedded: Tensor = self.embed(series.reshape(-1, self.tokens, self.embed.in_features))
        return embedded + self.positions


def series_encoder(
    *,
    length: int,
    channels: int,
    patch: int,
    width: int,
    heads: int,
    blocks: int,
    stem: Stem = "patch",
    masked: bool = True,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> Encoder:
    """A transformer over `length` steps. mean, std: of the values, one or a list with each channel's.

    Raises `UserError` for sizes that do not fit.
    """
    for values in (mean, std):
        if not isinstance(values, int | float) and len(values) != channels:
            raise UserError(f"{len(values)} values for {channels} channels", "give one, or one a channel")
    options = {
        "length": length,
        "channels": channels,
        "patch": patch,
        "mean": _option(mean),
        "std": _option(std),
    }
    return encoder_over_time(
        "series", length, channels, patch, width, heads, blocks, stem, options, masked=masked
    )


def encoder_over_time(
    kind: str,
    length: int,
    channels: int,
    patch: int,
    width: int,
    heads: int,
    blocks: int,
    stem: Stem,
    options: Mapping[str, int | float | str | list[float]],
    *,
    masked: bool = True,
) -> Encoder:
    """A transformer over `length` steps of whatever the reader `kind` makes with these options.

    Raises `UserError` for sizes that do not fit.
    """
    _check_sizes(stem, length, channels, patch, width, heads)
    return Encoder(
        (ConvStem if stem == "conv" else PatchStem)(length, channels, patch, width),
        [Block(width, heads) for _ in range(blocks)],
        Source(
            kind=kind,
            raw=TensorSpec((length, channels), "float32"),
            features=TensorSpec((length // patch, width), "float32"),
            masked=masked,
            options=dict(options),
        ),
    )


def _check_sizes(stem: Stem, length: int, channels: int, patch: int, width: int, heads: int) -> None:
    if stem not in ("patch", "conv"):
        raise UserError(f"there is no stem {stem!r}", "choose patch or conv")
    if length < 1 or channels < 1:
        raise UserError(f"no series has {length} steps of {channels} channels", "choose larger numbers")
    if patch < 1 or length % patch:
        raise UserError(f"patches of {patch} steps do not tile a length of {length}", "choose a divisor")
    if heads < 1 or width % heads:
        raise UserError(f"{heads} heads do not divide a width of {width}", "choose a divisor")


def _option(values: float | Sequence[float]) -> float | list[float]:
    """A number, or numbers, as a reader's option."""
    return float(values) if isinstance(values, int | float) else [float(value) for value in values]
