"""Puts `tests/`, where `small_models` is, on the path of the tests in this folder."""

from __future__ import annotations

import sys
from pathlib import Path

if (tests := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.insert(0, tests)
