"""How a style's icons are matched and drawn."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from tiny_registry import Publish

from lamina.data.emoji_sources import NAMES, STYLES, Concept, Style
from lamina.data.registry import Package, fetch

CONCEPTS = [
    Concept("1F47D", "alien", (), "faces"),
    Concept("1F47E", "alien monster", (), "faces"),
    Concept("1FA85", "piñata", (), "things"),
    Concept("2764-FE0F", "red heart", (), "things"),
    Concept("1F449", "pointing right", (), "hands"),
]
LEFT_HALF = '<rect width="4" height="8" fill="#000"/>'


def make(publish: Publish, icons: dict[str, object], chars: dict[str, str], **more: object) -> Style:
    files = {"icons.json": {"icons": icons, "width": 8, "height": 8, **more}, "chars.json": chars}
    package = publish("style", files)
    return Style(fetch([package], lambda *_: None)["style"], CONCEPTS)


def darkness(style: Style, hexcode: str) -> list[list[bool]]:
    with Image.open(io.BytesIO(style.draw(hexcode, 8))) as image:
        grey = image.convert("L")
    return [[grey.getpixel((x, y)) < 128 for x in range(8)] for y in range(8)]  # type: ignore[operator]


def test_code_points_without_the_variation_selector(publish: Publish) -> None:
    style = make(publish, {"x": {"body": LEFT_HALF}}, {"2764": "x"})
    assert style.names == {"2764-FE0F": "x"}


def test_labels_in_any_spelling_then_unicode_names(publish: Publish) -> None:
    icons = {name: {"body": LEFT_HALF} for name in ("pinata", "extraterrestrialalien", "alien-monster")}
    style = make(publish, icons, {})
    assert style.names == {
        "1F47D": "extraterrestrialalien",
        "1F47E": "alien-monster",
        "1FA85": "pinata",
    }


def test_a_unicode_name_that_is_anothers_label_is_not_taken(publish: Publish) -> None:
    concepts = [Concept("1F47D", "alien", (), "a"), Concept("1F600", "extraterrestrial alien", (), "a")]
    files = {"icons.json": {"icons": {"extraterrestrial-alien": {"body": ""}}}, "chars.json": {}}
    package = publish("other", files)
    style = Style(fetch([package], lambda *_: None)["other"], concepts)
    assert style.names == {"1F600": "extraterrestrial-alien"}


def test_a_mirrored_alias(publish: Publish) -> None:
    aliases = {"right": {"parent": "middle", "hFlip": True}, "middle": {"parent": "left"}}
    style = make(
        publish, {"left": {"body": LEFT_HALF}}, {"1f449": "right", "2764": "left"}, aliases=aliases
    )
    assert darkness(style, "2764-FE0F") == [[True] * 4 + [False] * 4] * 8
    assert darkness(style, "1F449") == [[False] * 4 + [True] * 4] * 8


def test_an_icon_that_is_no_square_is_centred(publish: Publish) -> None:
    tall = {"body": LEFT_HALF, "width": 4}
    drawn = darkness(make(publish, {"tall": tall}, {"2764": "tall"}), "2764-FE0F")
    assert drawn == [[False] * 2 + [True] * 4 + [False] * 2] * 8


@pytest.mark.parametrize("package", [*STYLES.values(), NAMES], ids=str)
def test_every_source_names_its_license(package: Package) -> None:
    assert package.license in {"CC-BY-SA-4.0", "CC-BY-4.0", "Apache-2.0", "MIT"}
    assert package.credit
