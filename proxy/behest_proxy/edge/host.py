"""What all connections of one edge share: the application, the limits, and the books of what is running."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, Protocol

from behest_proxy.edge.limits import EdgeLimits

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApplication = Callable[[Scope, Receive, Send], Awaitable[None]]


class Connection(Protocol):
    """One client connection, as the server sees it."""

    def drain(self) -> None:
        """Take no further requests, finish the running ones, then close."""
        ...

    def cut(self) -> None:
        """End every running request visibly, then close behind what is buffered."""
        ...

    def abort(self) -> None:
        """Drop the socket with whatever is buffered."""
        ...


class EdgeHost:
    """The application and everything that is running for it. Confined to one event loop."""

    def __init__(
        self,
        app: AsgiApplication,
        *,
        limits: EdgeLimits,
        state: dict[str, Any],
        on_refused: Callable[[], None] | None = None,
    ) -> None:
        self.app = app
        self.limits = limits
        self.state = state
        self.loop = asyncio.get_running_loop()
        self.draining = False
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._on_refused = on_refused
        self._was_full = False
        self._changed = asyncio.Event()

    def has_room(self) -> bool:
        """Whether one more connection may come. Each that may not is counted, the first in a row is logged."""
        if len(self.connections) < self.limits.connections:
            self._was_full = False
            return True
        if not self._was_full:
            self._was_full = True
            log.warning("no room for more than %d connections: further ones are closed", self.limits.connections)
        if self._on_refused is not None:
            self._on_refused()
        return False

    def add(self, connection: Connection) -> None:
        """Book a new connection. One that arrives while draining is drained at once."""
        self.connections.add(connection)
        if self.draining:
            self.loop.call_soon(connection.drain)

    def remove(self, connection: Connection) -> None:
        """Take a connection off the books; unknown ones are ignored."""
        self.connections.discard(connection)
        self._changed.set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the application for one request; the task is referenced here until it ends."""
        task = self.loop.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._changed.set()

    def drain(self) -> None:
        """Drain every connection. Idempotent."""
        self.draining = True
        for connection in list(self.connections):
            connection.drain()

    def cut(self) -> None:
        """Cut every connection."""
        for connection in list(self.connections):
            connection.cut()

    def abort(self) -> None:
        """Abort every connection."""
        for connection in list(self.connections):
            connection.abort()

    async def wait_until_idle(self, *, timeout_s: float) -> bool:
        """Wait until no connection and no task is left; False when the time ran out first.

        Not by `asyncio.timeout`: before Python 3.11.4 it lets its own cancellation out of a task that was cancelled
        once already, and that is what a server that ends is.
        """
        deadline_s = self.loop.time() + timeout_s
        while self.connections or self.tasks:
            left_s = deadline_s - self.loop.time()
            if left_s <= 0:
                return False
            self._changed.clear()
            changed = self.loop.create_task(self._changed.wait())
            try:
                await asyncio.wait([changed], timeout=left_s)
            finally:
                changed.cancel()
        return True

    async def cancel_tasks(self, *, timeout_s: float) -> None:
        """Cancel the tasks that are left and wait for them, at most so long."""
        tasks = set(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
