"""Pictures of every sort become upright RGB squares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from inputs.image import ImageReader
from wire.manifest import Modality, TensorSpec

SIZE = 16


def encode(
    image: Image.Image, folder: Path, name: str = "a.png", **options: object
) -> npt.NDArray[np.uint8]:
    image.save(folder / name, **options)  # type: ignore[arg-type]
    modality = Modality("image", {"image": TensorSpec((3, SIZE, SIZE), "float32")}, {"size": SIZE})
    encoded = ImageReader(modality, Path).encode(folder, name)
    assert encoded.shape == (3, SIZE, SIZE)
    assert encoded.dtype == np.uint8
    return encoded


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 200, 30), (10, 200, 30)),
        ("RGBA", (0, 0, 255, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 255, 51), (204, 204, 255)),
        ("LA", (0, 51), (204, 204, 204)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 77 * 256, (77, 77, 77)),
    ],
)
def test_modes(tmp_path: Path, mode: str, colour: object, expected: tuple[int, ...]) -> None:
    encoded = encode(Image.new(mode, (SIZE, SIZE), colour), tmp_path)  # type: ignore[arg-type]
    assert np.abs(encoded.astype(int) - np.array(expected).reshape(3, 1, 1)).max() <= 1


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert encode(image, tmp_path)[:, 0, 0].tolist() == [0, 0, 255]
    assert encode(image, tmp_path, transparency=1)[:, 0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    encoded = encode(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), tmp_path, "a.jpg")
    assert encoded[0].min() > 200
    assert encoded[1:].max() < 60


def test_a_wide_picture_is_padded_with_white_not_cut(tmp_path: Path) -> None:
    encoded = encode(Image.new("RGB", (4 * SIZE, 2 * SIZE), (0, 0, 0)), tmp_path)
    quarter = SIZE // 4
    assert (encoded[:, :quarter] == 255).all()
    assert (encoded[:, -quarter:] == 255).all()
    assert not encoded[:, quarter:-quarter].any()


def test_a_photo_is_turned_as_the_camera_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (SIZE, SIZE), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, SIZE, SIZE // 2))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise
    turned = encode(image, tmp_path, exif=exif)
    assert turned[:, :, SIZE // 2 :].min() == 255
    assert turned[:, :, : SIZE // 2].max() == 0


@pytest.mark.parametrize(("mode", "bytes_each"), [("RGB", 4), ("RGBA", 12), ("P", 13)])
def test_a_large_picture_takes_a_few_bytes_a_pixel(tmp_path: Path, mode: str, bytes_each: int) -> None:
    """In a process of its own, whose peak is this picture's."""
    num_pixels = 4000 * 3000
    Image.new(mode, (4000, 3000)).save(tmp_path / "a.png")
    script = (
        "import sys; from pathlib import Path; from inputs.image import ImageReader\n"
        "from edge_client.device import peak_rss_bytes as peak\n"
        "from wire.manifest import Modality, TensorSpec\n"
        "modality = Modality('image', {'image': TensorSpec((3, 16, 16), 'float32')}, {'size': 16})\n"
        "reader, folder = ImageReader(modality, Path), Path(sys.argv[1])\n"
        "reader.encode(folder, 'small.png'); before = peak(); reader.encode(folder, 'a.png')\n"
        "print(peak() - before)"
    )
    Image.new(mode, (16, 16)).save(tmp_path / "small.png")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < (bytes_each + 1) * num_pixels


def test_a_large_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("RGB", (640, 640), (200, 40, 40))
    encoded = encode(image, tmp_path, "a.jpg", quality=95)
    assert np.abs(encoded.astype(int) - np.array([200, 40, 40]).reshape(3, 1, 1)).max() <= 4
