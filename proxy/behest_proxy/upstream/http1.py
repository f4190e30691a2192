"""An HTTP/1.1 connection: one call at a time, kept alive between calls, closed to cancel one.

A head is composed and read by `heads`, a body by the readers of `bodies`, in one walk per read.
"""

import asyncio
from typing import Protocol

from behest_proxy.upstream.bodies import BodyReader, ChunkedReader, CloseReader, LengthReader, MalformedBody
from behest_proxy.upstream.call import FailureKind
from behest_proxy.upstream.connector import Connected
from behest_proxy.upstream.heads import AnswerHead, HeadReader, MalformedHead, composed
from behest_proxy.upstream.live_call import LiveCall
from behest_proxy.upstream.moderation import Moderation

_SENT_CHECK_S = 0.01
"""How often a request that the kernel did not take at once is looked at."""


class Http1Owner(Protocol):
    """The pool, as such a connection sees it."""

    def released(self, connection: "Http1Connection") -> None:
        """It can take another call."""
        ...

    def lost(self, connection: "Http1Connection") -> None:
        """Its socket is closed."""
        ...


class Http1Connection(asyncio.Protocol):
    """Carries one call at a time."""

    def __init__(
        self, connected: Connected, owner: Http1Owner, *, idle_timeout_s: float, moderation: Moderation
    ) -> None:
        # What each read asks for stands first, on as few lines of the processor's cache as hold it.
        self._call: LiveCall | None = None
        self._received_any = False
        self._request_sent = False
        self._body: BodyReader | None = None
        self._moderation = moderation
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self._transport = connected.transport
        self._raw = connected.raw
        self._proxy = connected.absolute_form_proxy
        self._idle_timeout_s = idle_timeout_s
        self._idle_timer: asyncio.TimerHandle | None = None
        self._head: HeadReader | None = None
        self._unsent_bytes = 0
        self._calls_carried = 0
        self._keep_alive = False
        self._reading_paused = False
        self.closed: asyncio.Future[None] = self._loop.create_future()
        connected.transport.set_protocol(self)

    # What the pool asks.

    @property
    def transport(self) -> asyncio.Transport:
        """What it speaks over."""
        return self._transport

    @property
    def usable(self) -> bool:
        """It is idle and its peer has not closed it, as far as is known."""
        return self._call is None and not self._transport.is_closing()

    @property
    def fresh(self) -> bool:
        """It has carried no call yet, so its peer cannot have grown tired of it."""
        return not self._calls_carried

    def start(self, call: LiveCall) -> None:
        """Write the whole request. The connection must be usable."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        self._call = call
        self._body = None
        self._request_sent = False
        self._received_any = False
        self._calls_carried += 1
        call.carried_by(self)
        if call.is_paused:
            self.paused(call)
        self._head = HeadReader()
        self._transport.write(self._compose(call))
        self._unsent_bytes = self._buffered()
        self._loop.call_soon(self._check_sent, call)

    def rest(self) -> None:
        """Wait for the next call, for a limited time."""
        self._idle_timer = self._loop.call_later(self._idle_timeout_s, self._transport.close)

    def close(self) -> None:
        """Close, and fail the call that it carries."""
        call, self._call = self._call, None
        if call is None:
            self._transport.close()
            return
        self._transport.abort()
        call.fail("closed", f"{call.request.origin}: this client is closed", now=True)

    def abort(self) -> None:
        """Close without any farewell."""
        self._transport.abort()

    # What the call asks (Carrier).

    def dropped(self, call: LiveCall) -> None:
        """HTTP/1.1 has no other way to cancel than to close."""
        if call is self._call:
            self._call = None
            self._transport.abort()

    def paused(self, call: LiveCall) -> None:
        """The kernel's buffer fills, then the peer's: that stops it."""
        if call is self._call and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def resumed(self, call: LiveCall) -> None:
        """Read again."""
        if call is self._call:
            self._resume_reading()

    # What the transport tells.

    def data_received(self, data: bytes) -> None:
        """Walk one read through to the handler."""
        call = self._call
        if call is None:
            # Nobody asked: whatever it is, the next answer could be taken for another one's.
            self._transport.abort()
            return
        self._received_any = True
        if not self._request_sent and not self._buffered():
            self._note_sent(call)
        try:
            if self._body is None:
                data = self._receive_head(call, data)
                if self._body is None or self._call is not call:
                    return
            payload = self._body.feed(data) if data else b""
        except MalformedBody as error:
            self._break_off(call, f"malformed body: {error}")
            return
        if payload:
            call.data(payload)
            moderation = self._moderation
            moderation.reads += 1
            if moderation.attentive:
                moderation.after_read()
        if self._body.complete and self._call is call:
            self._finish(call)

    def eof_received(self) -> None:
        """The peer sends no more: a body's end, or too early; the transport then closes itself."""
        call = self._call
        if call is not None and self._body is not None and self._body.ends_with_connection:
            self._keep_alive = False
            self._finish(call)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed, by whomever."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        call, self._call = self._call, None
        if not self.closed.done():
            self.closed.set_result(None)
        self._owner.lost(self)
        if call is None:
            return
        how: FailureKind = "reset" if exc is not None else "closed"
        if self._calls_carried > 1 and not self._received_any:
            call.unanswered(how, f"{call.request.origin}: the connection was {how} before any answer")
        else:
            when = "in the middle of the answer" if call.head_received else "before an answer"
            call.fail(how, f"{call.request.origin}: the connection was {how} {when}")

    # Inside.

    def _compose(self, call: LiveCall) -> bytes:
        request = call.request
        headers = [(b"host", request.origin.authority.encode("ascii")), *request.headers]
        target = request.target
        if self._proxy is not None:
            target = str(request.origin).encode("ascii") + target
            if self._proxy.authorization is not None:
                headers.append((b"proxy-authorization", self._proxy.authorization))
        return composed(request.method, target, headers) + request.body

    def _check_sent(self, call: LiveCall) -> None:
        """Tell the call when no byte of its request is left in this process, under TLS or above it."""
        if call is not self._call or self._request_sent:
            return
        buffered = self._buffered()
        if not buffered:
            self._note_sent(call)
            return
        if buffered < self._unsent_bytes:
            self._unsent_bytes = buffered
            call.progressed()
        self._loop.call_later(_SENT_CHECK_S, self._check_sent, call)

    def _note_sent(self, call: LiveCall) -> None:
        self._request_sent = True
        call.sent()

    def _buffered(self) -> int:
        buffered = self._transport.get_write_buffer_size()
        return buffered if self._raw is self._transport else buffered + self._raw.get_write_buffer_size()

    def _receive_head(self, call: LiveCall, data: bytes) -> bytes:
        """Feed the head's parser; when the head is whole, tell the call and return what came behind it."""
        assert self._head is not None
        try:
            found = self._head.feed(data)
        except MalformedHead as error:
            self._break_off(call, str(error))
            return b""
        if found is None:
            return b""
        head, rest = found
        self._head = None
        self._body = _reader_for(head)
        self._keep_alive = head.keeps_alive
        if head.is_chunked:
            self._moderation.answer_begins(self._raw)
        call.head(head.status, head.headers)
        return rest

    def _finish(self, call: LiveCall) -> None:
        """The answer is whole: let go of the call, keep the connection if it can be kept, then tell the call."""
        assert self._body is not None
        self._call = None
        self._resume_reading()
        keep = self._keep_alive and self._request_sent and not self._body.surplus
        if keep and not self._transport.is_closing():
            self._owner.released(self)
        elif self._request_sent:
            self._transport.close()
        else:
            self._transport.abort()
        call.end()

    def _break_off(self, call: LiveCall, message: str) -> None:
        self._call = None
        self._transport.abort()
        call.fail("protocol", f"{call.request.origin}: {message}")

    def _resume_reading(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()


def _reader_for(head: AnswerHead) -> BodyReader:
    """RFC 9112, 6.3."""
    if head.is_chunked:
        return ChunkedReader()
    return CloseReader() if head.length is None else LengthReader(head.length)
