"""Views: the same for the same seed, a little off the picture, white where they were white."""

from __future__ import annotations

import numpy as np
import pytest
from example_folder import Open
from PIL import Image, ImageDraw

from inputs.views import SHIFT, STRETCH, TINT, ZOOM, Picture, view

SIZE = 64


@pytest.fixture
def picture() -> Picture:
    """A red square, 32 wide, in the middle of white."""
    image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    ImageDraw.Draw(image).rectangle((16, 16, 47, 47), (200, 40, 60))
    return np.asarray(image).transpose(2, 0, 1)


def test_a_seed_gives_one_view_and_another_seed_another(picture: Picture) -> None:
    before = picture.copy()
    views = {seed: view(picture, seed) for seed in [(0, 0), (1, 0), (0, 1), (2, 7)]}
    for seed, one in views.items():
        assert one.shape == picture.shape
        assert one.dtype == np.uint8
        assert np.array_equal(one, view(picture, seed))
    assert len({one.tobytes() for one in views.values()}) == len(views)
    assert np.array_equal(picture, before)


def test_a_view_is_the_same_picture_on_every_machine(picture: Picture) -> None:
    """Up to rounding: means of the green channel over 8 x 8 pixels, as they were written down once."""
    green = view(picture, (3, 5))[1].reshape(8, 8, 8, 8).mean(axis=(1, 3))
    expected = np.full((8, 8), 255.0)
    expected[2:6, 2:7] = [
        [219.7, 145.6, 145.6, 145.6, 217.2],
        [194.0, 66.0, 66.0, 66.0, 189.8],
        [194.0, 66.0, 66.0, 66.0, 189.8],
        [208.2, 110.0, 110.0, 110.0, 204.9],
    ]
    np.testing.assert_allclose(green, expected, atol=2)


def test_a_view_is_moved_scaled_and_tinted_within_bounds(picture: Picture) -> None:
    sides, middles, colours = [], [], []
    for seed in range(200):
        one = view(picture, (seed,)).astype(int)
        assert (one[:, :1, :1] == 255).all()  # what comes in from outside is white
        rows, columns = (np.flatnonzero((one[1] < 150).any(axis=axis)) for axis in (1, 0))
        sides.append((len(rows), len(columns)))
        middles.append((rows.mean(), columns.mean()))
        colours.append(one[:, int(rows.mean()), int(columns.mean())])
    largest = (1 + ZOOM) * (1 + STRETCH)
    assert np.min(sides) >= 32 / largest - 1
    assert np.max(sides) <= 32 * largest + 1
    assert np.ptp(sides) > 8
    assert np.abs(np.array(middles) - 31.5).max() <= SHIFT * SIZE + 1
    assert np.ptp(middles, axis=0).min() > SHIFT * SIZE
    ink = (255 - np.array(colours)) / (255 - np.array([200, 40, 60]))
    assert ink.max() <= 1 + TINT + 0.02
    assert ink.min() >= 1 - TINT - 0.02
    assert np.ptp(ink[:, 1:], axis=0).min() > TINT


def test_nothing_is_mirrored(picture: Picture) -> None:
    half = picture.copy()
    half[:, :, SIZE // 2 :] = 255
    for seed in range(50):
        one = view(half, (seed,))
        assert one[1, :, : SIZE // 2 - 8].min() < 150
        assert one[1, :, SIZE // 2 + 8 :].min() == 255


def test_a_data_set_gives_the_views_asked_for_of_images_only(open_dataset: Open) -> None:
    dataset = open_dataset()
    assert dataset.augmented == {"image"}
    plain = dataset.batch([3, 0, 3])
    views = dataset.batch([3, 0, 3], views=np.array([1, 0, 4]))
    assert views.keys() == plain.keys()
    assert all(np.array_equal(views[name], plain[name]) for name in views.keys() - {"image"})
    one, _, other = views["image"]
    assert one.dtype == np.float32
    assert not np.array_equal(one, plain["image"][0])
    assert not np.array_equal(one, other)
    for place, (example, number) in enumerate([(3, 1), (0, 0), (3, 4)]):
        alone = dataset.batch([example], {"image"}, np.array([number]))["image"][0]
        assert np.array_equal(views["image"][place], alone)
    assert np.array_equal(dataset.batch([3, 0, 3])["image"], plain["image"])
