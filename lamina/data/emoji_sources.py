"""Where the emoji come from: packages, the concepts in them, and each style's pictures of these.

Rules:
- A concept is a base emoji of emojibase, without flags (a picture does not tell their names), components
  and variants in skin tone only.
- A style draws a concept if its table of code points says so or, where it has none, if an icon bears the
  concept's label or Unicode name. An icon whose name is another concept's label is that one's.

Next: `lamina/data/emoji.py`, which makes a data set of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lamina.data.registry import Package, read_member
from wire.errors import UserError
from wire.manifest import BlobRef

_LEFT_OUT = ("component", "flags")


def _icons(name: str, version: str, sha256: str, size_bytes: int, license_id: str, credit: str) -> Package:
    return Package(f"@iconify-json/{name}", version, BlobRef(sha256, size_bytes), license_id, credit)


# Most pairs first: the order in which styles come into use.
STYLES = {
    "openmoji": _icons(
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        1264633,
        "CC-BY-SA-4.0",
        "OpenMoji, openmoji.org",
    ),
    "twemoji": _icons(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        1555888,
        "CC-BY-4.0",
        "Twitter and contributors, github.com/jdecked/twemoji",
    ),
    "noto": _icons(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        3102958,
        "Apache-2.0",
        "Google, github.com/googlefonts/noto-emoji",
    ),
    "fluent-emoji-flat": _icons(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        1172438,
        "MIT",
        "Microsoft, github.com/microsoft/fluentui-emoji",
    ),
    "noto-v1": _icons(
        "noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        1587591,
        "Apache-2.0",
        "Google, github.com/googlefonts/noto-emoji",
    ),
    "emojione": _icons(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        687690,
        "CC-BY-4.0",
        "EmojiOne and EmojiTwo, github.com/EmojiTwo/emojitwo",
    ),
    "fxemoji": _icons(
        "fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        1034876,
        "Apache-2.0",
        "Mozilla, github.com/mozilla/fxemoji",
    ),
}
NAMES = Package(
    "emojibase-data",
    "17.0.0",
    BlobRef("d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", 6711091),
    "MIT",
    "Miles Johnson, emojibase.dev",
)


class Concept(msgspec.Struct, frozen=True):
    """hexcode: code points, `1F3C3-200D-2640`. tags: keywords. group: the Unicode group's name."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str

    @property
    def text(self) -> str:
        """The label, then the keywords that it does not hold: `waving hand: bye, cya, greetings`."""
        name = self.label.replace(":", ",")
        known = set(re.findall(r"\w+", name.lower()))
        keywords = [tag for tag in self.tags if not known.issuperset(re.findall(r"\w+", tag.lower()))]
        return f"{name}: {', '.join(keywords)}" if keywords else name


class _Emoji(msgspec.Struct):
    hexcode: str
    label: str
    tags: tuple[str, ...] = ()
    group: int | None = None


class _Groups(msgspec.Struct):
    groups: dict[str, str]


class _Icon(msgspec.Struct):
    body: str
    left: float = 0
    top: float = 0
    width: float | None = None
    height: float | None = None


class _Alias(msgspec.Struct):
    parent: str
    hFlip: bool = False  # noqa: N815 - Iconify's name; no icon of these packages is turned another way


class _Icons(msgspec.Struct):
    icons: dict[str, _Icon]
    aliases: dict[str, _Alias] = {}
    width: float = 16
    height: float = 16


def read_concepts(archive: Path) -> list[Concept]:
    """The concepts of emojibase's archive, in its order."""
    emoji = msgspec.json.decode(read_member(archive, "en/data.json"), type=list[_Emoji])
    groups = msgspec.json.decode(read_member(archive, "meta/groups.json"), type=_Groups).groups
    named = [(one, groups[str(one.group)]) for one in emoji if one.group is not None]
    return [
        Concept(one.hexcode, one.label, one.tags, group) for one, group in named if group not in _LEFT_OUT
    ]


class Style:
    """One drawing style: `names` says which of the concepts it draws, `draw` makes the picture."""

    def __init__(self, archive: Path, concepts: Sequence[Concept]) -> None:
        self._set = msgspec.json.decode(read_member(archive, "icons.json"), type=_Icons)
        by_code = msgspec.json.decode(read_member(archive, "chars.json"), type=dict[str, str])
        self.names = _by_code(by_code, concepts) if by_code else self._by_name(concepts)

    def _by_name(self, concepts: Sequence[Concept]) -> dict[str, str]:
        """Hexcode -> icon, for a style without code points."""
        icons = {_letters(name): name for name in (*self._set.icons, *self._set.aliases)}
        labels = {_letters(concept.label) for concept in concepts}
        names: dict[str, str] = {}
        for concept in concepts:
            label, unicode_name = _letters(concept.label), _letters(_unicode_name(concept.hexcode))
            if label in icons:
                names[concept.hexcode] = icons[label]
            elif unicode_name in icons and unicode_name not in labels:
                names[concept.hexcode] = icons[unicode_name]
        return names

    def draw(self, hexcode: str, size_px: int) -> bytes:
        """The concept as PNG, `size_px` square, on white. Raises `UserError` without the `data` extra."""
        name, mirrored = self.names[hexcode], False
        while name in self._set.aliases:
            mirrored ^= self._set.aliases[name].hFlip
            name = self._set.aliases[name].parent
        return render(self._svg(self._set.icons[name], mirrored), size_px)

    def _svg(self, icon: _Icon, mirrored: bool) -> str:
        width, height = icon.width or self._set.width, icon.height or self._set.height
        side = max(width, height)
        left, top = icon.left - (side - width) / 2, icon.top - (side - height) / 2
        body = icon.body
        if mirrored:
            body = f'<g transform="translate({2 * icon.left + width} 0) scale(-1 1)">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}">{body}</svg>'
        )


def render(svg: str, size_px: int) -> bytes:
    """A square SVG as PNG on white."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("drawing the emoji needs resvg-py", 'pip install "lamina[data]"') from error
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, width=size_px, height=size_px, background="#ffffff", skip_system_fonts=True
        )
    )


def _by_code(by_code: dict[str, str], concepts: Sequence[Concept]) -> dict[str, str]:
    """Hexcode -> icon. The tables leave out the variation selector, as not all writers send it."""
    codes = {concept.hexcode: concept.hexcode.lower().replace("-fe0f", "") for concept in concepts}
    return {hexcode: by_code[code] for hexcode, code in codes.items() if code in by_code}


def _letters(name: str) -> str:
    """A name without what spellings differ in: `Piñata!`, `pinata` and `pi-nata` are one."""
    plain = unicodedata.normalize("NFKD", name.replace("&", " and ")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", plain.lower())


def _unicode_name(hexcode: str) -> str:
    codes = [code for code in hexcode.split("-") if code != "FE0F"]
    return unicodedata.name(chr(int(codes[0], 16)), "") if len(codes) == 1 else ""
