"""The proximal step that all engines share: parameters are drawn towards the offered ones.

Rules: in place, for an engine's graphs read these very arrays. A step leaves an optimizer's moments alone.

Next: docs/adr/0012-a-proximal-step-beside-the-graph.md, why it is not in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from wire.tensors import Array


def draw(values: Iterable[tuple[str, Array]], offered: Mapping[str, Array], rate: float) -> None:
    """Each value w becomes (w + rate v) / (1 + rate), where v is the one that was offered.

    That is the proximal operator of mu/2 |w - v|^2 for a step of length lr, with rate = lr mu (Parikh and
    Boyd, "Proximal Algorithms", 2014). values: torch name, float32 array. rate: 0 or more.
    """
    share = np.float32(rate / (1 + rate))
    for name, value in values:
        value += share * (offered[name] - value)
