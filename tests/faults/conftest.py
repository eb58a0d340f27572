"""Runs behind bad links and with killed programs. The fixtures are `tests/real_run.py`'s."""

from __future__ import annotations

import sys
from pathlib import Path

if (tests := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.insert(0, tests)

from real_run import bundle, data, programs, real_broker

__all__ = ["bundle", "data", "programs", "real_broker"]
