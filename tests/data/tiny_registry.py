"""What is in the tests' registry, and the script that serves it as `npm`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lamina.data.registry import Package

NUM_CONCEPTS = 120
LABELS = [f"thing {place}" for place in range(NUM_CONCEPTS)]
PLACE = {label: place for place, label in enumerate(LABELS)}

# Hands out $ARCHIVES/<archive> for `npm pack NAME@VERSION` and notes the call.
NPM = """#!{python}
import os, pathlib, shutil, sys
archives = pathlib.Path(os.environ["ARCHIVES"])
assert sys.argv[1] == "pack"
name, _, version = sys.argv[2].rpartition("@")
archive = name.removeprefix("@").replace("/", "-") + "-" + version + ".tgz"
with open(archives / "calls", "a") as calls:
    print(sys.argv[2], file=calls)
if not (archives / archive).exists():
    sys.exit("npm error code E404\\nnpm error 404 no such package")
shutil.copy(archives / archive, archive)
"""

Publish = Callable[[str, dict[str, object]], Package]


def calls(archives: Path) -> list[str]:
    path = archives / "calls"
    return path.read_text().split() if path.exists() else []


def icon(place: int, corner: int) -> dict[str, object]:
    """A coloured square: the colour says which concept, the round corner which style."""
    return {
        "body": f'<rect width="8" height="8" rx="{corner}" fill="#{place * 2 + 1:02x}40{255 - place:02x}"/>'
    }
