"""Text: a cell is the text itself, an example is its first `length` tokens, int32, -1 where it is shorter.

Rules: the tokenizer is a sentencepiece model that travels in the bundle, so every device cuts a text into
the same tokens. An example has at least one token: a mask without any would make a mean of nothing.

Options: `length`, tokens of an example; `tokenizer`, the bundle's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from inputs.readers import AnyArray, BundleFile, Unreadable, check_inputs
from wire.errors import Malformed
from wire.manifest import Modality

_NO_TOKEN = -1


class TextReader:
    """Reads text (`inputs.readers.Reader`) into two inputs of the length T = `length`.

    The first, int64 `[B, T]`: token ids, 0 where the text is shorter. The second, if declared, float32
    `[B, T]`: 1 at a token, 0 elsewhere.
    """

    augments = False

    def __init__(self, modality: Modality, file: BundleFile) -> None:
        length, tokenizer = modality.options.get("length"), modality.options.get("tokenizer")
        if not isinstance(length, int) or length < 1:
            raise Malformed(f"option length of a text is {length!r}, not a number of tokens")
        if not isinstance(tokenizer, str):
            raise Malformed(f"option tokenizer of a text is {tokenizer!r}, not a file name")
        self._names = tuple(modality.inputs)
        self.shape: tuple[int, ...] = (length,)
        self.dtype: npt.DTypeLike = np.int32
        self.files: tuple[Path, ...] = (file(tokenizer),)
        made = zip(self._names, (np.int64, np.float32), strict=False)
        check_inputs(modality, {name: (self.shape, dtype) for name, dtype in made})
        try:
            self._tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(self.files[0]))
        except (OSError, RuntimeError) as error:
            raise Malformed(f"{tokenizer} is not a sentencepiece model") from error

    def source(self, _folder: Path, _cell: str) -> None:
        """No file: the text is in the table."""

    def encode(self, _folder: Path, cell: str) -> AnyArray:
        """Token ids, int32 `[T]`. Raises `Unreadable` for a text without any token."""
        ids = self._tokenizer.encode(cell)[: self.shape[0]]
        if not ids:
            raise Unreadable(f"the text {cell!r} has no tokens", "write a text, or remove the row")
        row = np.full(self.shape, _NO_TOKEN, np.int32)
        row[: len(ids)] = ids
        return row

    def view(self, encoded: AnyArray, _seed: Sequence[int]) -> AnyArray:
        """A text has no other views."""
        return encoded

    def decode(self, encoded: AnyArray) -> dict[str, AnyArray]:
        """Ids and mask."""
        present = encoded != _NO_TOKEN
        arrays = (np.where(present, encoded, 0).astype(np.int64), present.astype(np.float32))
        return dict(zip(self._names, arrays, strict=False))
