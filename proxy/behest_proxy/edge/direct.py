"""Direct writes: the ASGI extension by which an application writes a streamed answer without awaiting.

Under ASGI every chunk is `await send(...)`: a coroutine, a dict, and in most servers a queue and a task
switch. A gateway forwards thousands of small chunks a second, each of which arrives in some other
protocol's `data_received`; there nothing can be awaited, and nothing needs to be. So the edge puts a
`DirectStream` into the scope, and the application calls `write` from wherever the bytes arrive.

    stream = direct_stream(scope)
    if stream is not None:
        stream.on_gone = call.cancel
        stream.on_resume = call.resume
        stream.begin(200, [(b"content-type", b"text/event-stream")])
        ...
        stream.write(event)
        if stream.paused:
            call.pause()
        ...
        stream.end()

The extension is absent under any other ASGI server; `direct_stream` then returns None and the application
falls back to `send`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

EXTENSION = "behest.direct"
"""Name of the extension in `scope["extensions"]`; its value is `{"stream": DirectStream}`."""

Header = tuple[bytes, bytes]


class DirectStream(Protocol):
    """The answer to one request, written synchronously from the event loop's thread.

    Order: `begin`, any number of `write`, then `end` or `reset`. Once `begin` was called, ASGI's `send` must
    not be used for this request; before it, the application may still answer by `send` (errors, JSON). The
    request's body comes by `receive` either way. The application's coroutine may return once `end` or
    `reset` was called or the client is gone; if it returns earlier, the edge resets the stream, because an
    answer that was cut must never look complete.

    Callbacks are called synchronously from inside the edge and must not raise (what they raise is logged
    and dropped). They may call any method of any stream.
    """

    on_gone: Callable[[], None] | None
    """Called once when the answer can no longer reach the client: it reset the stream, closed the connection
    (a half-close counts: over TCP it cannot be told from a close), overflowed its buffer, read nothing for
    too long, or the server's grace period ended. Never called after the end was handed to the transport,
    nor for the application's own `reset`. It may be called from inside `write` (overflow)."""

    on_resume: Callable[[], None] | None
    """Called whenever `paused` goes from True to False. Not called once `end` was called."""

    @property
    def paused(self) -> bool:
        """True while the client's flow-control window or the socket's write buffer is full: stop producing.

        The write that meets the pause is kept whole (a producer learns of it only afterwards). Bytes that are written
        nevertheless are kept up to `EdgeLimits.stream_buffer_bytes`; beyond it the stream is cut.
        """
        ...

    @property
    def gone(self) -> bool:
        """True once the client can no longer be reached. Writes are then dropped without an error."""
        ...

    def begin(self, status: int, headers: Sequence[Header]) -> None:
        """Send the head of the answer. `date` and `server` are added; connection-level headers are dropped.

        Raises RuntimeError when an answer was begun already, ValueError for a header that could split the
        answer (control characters in a name or value). Does nothing when the client is gone.
        """
        ...

    def write(self, data: bytes) -> None:
        """Send body bytes: one DATA frame or one chunk, handed to the transport at once when nothing blocks.

        Chunks that arrive together are best joined into one call. Never raises when the client is gone.
        Raises RuntimeError before `begin` and after `end`.
        """
        ...

    def end(self) -> None:
        """End the answer properly, after everything that is still buffered. Repeated calls do nothing."""
        ...

    def reset(self) -> None:
        """Break the answer visibly: RST_STREAM(INTERNAL_ERROR), or close the connection without a proper end."""
        ...


def direct_stream(scope: Mapping[str, Any]) -> DirectStream | None:
    """The direct stream of an ASGI http scope, or None under a server that does not offer one."""
    extensions: Mapping[str, Any] = scope.get("extensions") or {}
    extension: Mapping[str, Any] | None = extensions.get(EXTENSION)
    return None if extension is None else cast("DirectStream", extension["stream"])
