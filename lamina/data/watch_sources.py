"""Where the watch's recordings come from, and how they are read without running what a pickle may hold.

Rules: the package keeps them as a pickled dictionary. Only the names that numpy arrays consist of are
resolved; a pickle that asks for any other is not read.

Next: `lamina/data/watch.py`, which cuts them into windows.
"""

from __future__ import annotations

import codecs
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lamina.data.registry import Package, read_member
from wire.errors import LocalError
from wire.manifest import BlobRef

RECORDINGS = Package(
    "seglearn",
    "1.2.5",
    BlobRef("ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd", 11320941),
    "BSD-3-Clause",
    "David Burns, github.com/dmbee/seglearn",
    "pypi",
)
_MEMBER = "seglearn/data/watch_dataset.npy"
_NAMES = {
    "numpy ndarray": np.ndarray,
    "numpy dtype": np.dtype,
    # Private, and moved with numpy 2; an array tells where it is here.
    "numpy.core.multiarray _reconstruct": np.empty(0).__reduce__()[0],
    "numpy._core.multiarray _reconstruct": np.empty(0).__reduce__()[0],
    "_codecs encode": codecs.encode,
}


@dataclass(frozen=True)
class Recording:
    """samples: float64 [T, 6] at 50 Hz: acceleration in g by axis, then turning in rad/s by axis."""

    person: str
    arm: str
    exercise: str
    samples: npt.NDArray[np.float64]


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Raises `LocalError` for what is no part of an array."""
        if (found := _NAMES.get(f"{module} {name}")) is None:
            raise LocalError(f"the recordings ask for {module}.{name}, which is no array")
        return found


def read_recordings(archive: Path) -> list[Recording]:
    """All of them, in the package's order."""
    file = io.BytesIO(read_member(archive, _MEMBER))
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    content = _Arrays(file).load().item()
    exercises = content["y_labels"]
    return [
        Recording(f"person-{int(person):02}", "right" if side else "left", str(exercises[int(label)]), one)
        for one, label, person, side in zip(
            content["X"], content["y"], content["subject"], content["side"], strict=True
        )
    ]
