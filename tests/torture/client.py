"""A client of one stream, as cheap as can be: a bare socket that counts the whole events with text it received."""

import asyncio
import json
import time
from dataclasses import dataclass

from torture.plan import StreamPlan

PATIENCE_S = 60.0
RETRY_S = 0.25
TRIES = 24


@dataclass(kw_only=True)
class StreamEnd:
    """What the client saw."""

    plan: StreamPlan
    began_s: float = 0.0
    ended_s: float = 0.0
    request_id: str = ""
    status: int | None = None
    """None: no head came."""
    code: str | None = None
    """The error's code, of the answer or of the terminal event."""
    chunks: int = 0
    done: bool = False
    """`[DONE]` came."""
    left: bool = False
    """The client went by itself."""
    unreachable: int = 0
    """Attempts that found nobody, or a sidecar without its ledger."""
    fault: str = ""
    """What no client may see."""

    @property
    def received_tokens(self) -> int:
        """Output tokens in whole events."""
        return self.chunks * self.plan.tokens_per_chunk


class _Chunks:
    """The body inside chunked encoding (RFC 9112, 7.1), as far as it has come."""

    def __init__(self) -> None:
        self._raw = bytearray()

    def feed(self, data: bytes) -> bytes:
        raw = self._raw
        raw += data
        body: list[bytes] = []
        at = 0
        while (end := raw.find(b"\r\n", at)) >= 0:
            size = int(raw[at:end], 16)
            if len(raw) < end + 2 + size + 2:
                break
            body.append(bytes(raw[end + 2 : end + 2 + size]))
            at = end + 2 + size + 2
        del raw[:at]
        return b"".join(body)


async def run_client(plan: StreamPlan, *, port: int, token: str) -> StreamEnd:
    """Ask until somebody answers, read to the end or go when the plan says so. Never raises for the wire."""
    end = StreamEnd(plan=plan)
    end.began_s = time.monotonic()
    for _ in range(TRIES):
        end.began_s = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE_S):
                again = await _attempt(end, port, token)
        except TimeoutError:
            end.fault = f"nothing ended it within {PATIENCE_S:.0f} s"
            again = False
        if not again:
            break
        end.unreachable += 1
        await asyncio.sleep(RETRY_S)
    end.ended_s = time.monotonic()
    return end


async def _attempt(end: StreamEnd, port: int, token: str) -> bool:
    """Whether nobody was there, so that asking again cannot be charged twice."""
    end.request_id, end.code = "", None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return True
    try:
        writer.write(_request(end.plan, token))
        if end.plan.leaves_unanswered_s is not None:
            try:
                async with asyncio.timeout(end.plan.leaves_unanswered_s):
                    return await _read(end, reader)
            except TimeoutError:
                end.left = True
                return False
        return await _read(end, reader)
    except (OSError, asyncio.IncompleteReadError):
        return False  # broken: it is judged by whether its sidecar was killed
    finally:
        writer.transport.abort()


def _request(plan: StreamPlan, token: str) -> bytes:
    body = json.dumps(
        {
            "model": plan.model,
            "stream": True,
            "messages": [{"role": "user", "content": "Tell me a story."}],
            "sim": plan.sim,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {token}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _read(end: StreamEnd, reader: asyncio.StreamReader) -> bool:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    end.status, end.request_id = int(lines[0].split(" ")[1]), headers.get("x-request-id", "")
    if end.status != 200:
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        end.code = json.loads(body)["error"]["code"]
        if end.status == 503:
            end.status = None
            return True
        return False
    chunked, rest = _Chunks(), b""
    if end.plan.leaves_after == 0:
        end.left = True
        return False
    while not end.done and (data := await reader.read(65_536)):
        *events, rest = (rest + chunked.feed(data)).split(b"\n\n")
        for event in events:
            _see(end, event)
            if end.chunks == end.plan.leaves_after:
                end.left = True
                return False
    return False


def _see(end: StreamEnd, event: bytes) -> None:
    if end.done:
        end.fault = f"something came after [DONE]: {event[:80]!r}"
    elif event == b"data: [DONE]":
        end.done = True
    elif b'"content":"' in event and b'"content":""' not in event:
        end.chunks += 1
        if end.code is not None:
            end.fault = "text came after the terminal event"
    elif event.startswith(b'data: {"') and b'"error":' in event:
        end.code = json.loads(event[6:])["error"]["code"]
