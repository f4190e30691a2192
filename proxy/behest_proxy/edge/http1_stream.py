"""One HTTP/1.1 answer: heads and ends by `h11`, chunks composed here.

A chunk is its length in hex, a line end, the bytes, a line end (RFC 9112, 7.1). `h11` would say the same in
20 µs; its state machine does not move for it, so it is not asked. Answers with a content-length go through
`h11`, which counts them; answers to HTTP/1.0 end with the connection.
"""

from collections.abc import Sequence
from enum import Enum
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import h11

from behest_proxy.edge.direct import Header
from behest_proxy.edge.heads import answer_headers, asks_to_close
from behest_proxy.edge.host import EdgeHost
from behest_proxy.edge.served import ServedRequest

if TYPE_CHECKING:
    from behest_proxy.edge.http1 import Http1Connection


class Framing(Enum):
    """How the end of a body is told (RFC 9112, 6.3)."""

    CHUNKED = "chunked"
    COUNTED = "content-length"
    CLOSE = "close"


class Http1Stream(ServedRequest):
    """The request that an `Http1Connection` is answering."""

    __slots__ = ("_chunked", "_connection", "_framing", "_transport", "_version")

    def __init__(self, *, host: EdgeHost, scope: dict[str, Any], connection: "Http1Connection") -> None:
        super().__init__(host=host, scope=scope)
        self._connection = connection
        self._transport = connection.transport
        self._version: str = scope["http_version"]
        self._framing = Framing.CHUNKED
        self._chunked = False

    @property
    def buffered_bytes(self) -> int:
        """The transport's write buffer: this answer has the connection to itself."""
        return 0 if self.closed else self._transport.get_write_buffer_size()

    @property
    def unread_bytes(self) -> int:
        """Body bytes that the application has not taken yet."""
        return len(self._body)

    def write(self, data: bytes) -> None:
        """See `DirectStream.write`."""
        if not self.open:
            self._refuse_write()
            return
        if not data or self.suppressed:
            return
        if self._chunked:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._write_unchunked(data)
        if self.paused:
            self._kept(len(data))

    def _write_unchunked(self, data: bytes) -> None:
        if self._framing is Framing.COUNTED:
            try:
                data = self._connection.machine.send(h11.Data(data=data)) or b""
            except h11.LocalProtocolError as error:
                self.reset()
                raise RuntimeError("more bytes than the answer's content-length") from error
        self._transport.write(data)

    def _send_head(self, status: int, headers: Sequence[Header]) -> None:
        connection = self._connection
        lines = answer_headers(headers)
        # A body that is still coming would have to be read to its end before the next request is found.
        unread = connection.machine.their_state is h11.SEND_BODY
        if unread or asks_to_close(headers) or self._host.draining:
            connection.last_request = True
        if connection.last_request:
            lines.append((b"connection", b"close"))
        if self._version == "1.0":
            self._framing = Framing.CLOSE
        if any(name == b"content-length" for name, _ in lines):
            self._framing = Framing.COUNTED
        self._chunked = self._framing is Framing.CHUNKED
        try:
            head = connection.machine.send(
                h11.Response(status_code=status, headers=lines, reason=reason_phrase(status))
            )
        except h11.LocalProtocolError as error:
            raise ValueError(str(error)) from error
        self._transport.write(head or b"")
        self.open = True
        self.paused = connection.write_paused

    def _send_end(self) -> None:
        connection = self._connection
        try:
            data = connection.machine.send(h11.EndOfMessage())
        except h11.LocalProtocolError:  # fewer bytes than its content-length: must not look complete
            self.reset()
            raise
        if data:
            self._transport.write(data)
        self._finish()
        connection.answered()

    def _break_wire(self) -> None:
        self._connection.stream = None
        self._connection.abort()

    def _body_wanted(self) -> None:
        self._connection.continue_body()

    def _body_taken(self) -> None:
        self._connection.advance()


def reason_phrase(status: int) -> str:
    """The reason phrase of a status line; empty for a status that has none."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
