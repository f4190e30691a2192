"""Interrupt moderation for reads: while many streams speak at once, their chunks are taken up together.

A chunk that comes alone costs a wake-up of the process, a `read`, a `write` and cold caches: several times what is done
for it. Network cards have had the same problem for decades, and hold an interrupt back for some microseconds until
more packets have come. Here the event loop's thread sleeps for a few milliseconds before it asks the kernel again; what
has come meanwhile is served in one turn, and all of it that goes to one HTTP/2 client leaves in one write.

Nobody waits where nothing is gained: not while chunks are few, and not while a request waits for the ledger.

While streams are busy, their acknowledgements are moderated too. Linux acknowledges each small read at once, which
costs as much again as the read; and only every second one where it is told to (tcp(7), TCP_QUICKACK), as RFC 9293,
3.8.6.3, wants it. A provider that gathers small writes until the last one is acknowledged (Nagle's algorithm) waits for
40 ms, once: the kernel notices, and acknowledges that connection's reads at once from then on.
"""

import asyncio
import socket
import sys
import time
from contextlib import suppress

PERIOD_S = 0.1
"""How often it is looked at how busy the streams are."""
TOGETHER_MIN = 4
"""Reads that must be expected within one interval before anybody waits for them."""


class Moderation:
    """Holds the loop's next turn back until `interval_s` after the one before. It belongs to one event loop."""

    __slots__ = ("_interval_s", "_is_busy", "_is_watching", "_turn_s", "attentive", "reads", "urgent")

    def __init__(self, interval_s: float = 0.0) -> None:
        """0: nothing is ever held back."""
        self._interval_s = interval_s
        self.reads = 0
        """Reads that streams had since it was last looked at. Whoever reads counts it up, then looks at `attentive`."""
        self.attentive = interval_s > 0
        """`after_read` is to be called: the streams are busy and this turn is not held back yet, or nobody watches."""
        self.urgent = 0
        """So much is under way for which a millisecond counts: meanwhile nothing is held back."""
        self._is_busy = False
        self._is_watching = False
        self._turn_s = 0.0

    def after_read(self) -> None:
        """Sleep when what was read in this turn of the loop has left; or, after a silence, begin to watch."""
        self.attentive = False
        loop = asyncio.get_running_loop()
        if self._is_watching:
            # In the next turn frames that wait for each other go to their transports, and behind it out of the process.
            loop.call_soon(loop.call_soon, self._sleep)
        else:
            self._is_watching = True
            loop.call_later(PERIOD_S, self._look)

    def answer_begins(self, transport: asyncio.BaseTransport) -> None:
        """A streamed answer comes over this TCP connection alone. Where it belongs to many, fewer acknowledgements do.

        Said anew for each answer, because the kernel forgets it over a pause of 40 ms.
        """
        if self._is_busy and sys.platform == "linux":
            connection: socket.socket | None = transport.get_extra_info("socket")
            if connection is not None:
                with suppress(OSError):  # it is gone already, as its reader will be told
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)

    def _sleep(self) -> None:
        now_s = time.monotonic()
        until_s = self._turn_s + self._interval_s
        if now_s < until_s and not self.urgent:
            time.sleep(until_s - now_s)  # the loop's own thread, on purpose
            now_s = until_s
        self._turn_s = now_s
        self.attentive = self._is_busy or not self._is_watching

    def _look(self) -> None:
        """Every so often, until the streams have been silent for a while."""
        was_busy, self._is_busy = self._is_busy, self.reads * self._interval_s >= TOGETHER_MIN * PERIOD_S
        self._is_watching = self.reads > 0
        if was_busy != self._is_busy or not self._is_watching:  # otherwise this turn may be held back already
            self.attentive = self._is_busy or not self._is_watching
        self.reads = 0
        if self._is_watching:
            asyncio.get_running_loop().call_later(PERIOD_S, self._look)
