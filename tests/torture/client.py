"""A client of one stream: counts the whole events with text that it received, and goes when its plan says so."""

import asyncio
import json
import time
from dataclasses import dataclass, field

from torture.plan import StreamPlan
from torture.recordings import count
from torture.wires import Http1Wire, Http2Pool, NotProcessedError, Wire

PATIENCE_S = 60.0
RETRY_S = 0.25
TRIES = 60


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
    """Events with text; of a recording all events."""
    recorded_tokens: int = 0
    done: bool = False
    """`[DONE]` came."""
    left: bool = False
    """The client went by itself."""
    unreachable: int = 0
    """Attempts that found nobody, or a sidecar that drains or has no ledger."""
    refused_ids: list[str] = field(default_factory=list[str])
    """Ids of attempts that were answered with 503: one that had waited for the provider may have cost its input."""
    fault: str = ""
    """What no client may see."""

    @property
    def received_tokens(self) -> int:
        """Output tokens in whole events."""
        if self.plan.recording is not None:
            return self.recorded_tokens
        return self.chunks * self.plan.tokens_per_chunk


async def run_client(plan: StreamPlan, *, port: int, token: str, pool: Http2Pool) -> StreamEnd:
    """Ask until somebody answers, read to the end or go when the plan says so. Never raises for the wire."""
    end = StreamEnd(plan=plan)
    end.began_s = time.monotonic()
    for _ in range(TRIES):
        end.began_s = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE_S):
                again = await _attempt(end, port, token, pool)
        except TimeoutError:
            end.fault = f"nothing ended it within {PATIENCE_S:.0f} s"
            again = False
        if not again:
            break
        end.unreachable += 1
        await asyncio.sleep(RETRY_S)
    end.ended_s = time.monotonic()
    return end


async def _attempt(end: StreamEnd, port: int, token: str, pool: Http2Pool) -> bool:
    """Whether nobody was there, so that asking again cannot be charged twice."""
    end.request_id, end.code = "", None
    headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
    ask = pool.ask if end.plan.http2 else Http1Wire.ask
    try:
        wire: Wire = await ask(port, headers, _body(end.plan))
    except NotProcessedError:
        return True
    try:
        if end.plan.leaves_unanswered_s is not None:
            try:
                async with asyncio.timeout(end.plan.leaves_unanswered_s):
                    return await _read(end, wire)
            except TimeoutError:
                end.left = True
                return False
        return await _read(end, wire)
    except NotProcessedError:
        return True
    except (OSError, asyncio.IncompleteReadError):
        return False  # broken: it is judged by whether its sidecar was killed
    finally:
        wire.abort()


def _body(plan: StreamPlan) -> bytes:
    return json.dumps(
        {
            "model": plan.model,
            "stream": True,
            "messages": [{"role": "user", "content": "Tell me a story." + " word" * plan.prompt_words}],
            "sim": plan.sim,
        }
    ).encode()


async def _read(end: StreamEnd, wire: Wire) -> bool:
    end.status, headers = await wire.head()
    end.request_id = headers.get("x-request-id", "")
    if end.status != 200:
        body = b""
        while len(body) < int(headers.get("content-length", "0")) and (data := await wire.read()):
            body += data
        end.code = json.loads(body)["error"]["code"]
        if end.status == 503:
            end.status = None
            end.refused_ids.append(end.request_id)
            return True
        return False
    rest = b""
    if end.plan.leaves_after == 0:
        end.left = True
        return False
    while not end.done and (data := await wire.read()):
        *events, rest = (rest + data).split(b"\n\n")
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
    elif event.startswith(b'data: {"error":'):
        end.code = json.loads(event[6:])["error"]["code"]
    elif end.plan.recording is not None:
        if event.startswith(b"data: "):
            end.chunks += 1
            end.recorded_tokens += count(event[6:])
    elif b'"content":"' in event and b'"content":""' not in event:
        end.chunks += 1
        if end.code is not None:
            end.fault = "text came after the terminal event"
