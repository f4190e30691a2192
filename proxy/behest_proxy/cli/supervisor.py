"""Keeps a few guarded processes together: if one ends unasked all end, and they are stopped in order."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from behest_proxy.cli.guarded import Guarded

_LONGER_THAN_GUARDIAN_S = 8.0


class ChildEndedError(Exception):
    """A process ended though nobody asked it to."""

    def __init__(self, child: Guarded, status: int) -> None:
        super().__init__(f"{child.name} ended unexpectedly ({describe(status)})")
        self.child = child
        self.status = status


def describe(status: int) -> str:
    """An exit status in words: "exit status 3", "killed by SIGKILL"."""
    if status < 0:  # the guardian itself was killed
        return f"its guardian was killed by {signal.Signals(-status).name}"
    if status > 128:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(status - 128).name}"
    return f"exit status {status}"


class Supervisor:
    """Runs `work`, then watches the processes that it added, until a signal comes or one of them ends."""

    def __init__(self) -> None:
        self._children: list[Guarded] = []
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._added = asyncio.Event()

    def add(self, child: Guarded) -> Guarded:
        """Watch it from now on; at the end the processes are stopped in the reverse order of their adding."""
        self._children.append(child)
        self._added.set()
        return child

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked us to stop."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        """What the first SIGINT, SIGTERM or SIGHUP does. A second one hurries: nobody is waited for."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def run(self, work: Callable[[], Awaitable[None]], *, stopping: Callable[[], None]) -> None:
        """Until we are asked to stop; returns then, with everything stopped.

        `stopping` is called once when the end begins. Raises what `work` raises, or `ChildEndedError`; everything
        is stopped then, too.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.request_stop)
        tasks: set[asyncio.Future[Any]] = {
            asyncio.ensure_future(self._watch()),
            asyncio.ensure_future(self._work(work)),
            asyncio.ensure_future(self._stop.wait()),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            stopping()
            await self._stop_all()
        errors = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
        # A process that died explains why the work failed, and not the other way round.
        errors.sort(key=lambda error: not isinstance(error, ChildEndedError))
        if errors and not self._stop.is_set():
            raise errors[0]

    @staticmethod
    async def _work(work: Callable[[], Awaitable[None]]) -> None:
        await work()
        await asyncio.Event().wait()

    async def _watch(self) -> None:
        watched: dict[asyncio.Task[int], Guarded] = {}
        added = asyncio.ensure_future(self._added.wait())
        try:
            while True:
                for child in self._children[len(watched) :]:
                    watched[asyncio.ensure_future(child.ended())] = child
                done, _ = await asyncio.wait({added, *watched}, return_when=asyncio.FIRST_COMPLETED)
                for task, child in watched.items():
                    if task in done:
                        raise ChildEndedError(child, task.result())
                self._added.clear()
                added = asyncio.ensure_future(self._added.wait())
        finally:
            for task in (added, *watched):
                task.cancel()

    async def _stop_all(self) -> None:
        for child in reversed(self._children):
            if child.status is None:
                await self._stop_one(child)
            child.wait(1)

    async def _stop_one(self, child: Guarded) -> None:
        child.stop()
        ended = asyncio.ensure_future(child.ended())
        hurry = asyncio.ensure_future(self._hurry.wait())
        try:
            await asyncio.wait({ended, hurry}, timeout=_LONGER_THAN_GUARDIAN_S, return_when=asyncio.FIRST_COMPLETED)
            while not ended.done():
                child.stop()
                await asyncio.wait({ended}, timeout=1)
        finally:
            hurry.cancel()
