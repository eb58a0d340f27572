"""Images: a cell is a path in the folder, an example is uint8 `[3, size, size]`, RGB.

Rules: a photo is turned as its camera says; alpha lies on white; the picture is scaled to fit a square and
padded with white, so nothing is cut off or distorted. Pillow's limit on decompression bombs stays on.

Options: `size`, pixels of a side; `mean` and `std`, for values in 0 to 1, a number or one a channel.
Next: `inputs/views.py`, its augmentations.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from inputs.readers import AnyArray, BundleFile, Unreadable, check_inputs, in_folder
from inputs.views import view
from wire.errors import Malformed
from wire.manifest import Modality

_WHITE = (255, 255, 255)


class ImageReader:
    """Reads images (`inputs.readers.Reader`) into one input: float32 `[B, 3, size, size]`, normalised."""

    augments = True

    def __init__(self, modality: Modality, _file: BundleFile) -> None:
        size = modality.options.get("size")
        if not isinstance(size, int) or size < 1:
            raise Malformed(f"option size of an image is {size!r}, not a number of pixels")
        self._size = size
        self._name = next(iter(modality.inputs), "image")
        std = _per_channel(modality, "std", 1.0)
        if not std.all():
            raise Malformed("option std of an image is zero")
        self._scale = 1 / (255 * std)
        self._shift = -_per_channel(modality, "mean", 0.0) / std
        self.shape: tuple[int, ...] = (3, size, size)
        self.dtype: npt.DTypeLike = np.uint8
        self.files: tuple[Path, ...] = ()
        check_inputs(modality, {self._name: (self.shape, np.float32)})

    def source(self, folder: Path, cell: str) -> Path:
        """The image's path."""
        return in_folder(folder, cell)

    def encode(self, folder: Path, cell: str) -> AnyArray:
        """The picture as uint8 `[3, size, size]`. Raises `Unreadable`: missing, broken or too large."""
        path = self.source(folder, cell)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(path)
            with image:
                image.draft("RGB", (self._size, self._size))  # a JPEG decodes small, in little memory
                square = ImageOps.pad(_on_white(image), (self._size, self._size), color=_WHITE)
        except FileNotFoundError:
            raise Unreadable(f"image {cell} is missing", "copy it there, or remove the row") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise Unreadable(f"image {cell} has too many pixels", "scale it down") from None
        except Exception as error:  # broken files make Pillow's plugins raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Unreadable(
                f"image {cell} cannot be read: {reason}", "replace it, or remove the row"
            ) from error
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    def view(self, encoded: AnyArray, seed: Sequence[int]) -> AnyArray:
        """As `inputs.views` says."""
        return view(encoded, seed)

    def decode(self, encoded: AnyArray) -> dict[str, AnyArray]:
        """`(value / 255 - mean) / std`, float32 `[B, 3, size, size]`."""
        array = encoded.astype(np.float32)
        array *= self._scale
        array += self._shift
        return {self._name: array}


def _per_channel(modality: Modality, option: str, default: float) -> npt.NDArray[np.float32]:
    """A number or a list of three as float32 `[3, 1, 1]`."""
    value = modality.options.get(option, default)
    try:
        return np.broadcast_to(np.asarray(value, np.float32), (3,)).reshape(3, 1, 1)
    except ValueError as error:
        raise Malformed(f"option {option} of an image is {value!r}") from error


def _on_white(image: Image.Image) -> Image.Image:
    """Upright RGB, perhaps the same object: a large picture takes 4 bytes a pixel so, with alpha 13.

    16-bit grey is scaled to 8 bits, which `convert` alone would clip to white.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "RGB":
        return image
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer).convert("RGB")
