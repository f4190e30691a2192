"""One HTTP/1.1 connection of the edge: `h11` reads requests and frames heads, body chunks are composed here.

Reading never waits for the application, so a client that leaves is noticed at once, also in the middle of
an answer. What may pile up is bounded: the head by `header_list_bytes`, a body that nobody reads by
`request_window_bytes` and further pipelined requests by `pipelined_bytes`; at the latter two the socket is
no longer read, and TCP holds the client back.
"""

import asyncio
import logging

import h11

from behest_proxy.edge.connection import ClientConnection
from behest_proxy.edge.heads import BadHead, answer_headers
from behest_proxy.edge.host import EdgeHost
from behest_proxy.edge.http1_stream import Http1Stream, reason_phrase
from behest_proxy.errors import InvalidRequest

log = logging.getLogger(__name__)


class Http1Connection(ClientConnection):
    """A client's HTTP/1.1 (or 1.0) connection: one request at a time."""

    def __init__(self, host: EdgeHost) -> None:
        super().__init__(host)
        self.machine = h11.Connection(h11.SERVER, max_incomplete_event_size=host.limits.header_list_bytes)
        self.stream: Http1Stream | None = None
        self.last_request = False
        self._requests = 0
        self._pipelined = bytearray()
        self._reading = True
        self._head_begun = False

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        super().connection_made(transport)
        self._set_timer(self.host.limits.idle_timeout_s)

    def data_received(self, data: bytes) -> None:
        """One read: body of the running request, a new request, or a pipelined one that has to wait."""
        if not self.is_open:
            self._drop(data)
            return
        if self._pipelined or (self.stream is not None and self.machine.their_state is not h11.SEND_BODY):
            self._pipelined += data
            if len(self._pipelined) > self.host.limits.pipelined_bytes:
                self._pause_reading()
            return
        self.machine.receive_data(data)
        self.advance()

    def pause_writing(self) -> None:
        """The socket does not take more."""
        self.write_paused = True
        if self.stream is not None:
            self.stream.paused = True

    def resume_writing(self) -> None:
        """The socket drained."""
        self.write_paused = False
        if self.stream is not None and self.stream.paused:
            self.stream.resumed()

    # --- requests

    def advance(self) -> None:
        """Take out of `h11` what is there, as far as the application keeps up."""
        limit = self.host.limits.request_window_bytes
        while self.is_open:
            if self.stream is not None and self.stream.unread_bytes >= limit:
                self._pause_reading()
                return
            try:
                event = self.machine.next_event()
            except h11.RemoteProtocolError as error:
                self._refuse(error.error_status_hint, str(error))
                return
            if event is h11.NEED_DATA:
                self._await_more()
                return
            match event:
                case h11.Request():
                    self._request_received(event)
                case h11.Data() if self.stream is not None:
                    self.stream.feed_body(bytes(event.data))
                case h11.EndOfMessage() if self.stream is not None:
                    self.stream.complete_body()
                    self._hold_trailing()
                    return
                case _:
                    return  # PAUSED or ConnectionClosed: nothing more before the next cycle

    def _await_more(self) -> None:
        """The head, or the body, is not complete yet. A head has a deadline that further bytes do not move."""
        self._resume_reading()
        if self.stream is None and not self._head_begun and self.machine.trailing_data[0]:
            self._head_begun = True
            self._set_timer(self.host.limits.head_timeout_s)

    def _hold_trailing(self) -> None:
        """What came behind this request waits for its answer. `h11` keeps it; only more is held here."""
        if len(self.machine.trailing_data[0]) > self.host.limits.pipelined_bytes:
            self._pause_reading()
        else:
            self._resume_reading()

    def _request_received(self, request: h11.Request) -> None:
        self._cancel_timer()
        self._head_begun = False
        size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
        if size > self.host.limits.header_list_bytes:  # h11 looks at incomplete heads only
            self._refuse(431, "the request's head is too large")
            return
        if request.method == b"CONNECT":
            self._refuse(501, "CONNECT is not offered")
            return
        try:
            scope = self._scope_of(
                http_version=request.http_version.decode("ascii"),
                method=request.method,
                target=request.target,
                headers=list(request.headers),
            )
        except BadHead as error:
            self._refuse(400, str(error))
            return
        self._requests += 1
        most = self.host.limits.connection_requests
        self.last_request = self.host.draining or (most is not None and self._requests >= most)
        self.stream = Http1Stream(host=self.host, scope=scope, connection=self)
        self.stream.paused = self.write_paused
        self.stream.start()

    def _refuse(self, status: int, reason: str) -> None:
        """Answer a request that no application sees, and close: what follows cannot be told apart any more."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.lose()
        if self.machine.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = InvalidRequest(reason).envelope()
            headers = answer_headers([(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))])
            answer = h11.Response(
                status_code=status,
                headers=[*headers, (b"connection", b"close")],
                reason=reason_phrase(status),
            )
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.machine.send(event) or b"")
            self._linger()
        else:
            self.abort()

    # --- called by the stream

    def answered(self) -> None:
        """The answer was handed over: take the next request, or close."""
        self.stream = None
        keep = not self.last_request and self.machine.their_state is h11.DONE
        if not keep or self.machine.our_state is not h11.DONE:
            if self.machine.their_state in (h11.SEND_BODY, h11.SEND_RESPONSE):
                self._linger()
            else:
                self._close()
            return
        self.machine.start_next_cycle()
        self._set_timer(self.host.limits.idle_timeout_s)
        # Not from inside the application's call: a pipelined request would nest in it.
        self.host.loop.call_soon(self._next_request)

    def _next_request(self) -> None:
        if not self.is_open or self.stream is not None:
            return
        held, self._pipelined = bytes(self._pipelined), bytearray()
        if held:
            self.machine.receive_data(held)
        self.advance()

    def continue_body(self) -> None:
        """The application wants the body of a client that waits for `100 Continue` (RFC 9110, 10.1.1)."""
        if self.is_open and self.machine.they_are_waiting_for_100_continue:
            head = self.machine.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))
            self.transport.write(head or b"")

    # --- endings

    def drain(self) -> None:
        """Close after the running request; at once without one."""
        self.last_request = True
        if self.stream is None and self.is_open and not self._head_begun:
            self._close()

    def cut(self) -> None:
        """Break the running answer; without one just close."""
        if self.stream is not None:
            self.stream.cut()
        elif self.is_open:
            self._close()

    def _lose(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.lose()

    def _linger(self) -> None:
        self._resume_reading()
        super()._linger()

    def _set_timer(self, delay_s: float) -> None:
        self._call_later(delay_s, self._timed_out)

    def _timed_out(self) -> None:
        self._timer = None
        if not self.is_open or self.transport.get_write_buffer_size():
            self.abort()  # closing would wait for a client that takes nothing
        elif self._head_begun:
            self._refuse(408, "the request's head took too long")
        else:
            self._close()

    def _pause_reading(self) -> None:
        if self._reading and self.is_open:
            self._reading = False
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if not self._reading and self.is_open:
            self._reading = True
            self.transport.resume_reading()
