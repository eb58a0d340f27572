"""The device a client runs on: its folder, its settings, what it has used.

Rules: a folder belongs to one client process at a time. Everything in it may be deleted while no client
runs; it is then fetched and computed again.

    FOLDER/blobs     the bundle's files and parameters, by hash
    FOLDER/inputs    the examples, read once
    FOLDER/features  what the frozen prefix makes of them
    FOLDER/training  how far the training of an offer has come
    FOLDER/pending   the last update and its report

Next: `edge_client/session.py`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from wire.files import sweep
from wire.lock import locked
from wire.signature import Owner
from wire.store import Store

_M_ARENA_MAX = -8  # of glibc's malloc.h


@dataclass(frozen=True)
class Device:
    """A client's settings.

    name: unique in the run, a topic level. data: the folder of examples. folder: where it keeps its state.
    engine: of `edge_client.engines.ENGINES`, or `auto`. threads: of a train step.
    columns: a modality's name -> what the table calls it, where that differs.
    feature_dtype: of the features on disk. max_feature_bytes: the most that they may take there, None for
        what is free.
    max_memory_bytes: of this process; None: as much as a stage takes.
    checkpoint_s: seconds of training between two checkpoints.
    owner: whose signed bundles the client runs; None: any.
    """

    name: str
    data: Path
    folder: Path
    engine: str = "auto"
    threads: int = 1
    columns: Mapping[str, str] = field(default_factory=dict)
    feature_dtype: str = "float16"
    max_feature_bytes: int | None = None
    max_memory_bytes: int | None = None
    checkpoint_s: float = 60.0
    owner: Owner | None = None

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """The blobs, while no other process may use the folder. Raises `UserError` if one does."""
        with locked(self.folder, "stop it, or give this one its own --dir and --name"):
            sweep(self.folder)
            yield Store(self.folder / "blobs")


def share_heap() -> None:
    """Let all threads of this process take memory from one heap, where that is to be had (glibc).

    A thread else gets a heap of its own, which keeps what it has freed: a client whose rounds are trained
    by one thread and then another would hold the memory of both.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 1)


def peak_rss_bytes() -> int:
    """The most memory this process has had at once."""
    try:
        # Not ru_maxrss, which on Linux starts with the peak of the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_mb() -> int:
    """Physical memory, in 10^6 bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6


def version() -> str:
    """Of Lamina here."""
    try:
        return importlib.metadata.version("lamina")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
