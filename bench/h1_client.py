"""A lean HTTP/1.1 client: one connection that is kept alive, one answer at a time."""

import asyncio
from typing import cast

from bench.answers import Answer, BrokenAnswer

from behest_proxy.upstream.bodies import ChunkedReader


class H1Client(asyncio.Protocol):
    """One connection. `request` may be called again once the answer before has ended."""

    def __init__(self) -> None:
        self._answer: Answer | None = None
        self._body: ChunkedReader | None = None
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def request(
        self,
        authority: str,
        path: str,
        headers: list[tuple[str, str]],
        body: bytes,
        *,
        answer: Answer | None = None,
    ) -> Answer:
        """Send a POST. `answer`: one that watches for more than most do."""
        lines = [f"POST {path} HTTP/1.1", f"host: {authority}", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self._transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self._answer = answer = answer or Answer()
        self._body = None
        self._head = b""
        return answer

    def data_received(self, data: bytes) -> None:
        """The head, then the chunked body."""
        answer = self._answer
        if answer is None:
            raise BrokenAnswer("bytes that nobody asked for")
        if self._body is None:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            answer.status = int(head.split(b" ", 2)[1])
            if b"transfer-encoding: chunked" not in head.lower():
                answer.fail(BrokenAnswer(f"no stream: {head!r} {data!r}"))
                return
            self._body = ChunkedReader()
        payload = self._body.feed(data) if data else b""
        if payload:
            answer.feed(payload)
        if self._body.complete:
            self._answer = None
            answer.end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes."""
        if self._answer is not None:
            self._answer.fail(exc or BrokenAnswer("the connection was closed"))

    def close(self) -> None:
        """Leave."""
        self._transport.close()
