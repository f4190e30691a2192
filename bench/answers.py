"""What the load's clients know of one streamed answer: how many events came, and that it was whole."""

import asyncio

_DONE = b"data: [DONE]\n\n"
EVENTS_BESIDE_CHUNKS = 4
"""The event with the role, the one with the finish_reason, the one with the usage, and `[DONE]`."""


class BrokenAnswer(Exception):
    """An answer that is not what was asked for: then the figures mean nothing."""


class Answer:
    """One answer under way. Cheap: a count and the last bytes."""

    __slots__ = ("_events", "_tail", "ended", "status")

    def __init__(self) -> None:
        self.status = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events = 0
        self._tail = b""

    def feed(self, data: bytes) -> None:
        """Body bytes."""
        self._events += data.count(b"\n\n")
        if data[:1] == b"\n" and self._tail[-1:] == b"\n":
            self._events += 1  # a blank line that was cut in two
        self._tail = data[-16:] if len(data) >= 16 else (self._tail + data)[-16:]

    def end(self) -> None:
        """The body's end."""
        if not self.ended.done():
            self.ended.set_result(None)

    def fail(self, error: Exception) -> None:
        """The answer broke."""
        if not self.ended.done():
            self.ended.set_exception(error)

    def check(self, chunks: int) -> int:
        """The number of its events. Raises `BrokenAnswer` unless all came, with `[DONE]` as the last."""
        if self.status != 200 or not self._tail.endswith(_DONE) or self._events != chunks + EVENTS_BESIDE_CHUNKS:
            raise BrokenAnswer(
                f"status {self.status}, {self._events} events of {chunks + EVENTS_BESIDE_CHUNKS}, end {self._tail!r}"
            )
        return self._events
