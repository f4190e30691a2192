"""An HTTP/2 connection (RFC 9113): many calls at once, a reset stream to cancel one.

`h2` keeps the connection's state, with two exceptions that this module reads by hand:

- DATA of answers without `content-length` (streams): through `h2` a small frame costs more than all our other work
  on it. `h2` never hears of these bytes, so their windows are ours to count and to give back; it is told of the end
  by an empty frame, which keeps its stream states true. DATA of answers with a length passes through `h2`.
- GOAWAY: `h2` refuses every frame after it, but the streams up to its last id are still being answered.

Flow control: the connection's window is given back when bytes arrive, a stream's when its call is not paused, so a
paused call holds at most one stream window and never stands in another's way.
"""

import asyncio
from contextlib import suppress
from typing import Protocol

from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError

from behest_proxy.upstream import frames
from behest_proxy.upstream.call import FailureKind
from behest_proxy.upstream.connector import Connected
from behest_proxy.upstream.http2_settings import (
    CONNECTION_WINDOW_BYTES,
    CONTROL_BACKLOG_BYTES_MAX,
    FRAME_BYTES_MAX,
    LAST_STREAM_ID,
    STREAM_WINDOW_BYTES,
    STREAMS_MAX,
    new_h2_state,
)
from behest_proxy.upstream.live_call import LiveCall
from behest_proxy.upstream.moderation import Moderation
from behest_proxy.upstream.stream import Stream

_PING_AFTER_S = 5.0
"""A connection that rested for so long is asked whether it lives together with its next request."""
_PING_SILENT_S = 20.0
"""So is one from which nothing came for so long, whatever it carries."""
_PING_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0


class Http2Owner(Protocol):
    """The pool, as such a connection sees it."""

    def capacity_freed(self, connection: "Http2Connection") -> None:
        """`capacity` may have grown."""
        ...

    def lost(self, connection: "Http2Connection") -> None:
        """Its socket is closed."""
        ...


class Http2Connection(asyncio.Protocol):
    """Carries up to `STREAMS_MAX` calls, or as many as its peer allows."""

    def __init__(
        self, connected: Connected, owner: Http2Owner, *, idle_timeout_s: float, moderation: Moderation
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._moderation = moderation
        self._transport = connected.transport
        self._origin = ""
        self._idle_timeout_s = idle_timeout_s
        self._rested_at = self._loop.time()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self._reads_seen = 0
        self._watch_timer = self._loop.call_later(_PING_SILENT_S, self._watch)
        self._streams: dict[int, Stream] = {}
        self._sending: dict[int, Stream] = {}
        """Streams whose request body waits for a window."""
        self._touched: list[Stream] = []
        """Streams with undelivered parts from the read in progress."""
        self._tail = frames.Tail()
        self._in_header_block = False
        self._owed_bytes = 0
        self._reads = 0
        self._highest_id = 0
        self._writing_paused = False
        self._draining = False
        self.settings_received = False
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._h2 = new_h2_state()
        connected.transport.set_protocol(self)
        self._flush()
        self._rest()

    # What the pool asks.

    @property
    def transport(self) -> asyncio.Transport:
        """What it speaks over."""
        return self._transport

    @property
    def capacity(self) -> int:
        """How many more calls it takes now; one before the peer has said how many it allows."""
        if not self.usable:
            return 0
        return (self.streams_allowed if self.settings_received else 1) - len(self._streams)

    @property
    def streams_allowed(self) -> int:
        """How many streams it may have at once."""
        return min(STREAMS_MAX, self._h2.remote_settings.max_concurrent_streams)

    @property
    def streams_open(self) -> int:
        """How many calls it carries."""
        return len(self._streams)

    @property
    def usable(self) -> bool:
        """New calls can be given to it, now or when others end."""
        return not self._draining and not self._transport.is_closing()

    def start(self, call: LiveCall) -> None:
        """Send the request, as far as the peer's windows allow. There must be capacity."""
        request = call.request
        stream_id = self._h2.get_next_available_stream_id()
        stream = Stream(self, call, number=stream_id, reads_before=self._reads)
        if not self._streams:
            self._wake()
        self._streams[stream_id] = stream
        self._highest_id = stream_id
        if stream_id >= LAST_STREAM_ID:
            self._draining = True
        self._origin = str(request.origin)
        call.carried_by(stream)
        try:
            self._h2.send_headers(stream_id, stream.send_fields(), end_stream=not request.body)
        except ProtocolError:
            # Not known to be possible: the request is clean and there is capacity.
            self._streams.pop(stream_id)
            self._loop.call_soon(call.fail, "protocol", f"{self._origin}: the request cannot be sent")
            return
        if request.body:
            self._sending[stream_id] = stream
            self._send_body(stream)
        else:
            self._loop.call_soon(call.sent)
        self._flush()

    def close(self) -> None:
        """Say goodbye, close, and fail the calls that it carries."""
        streams = self._remove_all()
        self._say_goodbye(ErrorCodes.NO_ERROR)
        for stream in streams:
            stream.call.fail("closed", f"{self._origin}: this client is closed", now=True)

    def abort(self) -> None:
        """Close without any farewell."""
        self._transport.abort()

    # What a call asks, through its stream.

    def cancel(self, stream: Stream) -> None:
        """RST_STREAM(CANCEL), at once."""
        self._remove(stream, reset=ErrorCodes.CANCEL)

    def give_back(self, stream: Stream) -> None:
        """Open the stream's window again by what its call has taken, when that is worth a frame."""
        if stream.owed_bytes < STREAM_WINDOW_BYTES // 2 or stream.call.is_paused:
            return
        if stream.ended or stream.number not in self._streams:
            return
        owed, stream.owed_bytes = stream.owed_bytes, 0
        if stream.by_hand:
            self._transport.write(frames.window_update(stream.number, owed))
        else:
            self._h2.increment_flow_control_window(owed, stream.number)
            self._flush()

    # What the transport tells.

    def data_received(self, data: bytes) -> None:
        """Walk one read through to the handlers: one `on_data` for each stream in it."""
        if self._tail:
            data = self._tail.complete(data)
            if not data:
                return
        self._reads += 1
        try:
            self._walk(data)
        except (ProtocolError, ValueError):
            # The text of these may quote header values.
            self._deliver_touched()
            self._break_off("the peer broke the rules of HTTP/2")
            return
        # What `h2` answers goes out once a read: asyncio's transport sums up all its buffers at every write.
        self._flush()
        self._deliver_touched()
        if self._owed_bytes >= CONNECTION_WINDOW_BYTES // 4:
            self._transport.write(frames.window_update(0, self._owed_bytes))
            self._owed_bytes = 0
        if self._writing_paused and self._transport.get_write_buffer_size() > CONTROL_BACKLOG_BYTES_MAX:
            self._break_off("the peer does not read the answers to its own frames")

    def pause_writing(self) -> None:
        """The transport's buffer is full: request bodies wait."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """There is room again."""
        self._writing_paused = False
        self._send_bodies()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed, by whomever."""
        for timer in (self._idle_timer, self._close_timer, self._watch_timer):
            if timer is not None:
                timer.cancel()
        streams = self._remove_all()
        if not self.closed.done():
            self.closed.set_result(None)
        self._owner.lost(self)
        how: FailureKind = "reset" if exc is not None else "closed"
        for stream in streams:
            if stream.number > 1 and stream.reads_before == self._reads:
                stream.call.unanswered(how, f"{self._origin}: the connection was {how} before any answer")
            else:
                stream.call.fail(how, f"{self._origin}: the connection was {how} before the end of the answer")

    # The way of a frame.

    def _walk(self, data: bytes) -> None:
        """Take all whole frames and keep the incomplete one. Raises ProtocolError, ValueError."""
        position, size, needed = 0, len(data), frames.HEAD_BYTES
        while size - position >= frames.HEAD_BYTES:
            upper, lower, kind, flags, stream_id = frames.read_head(data, position)
            stream_id &= 0x7FFFFFFF
            length = upper << 16 | lower
            start = position + frames.HEAD_BYTES
            end = start + length
            if length > FRAME_BYTES_MAX:
                raise ProtocolError("a frame is longer than we allow")
            if end > size:
                needed = end - position
                break
            if kind == frames.DATA and not self._in_header_block:
                stream = self._streams.get(stream_id)
                if stream is not None and stream.by_hand:
                    self._receive_data(stream, flags, data[start:end])
                elif stream is not None:
                    self._receive_measured_data(stream, flags, data[position:end])
                elif 0 < stream_id <= self._highest_id:
                    # Sent before the peer saw that we had reset the stream.
                    self._owed_bytes += length
                else:
                    raise ProtocolError("DATA on a stream that was never opened")
            elif kind == frames.GOAWAY and not self._in_header_block:
                self._receive_goaway(data[start:end])
            else:
                self._in_header_block = kind in frames.HEADER_BLOCK_TYPES and not flags & frames.END_HEADERS
                self._tell_h2(data[position:end])
            position = end
        if position < size:
            self._tail.keep(data[position:], needed_bytes=needed)

    def _receive_data(self, stream: Stream, flags: int, payload: bytes) -> None:
        """DATA that `h2` does not see."""
        self._owed_bytes += len(payload)
        stream.owed_bytes += len(payload)
        if stream.owed_bytes > STREAM_WINDOW_BYTES:
            self._refuse(stream, ErrorCodes.FLOW_CONTROL_ERROR, "more bytes than the stream's window")
            return
        if flags & frames.PADDED:
            payload = frames.without_padding(payload)
        if payload:
            self._take(stream, payload)
        if flags & frames.END_STREAM:
            self._deliver(stream)
            if stream.number in self._streams:
                self._tell_h2(frames.end_of_stream(stream.number))

    def _receive_measured_data(self, stream: Stream, flags: int, frame: bytes) -> None:
        """DATA of an answer with a length: checked here, for `h2` gives up the whole connection over a mismatch."""
        payload = frame[frames.HEAD_BYTES :]
        if flags & frames.PADDED:
            payload = frames.without_padding(payload)
        expected, received = stream.expected_bytes, stream.received_bytes + len(payload)
        if expected is not None and (received > expected or (flags & frames.END_STREAM and received < expected)):
            self._owed_bytes += len(frame) - frames.HEAD_BYTES
            self._refuse(stream, ErrorCodes.PROTOCOL_ERROR, "a body that is not as long as announced")
            return
        self._tell_h2(frame)

    def _tell_h2(self, frame: bytes) -> None:
        for event in self._h2.receive_data(frame):
            self._react(event)

    def _react(self, event: Event) -> None:
        match event:
            case ResponseReceived():
                self._receive_head(event)
            case DataReceived():
                self._receive_data_event(event)
            case StreamEnded():
                self._receive_end(event.stream_id)
            case StreamReset():
                self._receive_reset(event)
            case WindowUpdated():
                self._send_bodies()
            case RemoteSettingsChanged():
                self.settings_received = True
                self._send_bodies()
                self._owner.capacity_freed(self)
            case _:
                pass  # 1xx, trailers, and what `h2` has answered itself

    def _receive_head(self, event: ResponseReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is not None:
            stream.receive_fields((bytes(name), bytes(value)) for name, value in event.headers)

    def _receive_data_event(self, event: DataReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None or not event.flow_controlled_length:
            return
        self._h2.increment_flow_control_window(event.flow_controlled_length)
        stream.owed_bytes += event.flow_controlled_length
        if event.data:
            self._take(stream, event.data)

    def _receive_end(self, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        stream.ended = True
        self._deliver(stream)
        # Answered early, the rest of the request is not wanted (RFC 9113, 8.1).
        if not self._remove(stream, reset=ErrorCodes.CANCEL if stream.body_unsent else None):
            return
        if stream.is_short:
            stream.call.fail("protocol", f"{self._origin}: a body that is not as long as announced")
        else:
            stream.call.end()

    def _receive_reset(self, event: StreamReset) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        self._deliver(stream)
        if not self._remove(stream, reset=None):
            return
        if event.error_code == ErrorCodes.REFUSED_STREAM:
            stream.call.unprocessed("refused_stream", f"{self._origin}: the stream was refused")
        else:
            code = event.error_code
            name = code.name if isinstance(code, ErrorCodes) else f"code {code}"
            stream.call.fail("reset", f"{self._origin}: the stream was reset with {name}")

    def _receive_goaway(self, payload: bytes) -> None:
        last_id, code = frames.read_goaway(payload)
        self._draining = True
        if not self._streams:
            self._say_goodbye(ErrorCodes.NO_ERROR)
        for stream in [stream for stream in self._streams.values() if stream.number > last_id]:
            if self._remove(stream, reset=None):
                message = f"{self._origin}: the connection went away (code {code}) before the stream"
                stream.call.unprocessed("refused_stream", message)

    # Bodies.

    def _take(self, stream: Stream, payload: bytes) -> None:
        stream.received_bytes += len(payload)
        if not stream.parts:
            self._touched.append(stream)
        stream.parts.append(payload)

    def _deliver_touched(self) -> None:
        touched = self._touched
        if not touched:
            return
        self._touched = []
        for stream in touched:
            self._deliver(stream)
        self._moderation.reads += len(touched)
        if self._moderation.attentive:
            self._moderation.after_read()

    def _deliver(self, stream: Stream) -> None:
        if stream.parts:
            stream.call.data(stream.take_parts())
            self.give_back(stream)

    def _send_bodies(self) -> None:
        for stream in list(self._sending.values()):
            self._send_body(stream)

    def _send_body(self, stream: Stream) -> None:
        body = stream.call.request.body
        while not self._writing_paused and stream.number in self._sending:
            room = min(self._h2.local_flow_control_window(stream.number), self._h2.max_outbound_frame_size)
            if room <= 0:
                return
            start, end = stream.body_sent, min(stream.body_sent + room, len(body))
            self._h2.send_data(stream.number, body[start:end], end_stream=end == len(body))
            stream.body_sent = end
            stream.call.progressed()
            self._flush()
            if end == len(body):
                del self._sending[stream.number]
                self._loop.call_soon(stream.call.sent)

    # Streams and the connection's life.

    def _refuse(self, stream: Stream, code: ErrorCodes, message: str) -> None:
        """The peer broke a rule on one stream: reset it; the others go on."""
        self._deliver(stream)
        if self._remove(stream, reset=code):
            stream.call.fail("protocol", f"{self._origin}: {message}")

    def _remove(self, stream: Stream, *, reset: ErrorCodes | None) -> bool:
        """Forget the stream and reset it; False when it was forgotten before."""
        if self._streams.pop(stream.number, None) is None:
            return False
        self._sending.pop(stream.number, None)
        stream.parts.clear()
        if reset is not None and not self._transport.is_closing():
            # h2 has closed it already when the peer's end is being told right now.
            with suppress(ProtocolError):
                self._h2.reset_stream(stream.number, reset)
            self._flush()
        if not self._streams:
            if self._draining:
                self._say_goodbye(ErrorCodes.NO_ERROR)
            else:
                self._rest()
        self._owner.capacity_freed(self)
        return True

    def _remove_all(self) -> list[Stream]:
        """Forget every stream of a connection that is over."""
        self._draining = True
        streams = list(self._streams.values())
        self._streams.clear()
        self._sending.clear()
        self._touched.clear()
        return streams

    def _rest(self) -> None:
        """Wait for the next call, for a limited time."""
        self._rested_at = self._loop.time()
        self._idle_timer = self._loop.call_later(self._idle_timeout_s, self._retire)

    def _retire(self) -> None:
        self._draining = True
        self._say_goodbye(ErrorCodes.NO_ERROR)

    def _wake(self) -> None:
        """After a long rest the peer may be gone without a word: ask it together with the first request."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._loop.time() - self._rested_at > _PING_AFTER_S:
            self._h2.ping(b"are you?")
            self._loop.call_later(_PING_TIMEOUT_S, self._check_alive, self._reads)

    def _check_alive(self, reads_before: int) -> None:
        if self._reads == reads_before:
            self._transport.abort()

    def _watch(self) -> None:
        """Once in a while: a peer from which nothing came since is asked whether it lives.

        Nothing else would tell for minutes: a model may think for as long as it likes, and a network that drops
        packets closes no connection.
        """
        if self._transport.is_closing():
            return
        if self._reads == self._reads_seen:
            self._h2.ping(b"alive?\0\0")
            self._flush()
            self._watch_timer = self._loop.call_later(_PING_TIMEOUT_S, self._bury, self._reads)
        else:
            self._reads_seen = self._reads
            self._watch_timer = self._loop.call_later(_PING_SILENT_S, self._watch)

    def _bury(self, reads_before: int) -> None:
        """Whoever lives has answered by now. Its calls are not repeated: the peer may have had them for long."""
        if self._reads != reads_before:
            self._watch()
            return
        streams = self._remove_all()
        self._transport.abort()
        for stream in streams:
            stream.call.fail("closed", f"{self._origin}: the connection is dead: no answer to a PING")

    def _break_off(self, message: str) -> None:
        """The peer broke the rules of the connection: nothing on it can be trusted any more."""
        streams = self._remove_all()
        self._say_goodbye(ErrorCodes.PROTOCOL_ERROR)
        for stream in streams:
            stream.call.fail("protocol", f"{self._origin}: {message}")

    def _say_goodbye(self, code: ErrorCodes) -> None:
        if self._transport.is_closing():
            return
        with suppress(ProtocolError):
            self._h2.close_connection(code)
        self._flush()
        self._transport.close()
        self._close_timer = self._loop.call_later(_CLOSE_TIMEOUT_S, self._transport.abort)

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._transport.write(data)
