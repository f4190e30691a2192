"""Load: so many streams at once, for a while, every one of them looked at to its end."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from bench.answers import Answer
from bench.h1_client import H1Client
from bench.h2_client import H2Client

Wire = Literal["h2", "h1"]

MODEL = "gpt-4o-mini"
_PROMPT = "Say something that takes a while, in plain words, about the history of toll bridges in Europe."
_GOLDEN = 0.6180339887


@dataclass(frozen=True, kw_only=True)
class Wave:
    """What is asked for: `streams` at once, each with `responses` answers one after the other."""

    wire: Wire
    streams: int
    connections: int
    """Of HTTP/2; with HTTP/1.1 every stream has its own."""
    responses: int
    chunks: int
    interval_ms: int
    stagger_s: float = 0.4
    """Streams start spread over this, at times without a common divisor, so that their chunks come evenly."""

    @property
    def requests(self) -> int:
        """Answers in all."""
        return self.streams * self.responses

    @property
    def expected_s(self) -> float:
        """How long it takes where nothing is late."""
        return self.responses * self.chunks * self.interval_ms / 1000 + self.stagger_s


@dataclass(frozen=True)
class Played:
    """What came of a wave."""

    requests: int
    events: int
    elapsed_s: float
    client_cpu_s: float


def body_of(wave: Wave, **more: int) -> bytes:
    """The request: the provider simulator is told how much to say, and how fast."""
    request = {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": _PROMPT}],
        "sim": {**pace_of(wave), **more},
    }
    return json.dumps(request).encode()


def pace_of(wave: Wave) -> dict[str, int]:
    """What the simulator is told, in the request or beforehand."""
    return {"output_tokens": wave.chunks, "tokens_per_chunk": 1, "chunk_interval_ms": wave.interval_ms}


async def play(wave: Wave, base_url: str, tokens: list[str], *, watch: Callable[[], Answer] | None = None) -> Played:
    """Send the load and wait for its end. `watch` makes the answers, where they are to watch for more than most do.

    Raises `BrokenAnswer` unless every answer came whole.
    """
    loop = asyncio.get_running_loop()
    address = urlsplit(base_url)
    host, port = address.hostname or "", address.port or 80
    clients: list[H2Client | H1Client] = []
    for _ in range(wave.connections if wave.wire == "h2" else wave.streams):
        if wave.wire == "h2":
            clients.append((await loop.create_connection(H2Client, host, port))[1])
        else:
            clients.append((await loop.create_connection(H1Client, host, port))[1])
    body = body_of(wave)
    started_s, cpu_s = time.monotonic(), time.process_time()

    async def stream(number: int) -> int:
        await asyncio.sleep(number * _GOLDEN % 1 * wave.stagger_s)
        client = clients[number % len(clients)]
        headers = [("content-type", "application/json"), ("authorization", f"Bearer {tokens[number]}")]
        events = 0
        for _ in range(wave.responses):
            seen = None if watch is None else watch()
            answer = client.request(address.netloc, "/v1/chat/completions", headers, body, answer=seen)
            await answer.ended
            events += answer.check(wave.chunks)
        return events

    try:
        events = sum(await asyncio.gather(*[stream(number) for number in range(wave.streams)]))
    finally:
        for client in clients:
            client.close()
    return Played(wave.requests, events, time.monotonic() - started_s, time.process_time() - cpu_s)
