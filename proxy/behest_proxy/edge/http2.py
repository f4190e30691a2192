"""One HTTP/2 connection of the edge: frames in, ASGI requests out, on `h2` and an `asyncio.Protocol`.

It replaces Hypercorn's `H2Protocol`. Nothing here awaits: a read is parsed and handled in one call chain,
and a stream writes from whatever call chain its bytes came by. Only the application runs in tasks.

What keeps it bounded:
- answers: a stream pauses when a flow-control window or the transport's buffer is full (`blocked`), and
  `pump` resumes it when the client opened a window or the socket drained. Nothing polls.
- bodies: the connection's window is given back on receipt, a stream's only when the application took the
  bytes; so a body that nobody reads stops its own stream and no other.
- frames that cost us more than the client: `FrameGuard` counts them before they are parsed.
- frames that we must answer (PING, SETTINGS): `control_buffer_bytes`.
- work for requests that were reset: `abandoned_requests`.
"""

import asyncio
import logging

from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError

from behest_proxy.edge.connection import ClientConnection
from behest_proxy.edge.direct import Header
from behest_proxy.edge.frame_guard import FrameGuard
from behest_proxy.edge.h2_machine import LAST_POSSIBLE_STREAM, H2Machine
from behest_proxy.edge.heads import BadHead, answer_headers
from behest_proxy.edge.host import EdgeHost
from behest_proxy.edge.http2_stream import Http2Stream
from behest_proxy.edge.served import call_back

log = logging.getLogger(__name__)

_DRAIN_PING = b"behest-0"
_DRAIN_ROUND_TRIP_S = 1.0
_OUTBOX_BYTES_MAX = 16 * 1024


class Http2Connection(ClientConnection):
    """A client's HTTP/2 connection, by ALPN or prior knowledge."""

    def __init__(self, host: EdgeHost) -> None:
        super().__init__(host)
        self.machine = H2Machine(host.limits)
        self._guard = FrameGuard(host.limits, host.loop.time())
        self.streams: dict[int, Http2Stream] = {}
        self.blocked: dict[int, Http2Stream] = {}
        self._requests = 0
        self._abandoned = 0
        self._uncredited = 0
        self._outbox: list[bytes] = []
        self._outbox_bytes = 0
        self._goaway_sent = False
        self._client_left = False
        self._refusing = False
        self._idle_since = 0.0

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The preface is under way: send our SETTINGS."""
        super().connection_made(transport)
        self._idle_since = self.host.loop.time()
        self._call_later(self.host.limits.idle_timeout_s, self._look_whether_idle)
        self.flush()

    def data_received(self, data: bytes) -> None:
        """One read: parse it whole, handle its events, start the applications of new requests."""
        if not self.is_open:
            self._drop(data)
            return
        flood = self._guard.admit(data, self.host.loop.time())
        if flood is not None:
            self._calm(flood)
            return
        try:
            events = self.machine.receive_data(data)
        except ProtocolError as error:
            log.debug("HTTP/2 protocol error: %s", error)
            self._fail()
            return
        # Acknowledgements first: DATA that a new SETTINGS allows must not overtake its acknowledgement.
        self.flush()
        fresh: list[Http2Stream] = []
        for event in events:
            self._handle(event, fresh)
        self.flush()
        # Started last: a request that the same read takes back costs no task.
        for stream in fresh:
            if not stream.closed:
                stream.task = stream.start()
        if self.is_open and self.transport.get_write_buffer_size() > self.host.limits.control_buffer_bytes:
            log.warning("a client makes us answer frames and reads nothing: connection aborted")
            self.abort()

    def pause_writing(self) -> None:
        """The socket does not take more: every stream pauses."""
        self.write_paused = True
        for stream in self.streams.values():
            if stream.open:
                stream.pause()

    def resume_writing(self) -> None:
        """The socket drained."""
        self.write_paused = False
        self.pump()

    # --- events

    def _handle(self, event: Event, fresh: list[Http2Stream]) -> None:
        match event:
            case WindowUpdated():
                self._window_opened(event.stream_id or 0)
            case DataReceived():
                self._body_received(event)
            case RequestReceived():
                self._request_received(event, fresh)
            case StreamEnded():
                stream = self.streams.get(event.stream_id)
                if stream is not None:
                    stream.complete_body()
            case StreamReset():
                self._stream_reset(event)
            case RemoteSettingsChanged():
                self.pump()
            case PingAckReceived():
                if event.ping_data == _DRAIN_PING and self._goaway_sent:
                    self._refuse_from_now()
            case ConnectionTerminated():
                self._client_left = True
                self._close_if_done()
            case _:
                pass  # priorities, trailers, acknowledgements and unknown frames need no answer of ours

    def _request_received(self, event: RequestReceived, fresh: list[Http2Stream]) -> None:
        stream_id = event.stream_id
        limits = self.host.limits
        too_many = len(self.streams) >= limits.concurrent_streams or self._abandoned >= limits.abandoned_requests
        if self._refusing or too_many:
            self._refuse(stream_id)
            return
        method = target = authority = b""
        headers: list[Header] = []
        for name, value in event.headers:
            if name[:1] != b":":
                if name != b"host" or not authority:
                    headers.append((name, value))
            elif name == b":method":
                method = value
            elif name == b":path":
                target = value
            elif name == b":authority":
                authority = value
        if authority:
            headers.insert(0, (b"host", authority))
        if method == b"CONNECT":
            self._answer_bare(stream_id, status=501)
            return
        try:
            scope = self._scope_of(http_version="2", method=method, target=target, headers=headers)
        except BadHead:
            self._answer_bare(stream_id, status=400)
            return
        stream = Http2Stream(host=self.host, scope=scope, connection=self, stream_id=stream_id)
        self.streams[stream_id] = stream
        fresh.append(stream)
        self._count_request()

    def _count_request(self) -> None:
        self._requests += 1
        most = self.host.limits.connection_requests
        if most is not None and self._requests >= most:
            self.drain()

    def _refuse(self, stream_id: int) -> None:
        """Not processed, so the client may repeat it elsewhere (RFC 9113, 8.7)."""
        if not self.machine.streams[stream_id].closed:
            self.machine.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
        self.machine.forget(stream_id)

    def _answer_bare(self, stream_id: int, *, status: int) -> None:
        """Answer without an application."""
        stream = self.machine.streams[stream_id]
        if not stream.closed:
            lines = answer_headers([(b"content-length", b"0")])
            self.machine.send_headers(stream_id, [(b":status", b"%d" % status), *lines], end_stream=True)
            if not stream.closed:
                self.machine.reset_stream(stream_id, ErrorCodes.NO_ERROR)
        self.machine.forget(stream_id)

    def _body_received(self, event: DataReceived) -> None:
        size = event.flow_controlled_length or 0
        if size:
            self._give_connection_window_back(size)
        stream = self.streams.get(event.stream_id or 0)
        if stream is not None:  # else its answer was complete, or it was reset, before this DATA arrived
            stream.received(event.data or b"", window_bytes=size)

    def _give_connection_window_back(self, size: int) -> None:
        self._uncredited += size
        if self._uncredited * 4 >= self.host.limits.connection_window_bytes:
            self.machine.increment_flow_control_window(self._uncredited)
            self._uncredited = 0

    def _stream_reset(self, event: StreamReset) -> None:
        """The client reset a stream, or made `h2` reset one by breaking its rules."""
        if not event.remote_reset:
            flood = self._guard.was_reset(self.host.loop.time())
            if flood is not None:
                self._calm(flood)
                return
        stream_id = event.stream_id
        stream = self.streams.pop(stream_id, None)
        self.blocked.pop(stream_id, None)
        self.machine.forget(stream_id)
        if stream is not None:
            if stream.task is not None and not stream.task.done():
                self._abandoned += 1
                stream.task.add_done_callback(self._let_go)
            stream.lose()
            self._streams_changed()

    def _let_go(self, _task: "asyncio.Task[None]") -> None:
        """The application noticed that its client had reset the stream, and is done."""
        self._abandoned -= 1

    def _window_opened(self, stream_id: int) -> None:
        if stream_id == 0:
            self.pump()
            return
        stream = self.blocked.get(stream_id)
        while stream is not None and not self.write_paused and stream.send_pending():
            stream = self.blocked.get(stream_id)

    def pump(self) -> None:
        """Send what waits, one frame per stream and round, until a window or the socket is full again."""
        progress = True
        while progress and not self.write_paused:
            progress = False
            for stream in list(self.blocked.values()):
                if self.write_paused or self.machine.outbound_flow_control_window <= 0:
                    break
                if stream.send_pending():
                    progress = True
                    if stream.stream_id in self.blocked:  # to the back of the queue
                        self.blocked[stream.stream_id] = self.blocked.pop(stream.stream_id)

    # --- called by streams

    def send_soon(self, head: bytes, payload: bytes) -> None:
        """Hand a frame over, together with all others of this turn of the loop.

        Chunks for several streams of a connection come in one turn, and a system call costs as much as everything
        that we do for a chunk. uvloop writes at once whatever it is given.
        """
        if not self._outbox:
            self.host.loop.call_soon(self.flush)
        self._outbox += (head, payload)
        self._outbox_bytes += len(payload)
        if self._outbox_bytes > _OUTBOX_BYTES_MAX:
            self.flush()

    def flush_soon(self) -> None:
        """Hand over what `h2` has queued with the frames of this turn: an answer's head and its first chunk."""
        self.send_soon(self.machine.data_to_send(), b"")

    def flush(self) -> None:
        """Hand over what waits in the outbox, then what `h2` has queued: the order in which they were made."""
        data = self.machine.data_to_send()
        if self._outbox:
            self._guard.sent(len(self._outbox) // 2)
            data = b"".join((*self._outbox, data))
            self._outbox.clear()
            self._outbox_bytes = 0
        if data and self.is_open:
            self.transport.write(data)

    def release(self, stream: Http2Stream) -> None:
        """The stream's answer is over on our side: forget it and send what `h2` queued for that."""
        self.streams.pop(stream.stream_id, None)
        self.blocked.pop(stream.stream_id, None)
        self.machine.forget(stream.stream_id)
        self.flush()
        self._streams_changed()

    def _streams_changed(self) -> None:
        if not self.streams:
            self._idle_since = self.host.loop.time()
            self._close_if_done()

    # --- endings

    def drain(self) -> None:
        """First step of a graceful end (RFC 9113, 6.8): announce it, and let what is under way arrive.

        The second step names the real last stream, one round trip later: without it a request that crosses
        our GOAWAY would be lost.
        """
        if self._goaway_sent or not self.is_open:
            return
        self._goaway_sent = True
        self.machine.queue_goaway(last_stream_id=LAST_POSSIBLE_STREAM)
        self.machine.ping(_DRAIN_PING)
        self.flush()
        self._call_later(_DRAIN_ROUND_TRIP_S, self._refuse_from_now)

    def _refuse_from_now(self) -> None:
        if not self._refusing and self.is_open:
            self._refusing = True
            self._cancel_timer()
            self.machine.queue_goaway(last_stream_id=self.machine.highest_inbound_stream_id)
            self.flush()
            self._close_if_done()

    def _close_if_done(self) -> None:
        """Close once nothing runs and no further request can come.

        Of an answer that has just ended much may be on its way yet, and its client confirms what it reads.
        """
        if self.streams or not self.is_open:
            return
        is_quiet = self.host.loop.time() - self._idle_since > self.host.limits.linger_timeout_s
        if self._client_left or (self._refusing and not is_quiet):
            self._linger()
        elif self._refusing:
            self._close()

    def cut(self) -> None:
        """Reset every stream and close."""
        for stream in list(self.streams.values()):
            stream.cut()
        if self.is_open:
            self.machine.queue_goaway(last_stream_id=self.machine.highest_inbound_stream_id)
            self._close()

    def _calm(self, flood: str) -> None:
        """The client costs more than it may: say so and end its connection, with every stream on it."""
        log.warning("a client's connection is ended: %s", flood)
        self.machine.queue_goaway(
            last_stream_id=self.machine.highest_inbound_stream_id, error_code=ErrorCodes.ENHANCE_YOUR_CALM
        )
        self._linger()
        self._lose()

    def _fail(self) -> None:
        """The client broke the protocol: `h2` has queued the GOAWAY that says how."""
        self._linger()
        self._lose()

    def _lose(self) -> None:
        streams = list(self.streams.values())
        self.streams.clear()
        self.blocked.clear()
        # All are marked first: a callback may write to another stream of this connection.
        for on_gone in [stream.detach() for stream in streams]:
            call_back(on_gone)

    def _close(self) -> None:
        self.flush()  # GOAWAY, or the last frames of streams
        super()._close()

    def _linger(self) -> None:
        if self.transport.can_write_eof():
            self.flush()  # likewise
            super()._linger()
        else:
            self._close()  # TLS reads on by itself until the client has confirmed the end

    def _look_whether_idle(self) -> None:
        """One timer per connection, set anew only when it fires: requests come far more often."""
        now = self.host.loop.time()
        idle_s = self.host.limits.idle_timeout_s
        due = (now if self.streams else self._idle_since) + idle_s
        if due <= now:
            self.machine.queue_goaway(last_stream_id=self.machine.highest_inbound_stream_id)
            self._linger()  # a request that crosses this GOAWAY must learn that nobody took it
        else:
            self._timer = self.host.loop.call_at(due, self._look_whether_idle)
