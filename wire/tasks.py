"""Coroutines that run beside a main one and end with it (asyncio.TaskGroup needs Python 3.11).

Next: `aggregator/run.py` and `edge_client/session.py`, which run their pumps beside their story.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


async def beside(main: Coroutine[Any, Any, T], *others: Coroutine[Any, Any, Any]) -> T:
    """The result of `main`. `others` run meanwhile; when `main` ends they are cancelled.

    Where any of them raises, all end and that error is raised.
    """
    first = asyncio.ensure_future(main)
    running: set[asyncio.Future[Any]] = {first, *(asyncio.ensure_future(other) for other in others)}
    waiting = set(running)
    try:
        while not first.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                future.result()
        return first.result()
    finally:
        await end(*running)


class Tasks:
    """Coroutines that are started along the way, while `watch` runs."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._started = asyncio.Event()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it beside everything else."""
        self._running.add(asyncio.ensure_future(coroutine))
        self._started.set()

    async def watch(self) -> NoReturn:
        """For ever; raises the first error of any of them. All are cancelled at the end."""
        try:
            while True:
                started = asyncio.ensure_future(self._started.wait())
                done, _ = await asyncio.wait({started, *self._running}, return_when=asyncio.FIRST_COMPLETED)
                self._started.clear()
                started.cancel()
                for task in self._running & done:
                    self._running.discard(task)
                    task.result()
        finally:
            await end(*self._running)


async def end(*futures: asyncio.Future[Any]) -> None:
    """Cancel those that still run and wait until all have ended; their results are dropped."""
    running = set(futures)
    while running:
        for future in running:
            future.cancel()
        # More than once: a cancellation can be lost, as in `asyncio.wait_for` before Python 3.12.
        _, running = await asyncio.wait(running, timeout=1)
    for future in futures:
        if not future.cancelled():
            future.exception()


async def within(timeout_s: float, awaitable: Awaitable[T]) -> T | None:
    """The result of `awaitable`, or None, and its cancellation, after so long.

    Unlike `asyncio.wait_for` before Python 3.12 it never loses a cancellation of its own.
    """
    waiting = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait({waiting}, timeout=max(0.0, timeout_s))
        return waiting.result() if done else None
    finally:
        waiting.cancel()
