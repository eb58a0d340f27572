"""What a program logs on standard error, for a person or for a machine: `--log-format text` or `json`.

Rules: as JSON, each line is one object with `time` (ISO 8601, UTC, milliseconds), `level`, `logger` and
`message`, and with fields under these names. The place which logs gives them by `extra=`; a round and an
error that are arguments of the message are fields without that.

    run, client, broker     names and addresses
    stage, round            counted from 0, as in the books; messages count from 1, as people do
    loss, num_examples      of an update
    refusal                 its name on the wire
    missing                 clients that have not answered
    sha256, bytes           of a blob
    error                   the class of what went wrong
    hint, exit_code         of the last record of a program that ends with an error

JSON has our debug records too, for a machine does not tire of reading; text has what is at least worth
knowing. What looks like the user and password of an address is taken out of both.

Next: `lamina/cli.py`, which sets it up; `lamina/event_log.py`, an aggregator's events as records.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
import msgspec

from wire.messages import RoundKey

ROOMS = ("aggregator", "edge_client", "export", "inputs", "lamina", "models", "wire")
FORMATS = ("text", "json")

_LOGIN = re.compile(r"//[^\s'\"]*@")
_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

F = TypeVar("F", bound=Callable[..., Any])


class Text(logging.Formatter):
    """`15:04:05 message`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """One line, or more with a traceback."""
        return without_logins(super().format(record))


class JsonLines(logging.Formatter):
    """One object a line. constant: fields of every record."""

    def __init__(self, constant: Mapping[str, object]) -> None:
        super().__init__()
        self.constant = dict(constant)

    def format(self, record: logging.LogRecord) -> str:
        """A line without its end."""
        instant = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{instant}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self.constant,
            **_arguments(record),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            encoded = msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:  # a path may hold what is no text
            encoded = json.dumps(line, default=str)
        return without_logins(encoded)


class _Stderr(logging.StreamHandler[Any]):
    """Logs to whatever standard error is now: a live view puts itself in its place."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _value: Any) -> None:
        pass


def set_up() -> None:
    """Log as text, until `--log-format` says otherwise."""
    handler = _Stderr()
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    handler.setFormatter(Text())
    _listen_from(logging.INFO)


def log_format_option(function: F) -> F:
    """`--log-format`, which takes effect before other options are looked at."""
    return click.option(
        "--log-format",
        type=click.Choice(FORMATS),
        default=FORMATS[0],
        show_default=True,
        is_eager=True,
        expose_value=False,
        callback=lambda _context, _option, chosen: _use(chosen),
        help="Of what is logged on standard error; json: one object a line.",
    )(function)


def is_json() -> bool:
    """Whether logs are for machines."""
    return _json_lines() is not None


def always(**fields: object) -> None:
    """From now on every record has these."""
    if (formatter := _json_lines()) is not None:
        formatter.constant |= fields


def without_logins(text: str) -> str:
    """`mqtt://ann:secret@host` as `mqtt://host`."""
    return _LOGIN.sub("//", text)


def _arguments(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = {}
    for argument in record.args if isinstance(record.args, tuple) else ():
        if isinstance(argument, RoundKey):
            fields |= {"stage": argument.stage, "round": argument.round}
        elif isinstance(argument, BaseException):
            fields["error"] = type(argument).__name__
    return fields


def _use(chosen: str) -> None:
    if chosen == "json":
        for handler in logging.root.handlers:
            handler.setFormatter(JsonLines({}))
        _listen_from(logging.DEBUG)
        logging.captureWarnings(True)  # a library's, which are no lines of ours


def _listen_from(level: int) -> None:
    for room in ROOMS:
        logging.getLogger(room).setLevel(level)


def _json_lines() -> JsonLines | None:
    formatters = (handler.formatter for handler in logging.root.handlers)
    return next((one for one in formatters if isinstance(one, JsonLines)), None)
