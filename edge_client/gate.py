"""Which runs a client may join.

Rules: without an owner, all of them. With one, a run counts only if its announcement carries the owner's
signature of its manifest. Every other is as if it were not there, whether the client is looking for a run
or is in one of that name. Each is told once: an announcement is repeated for ever.

Next: `wire/signature.py`, the check; `edge_client/link.py`, where announcements come in.
"""

from __future__ import annotations

import logging

from wire.manifest import BlobRef
from wire.messages import Announcement
from wire.signature import Owner

MAX_TOLD = 64  # a flood of them must not flood the log or the memory

log = logging.getLogger(__name__)


class Gate:
    """owner: whose runs are joined; None: everybody's."""

    def __init__(self, owner: Owner | None = None) -> None:
        self._owner = owner
        self._told: set[tuple[str, BlobRef, bytes | None]] = set()

    def admits(self, announcement: Announcement) -> bool:
        """Whether to listen to it; if not, the log says why."""
        owner, signature = self._owner, announcement.signature
        if owner is None or owner.has_signed(announcement.manifest, signature):
            return True
        known = announcement.run, announcement.manifest, signature
        if known not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(known)
            log.warning(
                "ignored run %s: its bundle is %s owner %s",
                announcement.run,
                "not signed by" if signature is None else "signed, but not by",
                owner.name,
            )
        return False
