"""One HTTP/2 request: DATA frames are composed here, everything else goes through `h2`.

`h2` spends 25 µs on a DATA frame, most of it in state machines that a DATA frame without END_STREAM does
not move. So such a frame is nine bytes put before the payload, and `h2`'s two send windows are counted down
by hand. HEADERS, END_STREAM, RST_STREAM and all that is received stay `h2`'s. Frames of one stream keep
their order because whatever `h2` queues is handed to the transport at once.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from h2.errors import ErrorCodes

from behest_proxy.edge.direct import Header
from behest_proxy.edge.heads import answer_headers
from behest_proxy.edge.host import EdgeHost
from behest_proxy.edge.served import ServedRequest

if TYPE_CHECKING:
    from behest_proxy.edge.http2 import Http2Connection

FRAME_BYTES_MAX = 16_384
"""Of a frame's payload. Every client takes so much (RFC 9113, 4.2). Whoever allows more would get all of a large write
at once, whatever the socket takes, and those bytes would be counted against it as answers that it does not read."""


class Http2Stream(ServedRequest):
    """A stream of an `Http2Connection`.

    `h2` parses a whole read before its events are handled here, so its stream can be closed already (by a
    reset further on in the same read) while a callback writes to ours: hence the looks at `_window.closed`.
    """

    __slots__ = ("_connection", "_frame_rest", "_machine", "_pending", "_uncredited", "_window", "stream_id", "task")

    def __init__(self, *, host: EdgeHost, scope: dict[str, Any], connection: "Http2Connection", stream_id: int) -> None:
        super().__init__(host=host, scope=scope)
        self.stream_id = stream_id
        self._connection = connection
        self._machine = connection.machine
        self._window = connection.machine.streams[stream_id]
        # Type DATA (0), no flags, stream id: what follows the three length bytes of a frame's header.
        self._frame_rest = b"\x00\x00" + stream_id.to_bytes(4, "big")
        self._pending = bytearray()
        self._uncredited = 0
        self.task: asyncio.Task[None] | None = None
        """The application's work for this request; None: not begun."""

    @property
    def buffered_bytes(self) -> int:
        """Bytes that wait for a window or for the socket."""
        return len(self._pending)

    def write(self, data: bytes) -> None:
        """See `DirectStream.write`."""
        if not self.open:
            self._refuse_write()
            return
        size = len(data)
        if size == 0 or self.suppressed:
            return
        machine = self._machine
        window = self._window
        if (
            self.paused
            or size > window.outbound_flow_control_window
            or size > machine.outbound_flow_control_window
            or size > FRAME_BYTES_MAX
        ):
            self._write_later(data)
            return
        window.outbound_flow_control_window -= size
        machine.outbound_flow_control_window -= size
        self._connection.send_soon(size.to_bytes(3, "big") + self._frame_rest, data)
        if not window.outbound_flow_control_window or not machine.outbound_flow_control_window:
            self.pause()

    def pause(self) -> None:
        """Something blocks this stream until the connection's `pump` finds otherwise."""
        if not self.closed:
            self.paused = True
            self._connection.blocked[self.stream_id] = self

    def send_pending(self) -> bool:
        """Send at most one frame of what waits; end or resume the stream when nothing waits any more.

        Returns whether anything was achieved. One frame at a time, so that streams which share a small
        connection window take turns.
        """
        if self.closed:
            self._connection.blocked.pop(self.stream_id, None)
            return False
        sent = self._send_piece()
        if self._pending:
            if sent and self.ended:
                self._arm_stall_timer()  # it reads, if slowly
            return sent
        if self.ended:
            self._finish()
            return True
        if self._connection.write_paused or self._windows_are_shut():
            return sent
        self._connection.blocked.pop(self.stream_id, None)
        self.resumed()
        return True

    def _send_piece(self) -> bool:
        """Send one frame of what waits, as large as both windows allow."""
        machine = self._machine
        window = self._window
        size = min(
            len(self._pending),
            window.outbound_flow_control_window,
            machine.outbound_flow_control_window,
            FRAME_BYTES_MAX,
        )
        if size <= 0:
            return False
        payload = bytes(self._pending[:size])
        del self._pending[:size]
        window.outbound_flow_control_window -= size
        machine.outbound_flow_control_window -= size
        self._connection.send_soon(size.to_bytes(3, "big") + self._frame_rest, payload)
        self._connection.flush()  # so that a full socket pauses the stream before its next piece
        return True

    def received(self, data: bytes, *, window_bytes: int) -> None:
        """Body bytes came; `window_bytes` of the stream's window (padding included) are withheld meanwhile."""
        self._uncredited += window_bytes
        if data and not self.closed:
            self.feed_body(data)
        elif not self._body:
            self._body_taken()

    def _send_head(self, status: int, headers: Sequence[Header]) -> None:
        lines = answer_headers(headers)
        if self._window.closed:
            return
        self._machine.send_headers(self.stream_id, [(b":status", b"%d" % status), *lines])
        self._connection.flush_soon()
        self.open = True
        if self._connection.write_paused or self._windows_are_shut():
            self.pause()

    def _windows_are_shut(self) -> bool:
        return self._window.outbound_flow_control_window <= 0 or self._machine.outbound_flow_control_window <= 0

    def _write_later(self, data: bytes) -> None:
        """Keep what does not fit, in order; the stream is paused until it is gone."""
        self._pending += data
        if not self.paused:
            while not self.paused and self._send_piece():  # a full socket buffer pauses from inside
                pass
            if self._pending or self._windows_are_shut():
                self.pause()
        if self._pending:
            self._kept(len(data))

    def _send_end(self) -> None:
        if not self._pending:
            self._finish()

    def _finish(self) -> None:
        """END_STREAM; and where the body is still coming, ask the client to stop it (RFC 9113, 8.1)."""
        if not self._window.closed:
            self._machine.end_stream(self.stream_id)
            if not self._window.closed:
                self._machine.reset_stream(self.stream_id, ErrorCodes.NO_ERROR)
        super()._finish()
        self._connection.release(self)

    def _break_wire(self) -> None:
        self._pending.clear()
        if not self._window.closed and self._connection.is_open:
            self._machine.reset_stream(self.stream_id, ErrorCodes.INTERNAL_ERROR)
        self._connection.release(self)

    def _body_taken(self) -> None:
        """Give the client its window back, in steps of half a window: fewer frames, and never a stall."""
        if self.closed or self._window.closed:
            return
        if self._uncredited * 2 >= self._host.limits.request_window_bytes:
            self._machine.increment_flow_control_window(self._uncredited, self.stream_id)
            self._uncredited = 0
            self._connection.flush()
