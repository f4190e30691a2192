"""What an operator does besides kopf: tasks that have to go on for as long as the process lives."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class Background:
    """Tasks by name. One that ends by itself, whatever ended it, is a reason to end the process and to start anew."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        """Set when a task ended by itself."""
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Start a task that ends when it is cancelled."""
        task = self._tasks[name] = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)

    async def end(self, name: str) -> None:
        """End a task, and wait until it has."""
        task = self._tasks[name]
        task.cancel()
        await asyncio.wait([task])

    async def end_all(self) -> None:
        """End all tasks, and wait until they have."""
        await asyncio.gather(*map(self.end, list(self._tasks)))

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        logger.critical("%s ended, stopping: everything is to start anew", task.get_name(), exc_info=task.exception())
        self.stopped.set()
