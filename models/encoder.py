"""One encoder per modality: a stem and a list of equal-width blocks, which stages cut between blocks.

Rules: a stem turns raw data into float32 [B, T, D], a block keeps that shape. Both may be any module; a
block is called with the features and the modality's mask (or None), which no block changes. The width
and number of tokens are fixed, only B varies.

Next: `models/image.py` and `models/text.py`, the encoders; `models/heads.py`, what sits on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from wire.errors import UserError
from wire.manifest import Modality, TensorSpec

Stem = Literal["patch", "conv"]
"""What most encoders have a choice of: patches, or convolutions, which learn faster from few examples."""


class Section(nn.Module):
    """A run of an encoder: the stem (None where features come in) and some of the blocks."""

    def __init__(self, stem: nn.Module | None, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Raw data, or features float32 [B, T, D] without a stem -> features float32 [B, T, D]."""
        if self.stem is not None:
            x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


@dataclass(frozen=True)
class Source:
    """What an encoder reads, one example at a time.

    kind: the reader in `inputs/`. raw: what the stem is fed. features: what a block is fed.
    masked: whether a float32 [T] key mask comes with it. options: the reader's settings.
    """

    kind: str
    raw: TensorSpec
    features: TensorSpec
    masked: bool = False
    options: dict[str, int | float | str | list[float]] = field(default_factory=dict)


class Encoder(Section):
    """A whole encoder. Raises `UserError` where there is no block to train."""

    def __init__(self, stem: nn.Module, blocks: Iterable[nn.Module], source: Source) -> None:
        super().__init__(stem, blocks)
        if not len(self.blocks):
            raise UserError(f"an encoder of {source.kind} without blocks", "give each encoder at least one")
        self.source = source

    def section(self, start: int, end: int, *, stem: bool) -> Section:
        """Blocks `start` to `end` (exclusive), sharing this encoder's parameters."""
        return Section(self.stem if stem else None, list(self.blocks)[start:end])

    def modality(self, name: str) -> Modality:
        """How a device makes this encoder's inputs: `<name>`, and `<name>_mask` where it has one."""
        inputs = {name: self.source.raw}
        if self.source.masked:
            inputs[f"{name}_mask"] = TensorSpec((self.source.features.shape[0],), "float32")
        return Modality(self.source.kind, inputs, dict(self.source.options))
