"""One origin's connections, and the calls that wait for one.

Every change (a call comes or goes, a connection opens, falls idle or closes) ends in `_serve`: it first gives waiting
calls to connections that can take them, then opens as many connections as the rest needs, or cancels the tries that
nobody needs any more. So a call that is cancelled while it waits takes its own try to connect with it.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Literal

from behest_proxy.upstream.connector import Connected, ConnectFailed, Connector
from behest_proxy.upstream.http1 import Http1Connection
from behest_proxy.upstream.http2 import Http2Connection
from behest_proxy.upstream.live_call import LiveCall
from behest_proxy.upstream.moderation import Moderation
from behest_proxy.upstream.prepared import Origin

_LOG = logging.getLogger(__name__)

_TRY_LONGER_S = 0.1

_CALLS_PER_NEW_CONNECTION = 100
"""How many streams a new HTTP/2 connection is expected to carry (RFC 9113, 6.5.2 asks servers for at least that)."""


class Pool:
    """The connections to one origin in one wire form."""

    def __init__(
        self,
        origin: Origin,
        protocol: Literal["auto", "http1", "http2"],
        *,
        connector: Connector,
        calls_max: int,
        idle_connections_max: int,
        multiplexed_connections_max: int,
        idle_timeout_s: float,
        moderation: Moderation,
        on_empty: Callable[["Pool"], None],
    ) -> None:
        self.key: Final = (origin, protocol)
        self._origin = origin
        self._protocol: Literal["auto", "http1", "http2"] = protocol
        self._connector = connector
        self._calls_max = calls_max
        self._idle_connections_max = idle_connections_max
        self._multiplexed_connections_max = multiplexed_connections_max
        self._idle_timeout_s = idle_timeout_s
        self._moderation = moderation
        self._on_empty = on_empty
        self._loop = asyncio.get_running_loop()
        self._speaks: Literal["http1", "http2"] | None = None if protocol == "auto" else protocol
        """What the origin spoke last; None before the first handshake of an `auto` pool."""
        self._waiting: dict[LiveCall, None] = {}
        self._opening: dict[asyncio.Task[None], None] = {}
        """Tries to connect that waiting calls need, oldest first."""
        self._tasks: set[asyncio.Task[None]] = set()
        """The same, and the cancelled ones that are not done yet."""
        self._idle: list[Http1Connection] = []
        self._http1: set[Http1Connection] = set()
        self._http2: dict[Http2Connection, None] = {}
        self._streams_expected = _CALLS_PER_NEW_CONNECTION
        """How many calls a new HTTP/2 connection will take, as far as the last one told."""
        self._closed = False

    def submit(self, call: LiveCall) -> None:
        """Carry this call, now or as soon as a connection can take it."""
        call.waits_in(self)
        if self._closed:
            self._loop.call_soon(call.fail, "closed", f"{self._origin}: this client is closed")
        elif self._calls() >= self._calls_max:
            self._loop.call_soon(call.fail, "connect", f"{self._origin}: too many calls at once")
        else:
            self._waiting[call] = None
            self._serve()

    def close(self) -> list[asyncio.Future[None]]:
        """Fail every call, close every connection; return what is done when the last socket is closed."""
        self._closed = True
        waiting, self._waiting = list(self._waiting), {}
        for call in waiting:
            call.fail("closed", f"{self._origin}: this client is closed", now=True)
        for task in self._tasks:
            task.cancel()
        connections: list[Http1Connection | Http2Connection] = [*self._http1, *self._http2]
        for connection in connections:
            connection.close()
        return [*self._tasks, *(connection.closed for connection in connections)]

    def abort(self) -> None:
        """Close without any farewell what `close` could not close in time."""
        connections: list[Http1Connection | Http2Connection] = [*self._http1, *self._http2]
        for connection in connections:
            connection.abort()

    # What a waiting call asks (Carrier).

    def dropped(self, call: LiveCall) -> None:
        """It waits no longer."""
        self._waiting.pop(call, None)
        self._serve()

    def paused(self, call: LiveCall) -> None:
        """Its connection will ask whether it is paused."""

    def resumed(self, call: LiveCall) -> None:
        """See `paused`."""

    # What connections tell (Http1Owner, Http2Owner).

    def released(self, connection: Http1Connection) -> None:
        """Give it to the next call, or let it rest."""
        self._connector.keep_session(connection.transport, self._protocol)
        self._idle.append(connection)
        self._serve()
        if connection in self._idle:
            connection.rest()
            if len(self._idle) > self._idle_connections_max:
                self._idle.pop(0).close()

    def capacity_freed(self, connection: Http2Connection) -> None:
        """Others may go on it."""
        self._connector.keep_session(connection.transport, self._protocol)
        if connection.settings_received:
            self._streams_expected = max(1, min(_CALLS_PER_NEW_CONNECTION, connection.streams_allowed))
        self._serve()

    def lost(self, connection: Http1Connection | Http2Connection) -> None:
        """It is gone."""
        self._connector.keep_session(connection.transport, self._protocol)
        if isinstance(connection, Http1Connection):
            self._http1.discard(connection)
            if connection in self._idle:
                self._idle.remove(connection)
        else:
            self._http2.pop(connection, None)
        self._serve()

    # Inside.

    def _calls(self) -> int:
        carried = sum(connection.streams_open for connection in self._http2)
        return len(self._waiting) + len(self._http1) - len(self._idle) + carried

    def _serve(self) -> None:
        if not self._closed:
            self._assign()
            self._balance()
            if not (self._waiting or self._tasks or self._http1 or self._http2):
                self._on_empty(self)

    def _assign(self) -> None:
        if not self._waiting or not (self._idle or any(connection.capacity > 0 for connection in self._http2)):
            return
        for call in list(self._waiting):
            connection = self._take_connection(call)
            if connection is not None:
                del self._waiting[call]
                connection.start(call)
            elif not call.retried:
                break

    def _take_connection(self, call: LiveCall) -> Http1Connection | Http2Connection | None:
        """The connection for this call; the latest idle one first, so that the others can go."""
        for index in range(len(self._idle) - 1, -1, -1):
            connection = self._idle[index]
            if not connection.usable:
                del self._idle[index]
            elif connection.fresh or not call.retried:
                # A call that a stale connection failed is not given to another old one.
                del self._idle[index]
                return connection
        return next((connection for connection in self._http2 if connection.capacity > 0), None)

    def _balance(self) -> None:
        """Have as many tries to connect as the waiting calls need."""
        needed = self._openings_needed()
        while len(self._opening) > needed:
            task = next(iter(self._opening))
            del self._opening[task]
            task.cancel()
        while len(self._opening) < needed:
            timeout_s = next(iter(self._waiting)).request.connect_timeout_s
            task = self._loop.create_task(self._open(timeout_s))
            self._opening[task] = None
            self._tasks.add(task)
            task.add_done_callback(self._tried)

    def _openings_needed(self) -> int:
        waiting = len(self._waiting)
        if self._speaks == "http1":
            return waiting
        if self._speaks is None:
            return min(1, waiting)
        usable = [connection for connection in self._http2 if connection.usable]
        starting = sum(not connection.settings_received for connection in usable)
        wanted = -(-waiting // self._streams_expected) - starting
        return max(0, min(wanted, self._multiplexed_connections_max - len(usable)))

    async def _open(self, timeout_s: float) -> None:
        # A call's own timer is what it fails by; the try gives up a little later, for calls that came later.
        connected = await self._connector.connect(
            self._origin, protocol=self._protocol, timeout_s=timeout_s + _TRY_LONGER_S
        )
        if self._closed:
            connected.transport.abort()
        else:
            self._opened(connected)

    def _opened(self, connected: Connected) -> None:
        self._opening.pop(self._current_task(), None)
        self._speaks = connected.wire
        if connected.wire == "http1":
            single = Http1Connection(connected, self, idle_timeout_s=self._idle_timeout_s, moderation=self._moderation)
            self._http1.add(single)
            if connected.early:
                single.data_received(connected.early)
            self.released(single)
        else:
            multiplexed = Http2Connection(
                connected, self, idle_timeout_s=self._idle_timeout_s, moderation=self._moderation
            )
            self._http2[multiplexed] = None
            if connected.early:
                multiplexed.data_received(connected.early)
            self._serve()

    @staticmethod
    def _current_task() -> "asyncio.Task[None]":
        task = asyncio.current_task()
        assert task is not None
        return task

    def _tried(self, task: "asyncio.Task[None]") -> None:
        """A try to connect is done: whatever it could not do falls on those who wait for it."""
        self._tasks.discard(task)
        was_needed = task in self._opening
        self._opening.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and was_needed:
            if not isinstance(error, ConnectFailed):
                _LOG.error("opening a connection to %s failed unexpectedly", self._origin, exc_info=error)
                error = ConnectFailed("connect", f"{self._origin}: cannot be connected")
            self._fail_waiting(error)
        self._serve()

    def _fail_waiting(self, error: ConnectFailed) -> None:
        if error.kind == "connect_timeout":
            return  # by their own timers
        # One HTTP/1.1 connection is one call's; an HTTP/2 connection is everybody's.
        failed = list(self._waiting)[: 1 if self._speaks == "http1" else None]
        for call in failed:
            self._waiting.pop(call, None)
            call.fail(error.kind, error.message)
