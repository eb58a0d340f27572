"""Puts `tests/` and `tests/edge_client/`, where the small models and worlds are, on the path."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parents[1], Path(__file__).parents[1] / "edge_client"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
