"""Child processes of a local run: a broker, an aggregator, clients, each with a log of its own.

Rules: a child ends with its parent, even one that is killed: it reads its standard input, which closes then
(`lamina/options.py`). A child that was killed is started again, as a service manager on a device would do;
one that ends with an error is not, for it would end so again.

Next: `lamina/local.py`, which starts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from lamina.options import STOP_WITH_STDIN
from wire.errors import LaminaError

GRACE_S = 5.0
RESTART_AFTER_S = 1.0
MAX_LINE_BYTES = 1 << 20


class ChildFailed(LaminaError):
    """A child process ended with an error; its own last line says which."""

    def __init__(self, name: str, code: int, log: Path) -> None:
        super().__init__(f"{name}: {last_line(log) or f'ended with exit code {code}'}", f"see {log}")
        self.exit_code = code if code > 0 else 1  # type: ignore[misc]  # the child's own, not the class's


class Processes:
    """Children within `async with`; at its end they are told to stop. logs: a folder, made if need be."""

    def __init__(self, logs: Path, note: Callable[[str], None]) -> None:
        self._logs = logs
        self._note = note
        self._children: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Processes:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        living = [child for child in self._children if child.returncode is None]
        for child in living:
            _signal(child, signal.SIGTERM)
        if living:
            await asyncio.wait([asyncio.ensure_future(child.wait()) for child in living], timeout=GRACE_S)
        for child in living:
            if child.returncode is None:
                _signal(child, signal.SIGKILL)
                await child.wait()

    def log(self, name: str) -> Path:
        """Where a child's standard error goes."""
        return self._logs / f"{name}.log"

    async def start(self, name: str, *arguments: str) -> asyncio.subprocess.Process:
        """Start `lamina` with these arguments; its standard output can be read."""
        with self.log(name).open("ab") as log:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "lamina",
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=MAX_LINE_BYTES,
                env={**os.environ, STOP_WITH_STDIN: "1"},
                start_new_session=True,  # Ctrl-C is for the parent, which stops them in order
            )
        self._children.append(child)
        return child

    async def run(self, name: str, *arguments: str) -> str:
        """Run one to its end; what it printed. Raises `ChildFailed`."""
        child = await self.start(name, *arguments)
        assert child.stdout is not None
        output = await child.stdout.read()  # not `communicate`, which closes what it stops with
        if code := await child.wait():
            raise ChildFailed(name, code, self.log(name))
        return output.decode()

    async def keep(self, name: str, *arguments: str, told: Callable[[str], None] | None = None) -> None:
        """Run one to its good end, starting it again when it is killed. Raises `ChildFailed`.

        told: called with each line of its standard output.
        """
        while True:
            child = await self.start(name, *arguments)
            assert child.stdout is not None
            async for line in child.stdout:
                if told is not None:
                    told(line.decode().strip())
            code = await child.wait()
            if code == 0:
                return
            if code > 0:
                raise ChildFailed(name, code, self.log(name))
            self._note(f"{name} was killed ({signal.Signals(-code).name}), starting it again")
            await asyncio.sleep(RESTART_AFTER_S)


def _signal(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """To a child and what it has started, which are a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def last_line(path: Path) -> str:
    """The last line of a log that says something, without the command's name."""
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.removeprefix("lamina: ") for line in reversed(lines) if line.strip()), "")
