"""What several subcommands have in common: options, and running until told to stop.

Next: `lamina/cli.py`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from wire.errors import UserError
from wire.tls import Credentials

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

STOP_WITH_STDIN = "LAMINA_STOP_WITH_STDIN"
"""Environment variable: stop when standard input closes, as it does when the parent has ended."""

_UNITS = {"B": 1, "MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30}

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def broker_option(**settings: Any) -> Callable[[F], F]:
    """`--broker`, the address of the broker."""
    return click.option(
        "--broker",
        metavar="URL",
        help="mqtt://[user:password@]host[:port], or mqtts:// for TLS.",
        **settings,
    )


def tls_options(function: F) -> F:
    """`--ca`, `--cert` and `--key` of an `mqtts://` broker, as one argument `credentials`."""

    @functools.wraps(function)
    def together(
        *arguments: Any, ca: Path | None, cert: Path | None, key: Path | None, **others: Any
    ) -> Any:
        return function(*arguments, credentials=Credentials(ca, cert, key), **others)

    decorated: Any = together
    for name, text in (
        ("--key", "The private key of --cert."),
        ("--cert", "Our certificate, for a broker that asks for one."),
        ("--ca", "The authority of the broker's certificate.  [default: those that the system trusts]"),
    ):
        decorated = click.option(name, type=click.Path(path_type=Path, dir_okay=False), help=text)(
            decorated
        )
    return cast(F, decorated)


def owner_option(text: str) -> Callable[[F], F]:
    """`--owner`, the public key of the run's owner."""
    return click.option("--owner", type=click.Path(path_type=Path, dir_okay=False), help=text)


def engine_option(**settings: Any) -> Callable[[F], F]:
    """`--engine`, what runs a client's train steps."""
    from edge_client.engines import AUTO, ENGINES

    words: dict[str, Any] = {"default": AUTO, "show_default": True, "help": "What runs the train steps."}
    return click.option("--engine", type=click.Choice([AUTO, *ENGINES]), **(words | settings))


def feature_options(function: F) -> F:
    """`--feature-dtype` and `--max-feature-mb`: how a client keeps what the frozen prefix computes."""
    for option in (
        click.option(
            "--max-feature-mb",
            type=click.IntRange(min=0),
            help="Disk for features; with too little, a batch computes its own.  [default: what is free]",
        ),
        click.option(
            "--feature-dtype",
            type=click.Choice(["float16", "float32"]),
            default="float16",
            show_default=True,
            help="How features are kept on disk.",
        ),
    ):
        function = option(function)
    return function


def memory_budget_option(text: str) -> Callable[[F], F]:
    """`--memory-budget`, in bytes: what a client's process may use."""
    return click.option(
        "--memory-budget",
        metavar="AMOUNT",
        callback=lambda _context, _option, text: None if text is None else memory_bytes(text),
        help=text,
    )


FOR_EXPORT = "What a client may use, such as 200MB: decides blocks per stage and micro-batches."


def calibration_option(function: F) -> F:
    """`--calibration`, a folder."""
    return click.option(
        "--calibration",
        type=click.Path(path_type=Path),
        help="A folder of public examples that the aggregator trains on after each round.",
    )(function)


def column_option(function: F) -> F:
    """`--column`, for a table that calls the modalities otherwise; collect them with `pairs`."""
    return click.option(
        "--column",
        "columns",
        multiple=True,
        metavar="NAME=COLUMN",
        help="What the table calls a modality, label or group.",
    )(function)


def config_option(function: F) -> F:
    """`--config`, a TOML file with any of the command's options; those on the command line come first.

    A relative path in it starts at the file's own folder, so that the two can be moved together.
    """
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="A TOML file with any of these options, such as `rounds = 5`.",
    )(function)


def model_options(function: F) -> F:
    """What is trained, in which stages, and by whom."""
    for option in reversed(
        (
            click.option(
                "--schedule",
                type=click.Choice(["layerwise", "progressive", "end_to_end"]),
                default="layerwise",
                show_default=True,
                help="LW-FedMML, Prog-FedMML or FedMML.",
            ),
            click.option(
                "--model", default="tiny", show_default=True, help="A preset, or package.module:builder."
            ),
            click.option(
                "--option",
                "options",
                multiple=True,
                metavar="NAME=JSON",
                help="An option of the model's builder.",
            ),
            click.option(
                "--warm-start",
                type=click.Choice(["copy", "fresh"]),
                default="copy",
                show_default=True,
                help="Start a new block as a copy of the one below, or fresh.",
            ),
            click.option(
                "--alignment",
                type=click.FloatRange(min=0),
                default=0.0,
                show_default=True,
                help="How strongly clients keep embeddings close to those of the model they were offered.",
            ),
            click.option(
                "--missing-modalities",
                is_flag=True,
                help="Let clients train that lack a modality: what they have, and the head.",
            ),
        )
    ):
        function = option(function)
    return function


def plan_options(**defaults: Any) -> Callable[[F], F]:
    """An option for each setting of `aggregator.plan.RunPlan`, with these defaults instead of its own."""
    import msgspec
    from msgspec.inspect import IntType, LiteralType, Metadata, StructType, UnionType

    from aggregator.plan import RunPlan

    struct = msgspec.inspect.type_info(RunPlan)
    assert isinstance(struct, StructType)

    def add(function: F) -> F:
        for field in reversed(struct.fields):
            assert isinstance(field.type, Metadata)
            inner = field.type.type
            kind: Any = int if isinstance(inner, IntType) else float
            if isinstance(inner, LiteralType):
                kind = click.Choice([str(value) for value in inner.values])
            if isinstance(inner, UnionType):
                kind = _NumberOr({word for one in inner.types for word in getattr(one, "values", ())})
            function = click.option(
                f"--{field.name.replace('_', '-')}",
                type=kind,
                default=defaults.get(field.name, field.default),
                show_default=True,
                help=(field.type.extra_json_schema or {}).get("description"),
            )(function)
        return function

    return add


class _NumberOr(click.ParamType[Any]):
    """A whole number, or one of some words."""

    name = "integer"

    def __init__(self, words: set[str]) -> None:
        self._words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Raises `click.BadParameter`."""
        return value if value in self._words else click.INT.convert(value, param, ctx)


def pairs(values: tuple[str, ...], option: str) -> dict[str, str]:
    """`("text=caption",)` as a dictionary. Raises `UserError`."""
    for value in values:
        if "=" not in value:
            raise UserError(f"{option} {value} has no =", f"write {option} name=value")
    return dict(value.split("=", 1) for value in values)


def memory_bytes(text: str) -> int:
    """`200MB`, `190 MiB` or `1.5GB` as a number of bytes. Raises `UserError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG]?i?B)", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if not size:
        raise UserError(f"{text!r} is not an amount of memory", "write 200MB, 190MiB or 1.5GB")
    return size


def when_told_to_stop(stop: Callable[[], object]) -> None:
    """Call `stop` in the event loop: on Ctrl-C, on SIGTERM, and when a parent that cares is gone."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    if STOP_WITH_STDIN in os.environ:

        def closed() -> None:
            loop.remove_reader(sys.stdin)  # which stays readable, and would stop the stopping too
            stop()

        loop.add_reader(sys.stdin, closed)


def end_with_parent() -> None:
    """For a command without an event loop: end, with its children, when a parent that cares is gone."""
    if STOP_WITH_STDIN not in os.environ:
        return

    def watch() -> None:
        while os.read(0, 1):  # not by sys.stdin, which Python could not close at its end
            pass
        leads = os.getpgrp() == os.getpid()  # as a child of `lamina/processes.py` does
        (os.killpg if leads else os.kill)(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def run_until_stopped(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, ended in order by `when_told_to_stop`. Raises KeyboardInterrupt then."""

    async def stoppable() -> T:
        task = asyncio.current_task()
        assert task is not None
        when_told_to_stop(task.cancel)
        return await main

    try:
        return asyncio.run(stoppable())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _read_config(context: click.Context, _option: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", "write a TOML file of options") from error
    options = {
        word.lstrip("-").replace("-", "_"): option
        for option in context.command.params
        for word in option.opts
        if option.name not in ("config", "help")
    }
    defaults: dict[str, Any] = {}
    for name, value in values.items():
        option = options.get(name.replace("-", "_"))
        if option is None or option.name is None:
            raise UserError(
                f"{path}: there is no option {name!r}", f"see lamina {context.info_name} --help"
            )
        plain = _plain(path, name, value, multiple=option.multiple)
        if isinstance(option.type, click.Path):
            texts = plain if isinstance(plain, tuple) else (str(plain),)
            beside = tuple(str(path.parent / text) for text in texts)
            plain = beside if option.multiple else beside[0]
        defaults[option.name] = plain
    context.default_map = {**(context.default_map or {}), **defaults}


def _plain(path: Path, name: str, value: Any, *, multiple: bool) -> str | bool | tuple[str, ...]:
    """What a person would have typed; a table such as `[column]` as `name=value` pairs."""
    if multiple and isinstance(value, dict):
        return tuple(f"{key}={one}" for key, one in value.items())
    if multiple and isinstance(value, list):
        return tuple(str(one) for one in value)
    if isinstance(value, bool):
        return value
    if isinstance(value, str | int | float):
        return (str(value),) if multiple else str(value)
    raise UserError(f"{path}: {name} cannot be {value!r}", "write a number, a text, or true or false")
