"""The `lamina` command: which subcommands there are, and how each of them ends.

Rules: a subcommand is imported when it is called, so a device never loads what only the laptop needs. Bad
input gives one line on standard error, what is wrong and what to do, and an exit code:

    0   done
    1   rows of an experiment have failed, each with a line of its own
    2   the command, an option, a path or the data are not usable
    69  no broker takes us
    70  a defect of Lamina
    76  the other side sent something unusable
    130 stopped by Ctrl-C

Next: `lamina/run.py`, the whole thing on one machine.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
import traceback
from typing import NoReturn

import click

from lamina import logs
from wire.errors import LaminaError

COMMANDS = {
    "run": "lamina.run:command",
    "data": "lamina.data.command:command",
    "export": "lamina.export_command:command",
    "sign": "lamina.identity.command:sign_command",
    "plan": "lamina.plan_command:command",
    "provision": "lamina.identity.command:provision_command",
    "broker": "lamina.broker:command",
    "aggregator": "lamina.aggregator_command:command",
    "client": "lamina.client_command:command",
    "evaluate": "lamina.evaluate_command:command",
    "experiment": "lamina.experiment.command:command",
}
INTERNAL = {"clients": "lamina.clients_command:command"}
"""What our own programs start."""

log = logging.getLogger(__name__)


class _Commands(click.Group):
    def list_commands(self, _context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        known = COMMANDS | INTERNAL
        if name not in known:
            return None
        module, _, attribute = known[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS | INTERNAL and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command {args[0]!r} - {hint}")
        return super().resolve_command(context, args)


@click.command(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="lamina")
def command() -> None:
    """Layer-wise federated multimodal learning on real devices, over MQTT."""


def main() -> NoReturn:
    """Run the command and exit."""
    logs.set_up()
    try:
        command(prog_name="lamina", standalone_mode=False)
    except LaminaError as error:
        _end(error, error.hint, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _end(error, "", error.exit_code, " ".join(error.format_message().split()))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except Exception:
        if logs.is_json():
            log.critical("a defect of Lamina", exc_info=True, extra={"exit_code": 70})
        else:
            traceback.print_exc()
        sys.exit(70)
    sys.exit(0)


def _end(error: Exception, hint: str, exit_code: int, message: str = "") -> NoReturn:
    message = message or str(error)
    if logs.is_json():
        kind = type(error).__name__
        log.critical("%s", message, extra={"error": kind, "hint": hint, "exit_code": exit_code})
    else:
        line = f"lamina: {message} - {hint}" if hint else f"lamina: {message}"
        click.echo(logs.without_logins(line), err=True)
    sys.exit(exit_code)
