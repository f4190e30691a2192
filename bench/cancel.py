"""How long after a client's reset the provider sees the cancel, through the whole sidecar.

Both clocks are CLOCK_MONOTONIC, which all processes of a Linux machine share: the client stamps its reset, the
simulator the moment in which RST_STREAM or the end of the connection arrives.
"""

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Literal, cast
from urllib.parse import urlsplit

from bench.answers import BrokenAnswer
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived

Wire = Literal["h2", "h1"]
WIRES: tuple[Wire, ...] = ("h2", "h1")
STREAMS = 200
AT_ONCE = 20
CHUNKS_BEFORE = 5
_ALL_S = 90.0
_LATE_S, _LATE_TRIES = 0.5, 20
"""For those who are slow to tell the provider."""
PACE = {"output_tokens": 100_000, "tokens_per_chunk": 1, "chunk_interval_ms": 20}
_numbers = count(1)


def _body(user: str) -> bytes:
    """What is asked for; the simulator remembers who asked."""
    return json.dumps(
        {
            "model": "gpt-4o-mini",
            "stream": True,
            "messages": [{"role": "user", "content": "Say something that takes a while."}],
            "user": user,
            "sim": PACE,
        }
    ).encode()


@dataclass(frozen=True)
class Latencies:
    """Milliseconds from reset to cancel, sorted."""

    wire: Wire
    sorted_ms: list[float]

    def at(self, share: float) -> float:
        """The latency that this share of the streams does not exceed."""
        return self.sorted_ms[min(len(self.sorted_ms) - 1, int(share * len(self.sorted_ms)))]

    def line(self) -> str:
        """The figure's last line."""
        return (
            f"cancel-{self.wire}: p50 {self.at(0.5):.1f} ms, p99 {self.at(0.99):.1f} ms, "
            f"most {self.sorted_ms[-1]:.1f} ms, over {len(self.sorted_ms)} streams"
        )


class _Http2(asyncio.Protocol):
    """One stream on a connection of its own, reset after some events."""

    def __init__(self, authority: str, token: str, body: bytes) -> None:
        self._authority, self._token, self._body = authority, token, body
        self._h2 = H2Connection(H2Configuration(client_side=True))
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self._transport = cast("asyncio.Transport", transport)
        self._h2.initiate_connection()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", self._authority),
            (":path", "/v1/chat/completions"),
            ("authorization", f"Bearer {self._token}"),
            ("content-type", "application/json"),
        ]
        self._h2.send_headers(1, headers)
        self._h2.send_data(1, self._body, end_stream=True)
        self._transport.write(self._h2.data_to_send())

    def data_received(self, data: bytes) -> None:
        """Read some events, then reset."""
        for event in self._h2.receive_data(data):
            if isinstance(event, DataReceived):
                self._h2.acknowledge_received_data(event.flow_controlled_length or 0, 1)
                self._events += (event.data or b"").count(b"data: ")
        if self._events >= CHUNKS_BEFORE and not self.done.done():
            self._h2.reset_stream(1, ErrorCodes.CANCEL)
            self.done.set_result(time.monotonic_ns())
        self._transport.write(self._h2.data_to_send())

    def close(self) -> None:
        """Close the connection, long after the stream was reset."""
        self._transport.close()


class _Http1(asyncio.Protocol):
    """One stream on a connection of its own, closed after some events."""

    def __init__(self, authority: str, token: str, body: bytes) -> None:
        self._authority, self._token, self._body = authority, token, body
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._authority}\r\nauthorization: Bearer {self._token}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(self._body)}\r\n\r\n".encode()
            + self._body
        )

    def data_received(self, data: bytes) -> None:
        """Read some events, then close."""
        self._read += data
        if self._read.count(b"data: ") >= CHUNKS_BEFORE and not self.done.done():
            self._transport.abort()
            self.done.set_result(time.monotonic_ns())

    def close(self) -> None:
        """It is closed."""


async def leave(wire: Wire, base_url: str, token: str, *, user: str = "bench") -> _Http1 | _Http2:
    """Begin a stream and reset it after some events; its connection is the caller's to close."""
    address = urlsplit(base_url)
    made = _Http2 if wire == "h2" else _Http1
    _, client = await asyncio.get_running_loop().create_connection(
        lambda: made(address.netloc, token, _body(user)), address.hostname or "", address.port or 80
    )
    await client.done
    return client


async def measure(
    wire: Wire, base_url: str, upstream_url: str, token: str, say: Callable[[str], None], *, streams: int = STREAMS
) -> Latencies:
    """Reset so many streams, `AT_ONCE` at a time, and ask the simulator when it saw each."""
    stamps: dict[str, int] = {}
    say(f"cancel-{wire}: {streams} streams, {AT_ONCE} at a time")

    async def one() -> None:
        user = f"leaves-{next(_numbers)}"
        client = await leave(wire, base_url, token, user=user)
        stamps[user] = await client.done
        await asyncio.sleep(0.2)
        client.close()

    async with asyncio.timeout(_ALL_S):
        for _ in range(max(1, streams // AT_ONCE)):
            await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    seen: dict[str, int | None] = {}
    for _ in range(_LATE_TRIES):
        seen = await asyncio.to_thread(_seen, upstream_url)
        if all(seen.get(user) is not None for user in stamps):
            break
        await asyncio.sleep(_LATE_S)
    missing = [user for user in stamps if seen.get(user) is None]
    if missing:
        raise BrokenAnswer(f"the provider never saw the cancel of {len(missing)} streams of {len(stamps)}")
    return Latencies(wire, sorted((cast("int", seen[user]) - at_ns) / 1e6 for user, at_ns in stamps.items()))


def _seen(upstream_url: str) -> dict[str, int | None]:
    url = upstream_url.rstrip("/").removesuffix("/v1") + "/sim/requests?limit=10000"
    with urllib.request.urlopen(url) as answer:
        return {(row["body"] or {}).get("user", ""): row["cancelled_monotonic_ns"] for row in json.load(answer)}
