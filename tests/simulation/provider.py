"""The providers of a simulated world: they play the script of each request, and know what they really did."""

from collections.abc import Callable
from typing import Any

import msgspec

from behest_ledger.token_counts import TokenCounts
from behest_proxy.upstream import UpstreamFailure, UpstreamRequest
from simulation.request import TOKEN, Asked
from simulation.world import Handle, Process

STALL_S = 6.0
"""After so long without a byte the upstream client gives up."""

_HEADERS = [(b"content-type", b"text/event-stream")]


class Call:
    """One call to a provider, with the upstream client's part of it."""

    def __init__(self, process: Process, asked: Asked, handler: Any, *, limit: int | None, cap: int | None) -> None:
        self._process = process
        self._asked = asked
        self._handler = handler
        self._cap = cap
        self._over = False
        self._paused = False
        self._waiting: list[Callable[[], None]] = []
        self._timer: Handle | None = None
        self._reads = _reads(asked, limit, cap)
        self._later(0.0, self._connected)

    # --- what the conduct may do -------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Nothing comes after it."""
        self._process.boundary()
        self._over = True
        if self._timer is not None:
            self._timer.cancel()

    def pause(self) -> None:
        """Give nothing more, except for what is on its way up."""
        self._paused = True

    def resume(self) -> None:
        """Go on."""
        if self._paused:
            self._paused = False
            waiting, self._waiting = self._waiting, []
            for step in waiting:
                self._later(0.0, step)

    # --- what happens ------------------------------------------------------------------------------------------

    def _later(self, delay_s: float, step: Callable[[], None]) -> None:
        self._timer = self._process.arrives(delay_s, self._step, step)

    def _step(self, step: Callable[[], None]) -> None:
        if self._over:
            return
        if self._paused:
            self._waiting.append(step)
            return
        step()

    def _connected(self) -> None:
        script = self._asked.script
        if script.status == 0:
            self._fail("connect", head=False)
            return
        self._asked.sending = True
        self._handler.on_request_sent()
        self._asked.sent = True
        if self._over:
            return
        if script.end == "stall" and not script.chunks:
            self._later(STALL_S, lambda: self._fail("first_byte_timeout", head=False))
        else:
            self._later(script.head_delay_s, self._head)

    def _head(self) -> None:
        status = self._asked.script.status
        self._handler.on_head(status, _HEADERS)
        self._later(0.0, self._next if status == 200 else self._refuse)

    def _refuse(self) -> None:
        self._handler.on_data(b'{"error":{"message":"no"}}')
        if not self._over:
            self._handler.on_end()

    def _next(self) -> None:
        asked = self._asked
        read = next(self._reads, None)
        if read is None:
            self._end()
            return
        data, tokens, usage, is_final = read
        asked.first_byte = True
        asked.delivered += tokens
        if usage is not None:
            asked.usage, asked.usage_is_final = usage, is_final
        self._handler.on_data(data)
        self._later(asked.script.interval_s, self._next)

    def _end(self) -> None:
        match self._asked.script.end:
            case "done":
                self._over = True
                self._handler.on_end()
            case "close" | "break":
                self._fail("closed" if self._asked.script.end == "close" else "reset", head=True)
            case "stall":
                self._later(STALL_S, lambda: self._fail("idle_timeout", head=True))

    def _fail(self, kind: Any, *, head: bool) -> None:
        self._over = True
        failure = UpstreamFailure(kind=kind, message="simulated", request_sent=self._asked.sent, head_received=head)
        self._handler.on_failure(failure)


class Upstream:
    """The upstream client of one process."""

    def __init__(self, process: Process, requests: dict[str, Asked]) -> None:
        self._process = process
        self._requests = requests

    def send(self, request: UpstreamRequest, handler: Any) -> Call:
        """See `UpstreamClient`. The request names what is asked, and the limits."""
        self._process.boundary()
        name, limit, cap = msgspec.json.decode(request.body)
        return Call(self._process, self._requests[name], handler, limit=limit, cap=cap)

    async def aclose(self) -> None:
        """Nothing to close."""


def _reads(asked: Asked, limit: int | None, cap: int | None) -> Any:
    """What comes in one read after the other: bytes, their tokens, and a usage that is whole with them."""
    script = asked.script
    rest = b""
    for data, tokens, usage, is_final in _grouped(asked, limit, cap):
        at = len(data)
        if script.cut and usage is None:
            # What is counted as delivered is whole only with the next read; until then less is charged for it.
            at = asked.random.randrange(1, at)
        yield rest + data[:at], tokens, usage, is_final
        rest = data[at:]
    if rest:
        yield rest, 0, None, False


def _grouped(asked: Asked, limit: int | None, cap: int | None) -> Any:
    script = asked.script
    visible = 0
    data, tokens, count, usage = b"", 0, 0, None
    told: TokenCounts | None = None
    reason = "stop"
    for size in script.chunks:
        size_tokens = abs(size)
        if limit is not None and script.keeps_word and visible + size_tokens >= limit:
            size_tokens, reason = limit - visible, "length"
        if size_tokens:
            visible += size_tokens
            if script.usage == "growing":
                told = asked.billed(visible, cap)
            data += _chunk("reasoning_content" if size < 0 else "content", size_tokens, told)
            tokens, count, usage = tokens + size_tokens, count + 1, told
        if count >= script.per_read:
            yield data, tokens, usage, False
            data, tokens, count = b"", 0, 0
        if reason == "length":
            break
    if script.end == "done":
        data += _event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        if script.usage == "last":
            # Apart, as providers do it: a client that leaves at once leaves before it came.
            yield data, tokens, usage, False
            usage = asked.billed(visible, cap)
            data, tokens = _event({"choices": [], "usage": _as_openai(usage)}), 0
        yield data + b"data: [DONE]\n\n", tokens, usage, True
    elif data:
        yield data, tokens, usage, False


def _chunk(member: str, tokens: int, usage: TokenCounts | None) -> bytes:
    more = "" if usage is None else ',"usage":' + msgspec.json.encode(_as_openai(usage)).decode()
    delta = f'{{"{member}":"{TOKEN * tokens}"}}'
    return f'data: {{"id":"c","choices":[{{"index":0,"delta":{delta}}}]{more}}}\n\n'.encode()


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode({"id": "c", **chunk}) + b"\n\n"


def _as_openai(counts: TokenCounts) -> dict[str, Any]:
    return {"prompt_tokens": counts.input_tokens, "completion_tokens": counts.output_tokens}
