"""Real processes on a real broker. The fixtures are `tests/real_run.py`'s, which the fault suite shares."""

from __future__ import annotations

import sys
from pathlib import Path

if (tests := str(Path(__file__).parents[1])) not in sys.path:
    sys.path.insert(0, tests)

from real_run import broker, bundle, data, programs, real_broker

__all__ = ["broker", "bundle", "data", "programs", "real_broker"]
