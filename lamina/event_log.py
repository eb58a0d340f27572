"""A run's events as log records, for `lamina aggregator --log-format json`.

Rules: an event's fields are the record's, its key as `stage` and `round`. What a person should look at is a
warning.

Next: `aggregator/events.py`, the events; `lamina/logs.py`, how a record becomes a line.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from aggregator.events import (
    ClientCame,
    ClientLeft,
    Event,
    RoundClosed,
    RoundOpened,
    RunClosed,
    RunOpened,
    UpdateAccepted,
    UpdateRefused,
    UsageTold,
)

log = logging.getLogger(__name__)


def note(event: Event) -> None:
    """Log an event."""
    level, message = _told(event)
    fields: dict[str, Any] = msgspec.to_builtins(event)
    fields["event"] = fields.pop("type")
    usage = fields.pop("usage", {})
    key = fields.pop("key", None) or usage.pop("key", None)
    if "size_bytes" in fields:
        fields["bytes"] = fields.pop("size_bytes")
    log.log(level, "%s", message, extra={**fields, **usage, **(key or {})})


def _told(event: Event) -> tuple[int, str]:
    match event:
        case RunOpened():
            return logging.INFO, f"run {event.run} {'goes on' if event.resumed else 'begins'}"
        case ClientCame():
            return logging.INFO, f"{event.client} is here"
        case ClientLeft():
            return logging.WARNING, f"{event.client} is gone"
        case RoundOpened() if event.extended:
            return logging.WARNING, f"{event.key} is offered again: too few updates at the deadline"
        case RoundOpened():
            return logging.INFO, f"{event.key} is open for {len(event.cohort)}"
        case UpdateAccepted():
            return logging.INFO, f"{event.key}: an update of {event.client} counts"
        case UpdateRefused():
            return logging.WARNING, f"{event.key}: {event.client}: {event.refusal}, {event.detail}"
        case RoundClosed() if event.missing:
            return logging.WARNING, f"{event.key} is done without {', '.join(event.missing)}"
        case RoundClosed():
            return logging.INFO, f"{event.key} is done"
        case UsageTold():
            return logging.DEBUG, f"{event.usage.key} has cost {event.client} {event.usage.seconds:.1f} s"
        case RunClosed():
            return logging.INFO, "the run is over"
