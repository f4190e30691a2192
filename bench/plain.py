"""Whole answers, not streamed: how many a second, and what each costs."""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from bench.answers import BrokenAnswer
from bench.cpu import cpu_s
from bench.load import MODEL
from bench.peers import Peer

CLIENTS = 16
_BODY = json.dumps(
    {
        "model": MODEL,
        "messages": [{"role": "user", "content": "How far is it?"}],
        "sim": {"output_tokens": 20},
    }
).encode()


@dataclass(frozen=True)
class Throughput:
    """Of `CLIENTS` that ask as soon as they are answered, over HTTP/1.1 connections that stay open."""

    per_second: float
    cpu_ms: float
    """Of the gateway's process."""


class _Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._read = b""
        self._answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def ask(self, request: bytes) -> "asyncio.Future[None]":
        """Done once the answer is whole."""
        self._read = b""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, found, body = self._read.partition(b"\r\n\r\n")
        if not found or self._answered is None:
            return
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            whole = body.endswith(b"0\r\n\r\n")
        else:
            whole = len(body) >= int(lower.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if whole and not self._answered.done():
            if head.split(b" ", 2)[1] != b"200" or b'"usage"' not in body:
                self._answered.set_exception(BrokenAnswer(f"no answer: {self._read[:300]!r}"))
            else:
                self._answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or BrokenAnswer("the connection was closed"))

    def close(self) -> None:
        """Leave."""
        self._transport.close()


async def measure(peer: Peer, seconds: float) -> Throughput:
    """Ask for so long, after a moment to warm up. `peer.pid` 0: nobody's CPU counts."""
    address = urlsplit(peer.base_url)
    loop = asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(_Client, address.hostname or "", address.port or 80))[1] for _ in range(CLIENTS)
    ]
    await _asked(clients, address.netloc, peer.tokens, min(1.0, seconds / 3))
    started_s, used_s = time.monotonic(), cpu_s(peer.pid)
    answers = await _asked(clients, address.netloc, peer.tokens, seconds)
    elapsed_s = time.monotonic() - started_s
    used_s = cpu_s(peer.pid) - used_s
    for client in clients:
        client.close()
    return Throughput(answers / elapsed_s, used_s / answers * 1e3)


async def _asked(clients: list[_Client], authority: str, tokens: list[str], seconds: float) -> int:
    until_s = time.monotonic() + seconds

    async def ask(number: int) -> int:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {authority}\r\nauthorization: Bearer {tokens[number]}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(_BODY)}\r\n\r\n"
        )
        answers = 0
        while time.monotonic() < until_s:
            await clients[number].ask(head.encode() + _BODY)
            answers += 1
        return answers

    return sum(await asyncio.gather(*(ask(number) for number in range(len(clients)))))
