"""The client's end of a streamed answer, under whichever server the application runs.

Our own edge offers direct writes; under any other ASGI server the same calls go through a bounded queue and
`await send(...)`. Slower, and the disconnect is learned from `receive`, but the same application.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from behest_proxy.edge.direct import DirectStream, Header, direct_stream

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]
BUFFER_BYTES_HIGH = 64 * 1024
BUFFER_BYTES_MAX = 256 * 1024
"""Of what was written while the client was known not to keep up; the write that made the pause is kept whole."""


class QueuedStream:
    """A `DirectStream` over ASGI's `send`. `run` carries out what the synchronous calls asked for."""

    def __init__(self, send: Any, receive: Any) -> None:
        self.on_gone: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self.paused = False
        self.gone = False
        self.buffered_bytes = 0
        self._late_bytes = 0  # written since the pause began
        self._send = send
        self._receive = receive
        self._messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._ended = False

    def begin(self, status: int, headers: Sequence[Header]) -> None:
        """Send the head."""
        self._messages.put_nowait({"type": "http.response.start", "status": status, "headers": list(headers)})

    def write(self, data: bytes) -> None:
        """Send body bytes; a client that lets too much pile up is given up."""
        if self.gone:
            return
        self.buffered_bytes += len(data)
        if self.paused:
            self._late_bytes += len(data)
            if min(self._late_bytes, self.buffered_bytes) > BUFFER_BYTES_MAX:
                self._leave()
                return
        elif self.buffered_bytes > BUFFER_BYTES_HIGH:
            self.paused = True
            self._late_bytes = 0
        self._messages.put_nowait({"type": "http.response.body", "body": data, "more_body": True})

    def end(self) -> None:
        """End the answer properly."""
        self._ended = True
        self._messages.put_nowait({"type": "http.response.body", "body": b"", "more_body": False})
        self._messages.put_nowait(None)

    def reset(self) -> None:
        """Break the answer: the coroutine ends without its last message, and the server cuts the connection."""
        self._ended = True
        self._messages.put_nowait(None)

    async def watch(self) -> None:
        """Learn of the client's going. Run beside everything else once the request's body was read."""
        while not self.gone and not self._ended:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._leave()

    async def run(self) -> None:
        """Send what was written, until the end."""
        while (message := await self._messages.get()) is not None:
            try:
                await self._send(message)
            except OSError:
                self._leave()
                return
            self.buffered_bytes -= len(message.get("body", b""))
            if self.paused and self.buffered_bytes <= BUFFER_BYTES_HIGH // 2:
                self.paused = False
                if self.on_resume is not None and not self._ended:
                    self.on_resume()

    def _leave(self) -> None:
        if self.gone or self._ended:
            return
        self.gone = True
        self._messages.put_nowait(None)
        if self.on_gone is not None:
            self.on_gone()


ClientStream = DirectStream | QueuedStream


def client_stream(scope: Any, receive: Any, send: Any) -> ClientStream:
    """The stream of a request: direct where the server offers it."""
    return direct_stream(scope) or QueuedStream(send, receive)
