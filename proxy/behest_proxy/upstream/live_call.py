"""One call from `send` to its one end: its phases, its timers, its pause, and the only caller of its handler."""

import asyncio
import enum
import logging
from collections.abc import Callable
from typing import Protocol

from behest_proxy.upstream.call import FailureKind, UpstreamFailure, UpstreamHandler
from behest_proxy.upstream.prepared import PreparedRequest

_LOG = logging.getLogger(__name__)


class Carrier(Protocol):
    """Who has a call at the moment: a pool while it waits, then a connection."""

    def dropped(self, call: "LiveCall") -> None:
        """The call is over for its owner: forget it, and tell the peer."""
        ...

    def paused(self, call: "LiveCall") -> None:
        """Take no more bytes for it from the peer."""
        ...

    def resumed(self, call: "LiveCall") -> None:
        """Take bytes again."""
        ...


CROSSED_S = 1.0
"""So long a request may have been on its way when its connection is found closed."""


class Phase(enum.Enum):
    """What a call waits for, and so which of its limits runs."""

    CONNECTION = "connect_timeout"
    HEAD = "first_byte_timeout"
    BODY = "idle_timeout"
    OVER = "over"


class LiveCall:
    """The `UpstreamCall` of this client.

    Carriers tell it what the wire brought (`sent`, `head`, `data`, `end`, `fail`, `unprocessed`, `unanswered`); it
    tells the handler, and holds back while paused. It has one timer, which is not touched by bytes: they leave a
    time behind, and the timer looks at it when it fires.
    """

    __slots__ = (
        "_active_at",
        "_carrier",
        "_handler",
        "_held",
        "_held_end",
        "_limit_s",
        "_loop",
        "_phase",
        "_requeue",
        "_timer",
        "head_received",
        "is_paused",
        "live",
        "request",
        "request_sent",
        "retried",
    )

    def __init__(
        self,
        request: PreparedRequest,
        handler: UpstreamHandler,
        *,
        loop: asyncio.AbstractEventLoop,
        requeue: Callable[["LiveCall"], None],
    ) -> None:
        self.request = request
        self.live = True
        """No terminal callback was made and the call was not cancelled."""
        self.is_paused = False
        self.request_sent = False
        self.head_received = False
        self.retried = False
        """It was given to a second connection; there is no third."""
        self._handler: UpstreamHandler | None = handler
        self._loop = loop
        self._carrier: Carrier | None = None
        self._requeue = requeue
        self._held: list[bytes] = []
        self._held_end: tuple[UpstreamFailure | None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._enter(Phase.CONNECTION, request.connect_timeout_s)

    # What its owner asks (UpstreamCall).

    def cancel(self) -> None:
        """See `UpstreamCall.cancel`."""
        if self.live:
            carrier = self._carrier
            self._close()
            if carrier is not None:
                carrier.dropped(self)

    def pause(self) -> None:
        """See `UpstreamCall.pause`."""
        if self.live and not self.is_paused:
            self.is_paused = True
            if self._carrier is not None:
                self._carrier.paused(self)

    def resume(self) -> None:
        """See `UpstreamCall.resume`."""
        if not self.live or not self.is_paused:
            return
        self.is_paused = False
        self._active_at = self._loop.time()
        if self._held:
            held, self._held = b"".join(self._held), []
            self.data(held)
        # The handler may have paused or cancelled again.
        if self.is_paused or not self.live:  # pyright: ignore[reportUnnecessaryComparison]
            return
        if self._held_end is not None:
            self._finish(self._held_end[0])
            return
        if self._timer is None and self._phase is not Phase.OVER:
            self._timer = self._loop.call_later(self._limit_s, self._look_at_time)
        if self._carrier is not None:
            self._carrier.resumed(self)

    # What its carrier tells.

    def carried_by(self, carrier: Carrier) -> None:
        """A connection has taken it and is sending its request."""
        self._carrier = carrier
        self._enter(Phase.HEAD, self.request.first_byte_timeout_s)

    def progressed(self) -> None:
        """Request bytes went out: the limit in force starts anew."""
        self._active_at = self._loop.time()

    def sent(self) -> None:
        """The whole request is out. The handler hears it once, whatever is sent again."""
        if not self.live or self.request_sent:
            return
        self.request_sent = True
        self._active_at = self._loop.time()
        if (handler := self._handler) is not None:
            try:
                handler.on_request_sent()
            except Exception:  # noqa: BLE001 - whatever it raises, the connection lives on
                self._handler_broke(handler)

    def head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The answer's head."""
        handler = self._handler
        if not self.live or handler is None:
            return
        self.head_received = True
        self._enter(Phase.BODY, self.request.idle_timeout_s)
        try:
            handler.on_head(status, headers)
        except Exception:  # noqa: BLE001 - whatever it raises, the connection lives on
            self._handler_broke(handler)

    def data(self, data: bytes) -> None:
        """Body bytes, not empty."""
        self._active_at = self._loop.time()
        if self.is_paused:
            self._held.append(data)
        elif (handler := self._handler) is not None:
            try:
                handler.on_data(data)
            except Exception:  # noqa: BLE001 - whatever it raises, the connection lives on
                self._handler_broke(handler)

    def end(self) -> None:
        """The body's clean end. The carrier has let go of the call already."""
        self._carried_to_end(None, held=self.is_paused)

    def fail(self, kind: FailureKind, message: str, *, now: bool = False) -> None:
        """Another end; the carrier has let go of the call already. `now`: even with bytes held back."""
        failure = UpstreamFailure(
            kind=kind, message=message, request_sent=self.request_sent, head_received=self.head_received
        )
        self._carried_to_end(failure, held=bool(self._held) and not now)

    def unprocessed(self, kind: FailureKind, message: str) -> None:
        """The peer did not process the request: try once more on another connection, else fail."""
        if self.live and not self.retried and not self.head_received:
            self.retried = True
            self._enter(Phase.CONNECTION, self.request.connect_timeout_s)
            self._requeue(self)
        else:
            self.fail(kind, message)

    def unanswered(self, kind: FailureKind, message: str) -> None:
        """A connection that had answered others went away without a word to this one.

        Most likely its peer closed it while it was idle and the request crossed that. But who had the request for
        longer may have worked on it, and would bill both: a POST is not repeated then (RFC 9110, 9.2.2).
        """
        if self._loop.time() - self._active_at <= CROSSED_S:
            self.unprocessed(kind, message)
        else:
            self.fail(kind, message)

    def waits_in(self, carrier: Carrier) -> None:
        """A pool has it (again)."""
        self._carrier = carrier

    # Inside.

    def _carried_to_end(self, failure: UpstreamFailure | None, *, held: bool) -> None:
        if not self.live:
            return
        self._carrier = None
        self._enter(Phase.OVER, 0)
        if held:
            self._held_end = (failure,)
        else:
            self._finish(failure)

    def _finish(self, failure: UpstreamFailure | None) -> None:
        handler = self._handler
        self._close()
        if handler is None:
            return
        try:
            if failure is None:
                handler.on_end()
            else:
                handler.on_failure(failure)
        except Exception:  # noqa: BLE001 - whatever it raises, the connection lives on
            self._handler_broke(handler)

    def _handler_broke(self, handler: UpstreamHandler) -> None:
        _LOG.exception("an upstream handler failed; its call to %s is cancelled", self.request.origin)
        self.cancel()
        try:
            handler.on_broken()
        except Exception:  # noqa: BLE001 - as above
            _LOG.exception("an upstream handler failed when it was told that it had")

    def _close(self) -> None:
        self.live = False
        self._handler = None
        self._carrier = None
        self._held.clear()
        self._held_end = None
        self._enter(Phase.OVER, 0)

    def _enter(self, phase: Phase, limit_s: float) -> None:
        self._phase = phase
        self._limit_s = limit_s
        self._active_at = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if phase is Phase.OVER else self._loop.call_later(limit_s, self._look_at_time)

    def _look_at_time(self) -> None:
        self._timer = None
        if self.is_paused and self._phase is not Phase.CONNECTION:
            return  # resume() starts it again
        left_s = self._active_at + self._limit_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look_at_time)
            return
        kind: FailureKind
        match self._phase:
            case Phase.CONNECTION:
                kind, what = "connect_timeout", "no connection"
            case Phase.HEAD:
                kind, what = "first_byte_timeout", "no answer"
            case _:
                kind, what = "idle_timeout", "no more of the answer"
        carrier = self._carrier
        self._carrier = None
        if carrier is not None:
            carrier.dropped(self)
        self.fail(kind, f"{self.request.origin}: {what} in {self._limit_s:g} s")
