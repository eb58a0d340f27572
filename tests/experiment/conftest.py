"""Puts `tests/`, where the small world of real runs is, on the path."""

from __future__ import annotations

import sys
from pathlib import Path

if (tests := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.insert(0, tests)

from real_run import data

__all__ = ["data"]
