"""One request as the application sees it: ASGI's `receive` and `send` over a direct stream.

`ServedRequest` holds what HTTP/1.1 and HTTP/2 have in common. The two subclasses add the wire: how a head,
a piece of body, an end and a break are written. `send` is a thin adapter over the same four operations, so
both ways of answering share one state machine:

    waiting --begin--> open --end--> ended --(flushed)--> closed
       |                 |             |
       +-----------------+-------------+---reset, lose, cut---> closed
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from behest_proxy.edge.direct import Header
from behest_proxy.edge.heads import has_no_body, offer_direct
from behest_proxy.edge.host import EdgeHost, Message
from behest_proxy.errors import ShownError

log = logging.getLogger(__name__)

_SEND_SLICE = 16 * 1024  # one DATA frame at the default frame size, so that `send` feels every pause


class ClientGone(OSError):
    """The client can no longer be reached. Raised by `send`, as ASGI 2.4 asks.

    An application that streams by `send` in a loop would otherwise never learn of it and run for ever.
    Direct writes do not raise: they have `gone` and `on_gone`.
    """


class ServedRequest(ABC):
    """One request and its answer. Implements `DirectStream` together with a subclass."""

    __slots__ = (
        "_body",
        "_body_complete",
        "_body_delivered",
        "_body_timer",
        "_drained",
        "_host",
        "_late_bytes",
        "_method",
        "_readable",
        "_scope",
        "_stall_timer",
        "_start_message",
        "begun",
        "closed",
        "ended",
        "gone",
        "on_gone",
        "on_resume",
        "open",
        "paused",
        "suppressed",
    )

    def __init__(self, *, host: EdgeHost, scope: dict[str, Any]) -> None:
        self._host = host
        self._scope: dict[str, Any] | None = scope
        self._method: str = scope["method"]
        self.on_gone: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self.paused = False
        self.gone = False
        self.begun = False
        self.open = False  # between begin and end: body bytes are welcome
        self.ended = False
        self.closed = False  # nothing more of this answer will be handed to the transport
        self.suppressed = False  # HEAD, 204, 304: body bytes are dropped
        self._late_bytes: int | None = None  # written since the pause began but for its first write; None: no write
        self._body = bytearray()
        self._body_complete = False
        self._body_delivered = False
        self._body_timer: asyncio.TimerHandle | None = None
        self._readable: asyncio.Event | None = None
        self._drained: asyncio.Future[None] | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._start_message: tuple[int, list[Header]] | None = None
        offer_direct(scope, self)

    # --- what a protocol must know how to do

    @property
    @abstractmethod
    def buffered_bytes(self) -> int:
        """Bytes that were written and not yet handed to the kernel's side."""

    @abstractmethod
    def _send_head(self, status: int, headers: Sequence[Header]) -> None:
        """Write the head and set `open`; raises ValueError for a malformed header, then nothing was written."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """See `DirectStream.write`."""

    @abstractmethod
    def _send_end(self) -> None:
        """Write the end, now or behind what is buffered; then `_finish`."""

    @abstractmethod
    def _break_wire(self) -> None:
        """Make the peer see that this answer was cut. Called once, when `closed` is already set."""

    def _body_wanted(self) -> None:  # noqa: B027 - an optional hook: most requests have their body already
        """The application waits for body bytes."""

    def _body_taken(self) -> None:  # noqa: B027 - an optional hook
        """The application took all body bytes that were here."""

    def _kept(self, size: int) -> None:
        """So many bytes were written that wait for the client. Too many that came knowingly are the end of it.

        The first write of a pause is none of these, however large: who wrote it could not know, and the client may
        well be reading.
        """
        if self._late_bytes is None:
            self._late_bytes = 0
            return
        self._late_bytes += size
        if min(self._late_bytes, self.buffered_bytes) > self._host.limits.stream_buffer_bytes:
            self.cut()

    # --- the direct stream

    def begin(self, status: int, headers: Sequence[Header]) -> None:
        """See `DirectStream.begin`."""
        if self.begun:
            raise RuntimeError("the answer was begun already")
        if self.closed:
            return
        self.suppressed = has_no_body(method=self._method, status=status)
        self._send_head(status, headers)
        self.begun = True

    def end(self) -> None:
        """See `DirectStream.end`."""
        if not self.open:
            if not self.begun and not self.closed:
                raise RuntimeError("end before begin")
            return
        self.open = False
        self.ended = True
        self._send_end()
        if not self.closed:
            self._arm_stall_timer()

    def reset(self) -> None:
        """See `DirectStream.reset`."""
        if not self.closed:
            self._close()
            self._break_wire()

    def _refuse_write(self) -> None:
        """`write` was called while not open: silently when cut, an error of the application otherwise."""
        if self.gone:
            return
        if self.ended:
            raise RuntimeError("write after end")
        if not self.begun and not self.closed:
            raise RuntimeError("write before begin")

    # --- called by the connection

    def start(self) -> "asyncio.Task[None]":
        """Run the application for this request."""
        return self._host.start(self._run())

    def feed_body(self, data: bytes) -> None:
        """Body bytes came."""
        self._body += data
        self._wake_receiver()

    def complete_body(self) -> None:
        """The body ended."""
        self._body_complete = True
        self._cancel_body_timer()
        self._wake_receiver()

    def lose(self) -> None:
        """The client is gone: tell the application, once. Nothing when the answer is complete."""
        call_back(self.detach())

    def detach(self) -> Callable[[], None] | None:
        """Mark the client as gone; the caller has to call what this returns."""
        if self.closed:
            return None
        self.gone = True
        on_gone = self.on_gone
        self._close()
        return on_gone

    def cut(self) -> None:
        """The edge gives this client up."""
        if not self.closed:
            on_gone = self.detach()
            self._break_wire()
            call_back(on_gone)

    def resumed(self) -> None:
        """Nothing blocks any more."""
        self.paused = False
        self._late_bytes = None
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self.open:
            call_back(self.on_resume)

    # --- ASGI

    async def receive(self) -> Message:
        """ASGI `receive`: `http.request` while there is body, then `http.disconnect` once the answer is over.

        Every message carries all bytes that are here; the client gets its window back by it.
        """
        while True:
            if self.closed:
                return {"type": "http.disconnect"}
            if self._body or (self._body_complete and not self._body_delivered):
                body = bytes(self._body)
                self._body = bytearray()
                self._body_delivered = self._body_complete
                if not self._body_complete:
                    self._body_taken()
                return {"type": "http.request", "body": body, "more_body": not self._body_delivered}
            if not self._body_complete:
                self._body_wanted()
                if self._body_timer is None:
                    self._body_timer = self._host.loop.call_later(self._host.limits.body_timeout_s, self.cut)
            if self._readable is None:
                self._readable = asyncio.Event()
            self._readable.clear()
            await self._readable.wait()

    async def send(self, message: Message) -> None:
        """ASGI `send`. Waits while the client does not read; raises ClientGone when it cannot be reached."""
        if self.gone:
            raise ClientGone("the client is gone")
        kind = message["type"]
        if kind == "http.response.start":
            if self.begun or self._start_message is not None:
                raise RuntimeError("the answer was begun already")
            # ASGI: the head goes out with the first body message, so that until then a 500 is possible.
            self._start_message = (message["status"], list(message.get("headers", ())))
        elif kind == "http.response.body":
            if self._start_message is not None:
                status, headers = self._start_message
                self._start_message = None
                self.begin(status, headers)
            await self._send_body(message.get("body", b""))
            if not message.get("more_body", False):
                self.end()
        else:
            raise RuntimeError(f"unexpected ASGI message {kind!r}")

    async def _send_body(self, body: bytes) -> None:
        for position in range(0, len(body), _SEND_SLICE):
            self.write(body[position : position + _SEND_SLICE])
            if self.paused:
                await self._wait_until_drained()
        if self.gone:
            raise ClientGone("the client is gone")

    async def _wait_until_drained(self) -> None:
        self._drained = self._host.loop.create_future()
        self._arm_stall_timer()
        try:
            await self._drained
        finally:
            self._drained = None
            self._cancel_stall_timer()

    async def _run(self) -> None:
        scope, self._scope = self._scope, None
        if self.closed or scope is None:
            return
        try:
            await self._host.app(scope, self.receive, self.send)
        except asyncio.CancelledError:
            self.reset()
            raise
        except ClientGone:
            if not self.gone:
                log.exception("the application raised ClientGone for a client that is here")
        except Exception:
            # A client that left is often the cause of what follows; its application was told by `on_gone`.
            log.log(logging.DEBUG if self.gone else logging.ERROR, "application failed", exc_info=True)
        try:
            self._settle()
        except Exception:
            log.exception("an unfinished answer could not be ended")
            self.cut()

    def _settle(self) -> None:
        """The application returned: answer for it if it did not, break what it left unfinished."""
        if self.closed or self.ended:
            return
        if self.begun:
            self.reset()
            return
        error = ShownError("internal error")
        body = error.envelope()
        self.begin(
            500,
            [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                *error.headers(),
            ],
        )
        self.write(body)
        self.end()

    # --- endings

    def _finish(self) -> None:
        """The end was handed to the transport."""
        self._close()

    def _close(self) -> None:
        self.closed = True
        self.open = False
        self.paused = False
        self._cancel_stall_timer()
        self._cancel_body_timer()
        self.on_gone = None
        self.on_resume = None
        self._body = bytearray()
        self._wake_receiver()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _wake_receiver(self) -> None:
        if self._readable is not None:
            self._readable.set()

    def _cancel_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _arm_stall_timer(self) -> None:
        self._cancel_stall_timer()
        self._stall_timer = self._host.loop.call_later(self._host.limits.stall_timeout_s, self.cut)

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def call_back(callback: Callable[[], None] | None) -> None:
    """Call the application from inside the edge: its failure must not break the connection's other streams."""
    if callback is None:
        return
    try:
        callback()
    except Exception:
        log.exception("a stream's callback failed")
