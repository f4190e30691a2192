"""The whole answer to a chat request as a sequence of steps: what is sent, how long after the step before it.

Pure: nothing here reads a clock or a file, so a test reads an answer without a socket, and the wires play it.
Steps are made one at a time while they are played, so a long answer takes no more memory than a short one.
"""

from collections.abc import Callable, Iterator
from hashlib import shake_128
from typing import Literal, NamedTuple

import msgspec

from behest_proxy.sim.behaviour import Behaviour
from behest_proxy.sim.chat_request import ChatRequest
from behest_proxy.sim.deltas import choice_deltas, content_pieces, effective_seed
from behest_proxy.sim.refusal import error_envelope, error_members
from behest_proxy.sim.rendering import ChunkForm, Completion, Meter, Usage

Headers = list[tuple[bytes, bytes]]
Outcome = Literal["completed", "refused", "reset", "ended_early", "stalled", "error_event"]


class Head(NamedTuple):
    """The status line and headers; `length` is the size of the body in bytes where it is known."""

    wait_ms: float
    status: int
    headers: Headers
    length: int | None = None


class Body(NamedTuple):
    """Bytes of the body; `alone` asks for a network write of their own."""

    wait_ms: float
    data: bytes
    chunks: int = 0
    tokens: int = 0
    alone: bool = False
    usage: Usage | None = None


class Finish(NamedTuple):
    """The end: clean, or by a reset with `reset_code`, or never where it stalls."""

    wait_ms: float
    outcome: Outcome
    reset_code: int = 2


Step = Head | Body | Finish

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
HTML = b"text/html; charset=utf-8"
_HTML_PAGE = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\n"
_GARBAGE_BYTES = 512


class AnswerContext(NamedTuple):
    """What an answer needs besides the request: its own id, the time in seconds, and the recordings."""

    id: str
    created: int
    prompt_tokens: int
    load_recording: Callable[[str], tuple[bytes, bytes]]
    """Gives content type and body of a recording by name, or raises `Refusal`."""


def simple_answer(status: int, body: bytes, *, content_type: bytes = JSON, wait_ms: float = 0) -> Iterator[Step]:
    """A head with a known length, a body, a clean end."""
    yield Head(wait_ms, status, [(b"content-type", content_type)], len(body))
    if body:
        yield Body(0, body)
    yield Finish(0, "completed" if status < 400 else "refused")


def chat_answer(request: ChatRequest, behaviour: Behaviour, context: AnswerContext) -> Iterator[Step]:
    """The steps of the answer. Raises `Refusal` at once where there is no such recording."""
    if behaviour.reset_before_head:
        return iter([Finish(behaviour.head_delay_ms, "reset", behaviour.reset_code)])
    if behaviour.recording is not None:
        content_type, recorded = context.load_recording(behaviour.recording)
        return _recording(request, behaviour, content_type=content_type, recorded=recorded)
    if behaviour.body != "normal":
        return _other_body(request, behaviour)
    if behaviour.status != 200:
        return _error(behaviour)
    return _stream(request, behaviour, context) if request.stream else _completion(request, behaviour, context)


def _error(behaviour: Behaviour) -> Iterator[Step]:
    envelope = error_envelope(behaviour.status, f"Simulated answer with status {behaviour.status}.")
    return _answer_of(behaviour, JSON, envelope)


def _answer_of(behaviour: Behaviour, content_type: bytes, body: bytes) -> Iterator[Step]:
    headers = [(b"content-type", content_type)]
    retry_after_s = behaviour.retry_after_s
    if retry_after_s is None and behaviour.status == 429:
        retry_after_s = 1
    if retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % retry_after_s))
    # 204 and 304 have no body (RFC 9110, section 6.4.1).
    bodiless = behaviour.status in (204, 304)
    yield Head(behaviour.head_delay_ms, behaviour.status, headers, None if bodiless else len(body))
    if body and not bodiless:
        yield Body(behaviour.first_chunk_delay_ms, body)
    yield Finish(0, "completed" if behaviour.status < 400 else "refused")


def _other_body(request: ChatRequest, behaviour: Behaviour) -> Iterator[Step]:
    asked = EVENT_STREAM if request.stream else JSON
    match behaviour.body:
        case "html":
            return _answer_of(behaviour, HTML, _HTML_PAGE)
        case "garbage":
            seed = b"%d" % effective_seed(request, behaviour)
            return _answer_of(behaviour, asked, shake_128(seed).digest(_GARBAGE_BYTES))
        case "bad_json":
            cut_short = b'{"id":"chatcmpl-sim","object":"chat.completion","choices":[{"ind'
            events = b"data: %b\n\ndata: [DONE]\n\n" % cut_short
            return _answer_of(behaviour, asked, events if request.stream else cut_short)
        case "empty" | "normal":
            return _answer_of(behaviour, asked, b"")


def _stream(request: ChatRequest, behaviour: Behaviour, context: AnswerContext) -> Iterator[Step]:
    yield Head(behaviour.head_delay_ms, 200, _event_stream_headers())
    events = _events(request, behaviour, context)
    continued = behaviour.continue_assistant and content_pieces(request, behaviour, 0)[1]
    if behaviour.breaks and not continued:
        events = _broken_off(events, behaviour)
    if behaviour.chunk_split is not None:
        events = _cut(events, behaviour, effective_seed(request, behaviour))
    yield from events


def _event_stream_headers() -> Headers:
    return [(b"content-type", EVENT_STREAM), (b"cache-control", b"no-cache")]


def _events(request: ChatRequest, behaviour: Behaviour, context: AnswerContext) -> Iterator[Step]:
    """The events of the stream, the choices in turn, and the end."""
    meter = Meter(prompt_tokens=context.prompt_tokens, behaviour=behaviour)
    form = ChunkForm(request, behaviour, answer_id=context.id, created=context.created)
    speaking = {choice: choice_deltas(request, behaviour, choice) for choice in range(request.choices)}
    usage_everywhere = behaviour.usage == "every_chunk"
    wait_ms = behaviour.first_chunk_delay_ms
    said_first = False
    while speaking:
        for choice, deltas in list(speaking.items()):
            delta = next(deltas)
            finished = delta.kind == "finish"
            if finished:
                del speaking[choice]
            meter.add(delta)
            if delta.kind == "hidden":
                continue
            usage: Usage | None = None
            if usage_everywhere or (finished and not speaking and behaviour.usage == "finish_chunk"):
                usage = meter.usage(final=not speaking)
            data = form.chunk(choice, delta, usage)
            if delta.tokens:
                if said_first:
                    wait_ms += behaviour.chunk_interval_ms
                said_first = True
                yield Body(wait_ms, data, 1, delta.tokens, usage=usage)
            else:
                yield Body(wait_ms, data, usage=usage)
            wait_ms = 0
    if behaviour.usage == "always" or (behaviour.usage == "asked" and request.wants_usage):
        usage = meter.usage(final=True)
        yield Body(wait_ms, form.usage_event(usage), usage=usage)
    if not behaviour.no_done:
        yield Body(0, form.event(b"[DONE]"))
    yield Finish(0, "completed")


def _broken_off(steps: Iterator[Step], behaviour: Behaviour) -> Iterator[Step]:
    """The same steps as far as the earliest break."""
    outcome, chunks_before = min(behaviour.breaks, key=lambda a_break: a_break[1])
    chunks = 0
    for step in steps:
        if chunks >= chunks_before:
            break
        yield step
        chunks += step.chunks if isinstance(step, Body) else 0
    else:
        return
    match outcome:
        case "reset":
            yield Finish(0, "reset", behaviour.reset_code)
        case "stalled":
            yield Finish(0, "stalled")
        case "error_event":
            yield Body(0, _error_event(behaviour))
            yield Finish(0, "error_event")
        case _:
            yield Finish(0, "ended_early")


def _error_event(behaviour: Behaviour) -> bytes:
    line_end = b"\r\n" if behaviour.crlf else b"\n"
    name = b"event: error" + line_end if behaviour.error_event_named else b""
    payload = msgspec.json.encode({"error": error_members(500, "Simulated failure in the middle of a stream.")})
    return name + b"data: " + payload + line_end + line_end


def _cut(steps: Iterator[Step], behaviour: Behaviour, seed: int, *, wait_ms: float = 0) -> Iterator[Step]:
    """The same bytes in writes of the size that is asked for; the counts stand with an event's last write."""
    sizes = _write_sizes(behaviour, seed)
    for step in steps:
        if not isinstance(step, Body):
            yield step
            continue
        start, wait = 0, step.wait_ms
        while len(step.data) - start > (size := next(sizes)):
            yield Body(wait, step.data[start : start + size], alone=True)
            start, wait = start + size, wait_ms
        yield step._replace(wait_ms=wait, data=step.data[start:], alone=True)


def _write_sizes(behaviour: Behaviour, seed: int) -> Iterator[int]:
    size = behaviour.chunk_split or 1
    number = 0
    while True:
        if behaviour.chunk_split_random:
            digest = shake_128(b"%d/%d" % (seed, number)).digest(4)
            number += 1
            yield 1 + int.from_bytes(digest, "big") % (2 * size - 1)
        else:
            yield size


def _recording(request: ChatRequest, behaviour: Behaviour, *, content_type: bytes, recorded: bytes) -> Iterator[Step]:
    is_stream = content_type == EVENT_STREAM
    headers = _event_stream_headers() if is_stream else [(b"content-type", content_type)]
    yield Head(behaviour.head_delay_ms, behaviour.status, headers, None if is_stream else len(recorded))
    pieces = recorded_events(recorded) if is_stream else [recorded]
    steps = _recorded_steps(pieces, behaviour)
    if behaviour.breaks:
        steps = _broken_off(steps, behaviour)
    if behaviour.chunk_split is not None:
        steps = _cut(
            _joined(steps),
            behaviour,
            effective_seed(request, behaviour),
            wait_ms=behaviour.chunk_interval_ms,
        )
    yield from steps


def recorded_events(recorded: bytes) -> list[bytes]:
    """The body cut after each blank line; joined again it is the same bytes."""
    events: list[bytes] = []
    event = b""
    for line in recorded.splitlines(keepends=True):
        event += line
        if not line.strip(b"\r\n"):
            events.append(event)
            event = b""
    return [*events, event] if event else events


def _recorded_steps(pieces: list[bytes], behaviour: Behaviour) -> Iterator[Step]:
    wait_ms = behaviour.first_chunk_delay_ms
    for piece in pieces:
        yield Body(wait_ms, piece, 1)
        wait_ms = behaviour.chunk_interval_ms
    yield Finish(0, "completed" if behaviour.status < 400 else "refused")


def _joined(steps: Iterator[Step]) -> Iterator[Step]:
    """All bytes as one piece, so that they are cut without regard to events."""
    everything = list(steps)
    bodies = [step for step in everything if isinstance(step, Body)]
    if bodies:
        data = b"".join(body.data for body in bodies)
        yield Body(bodies[0].wait_ms, data, sum(body.chunks for body in bodies))
    yield from (step for step in everything if not isinstance(step, Body))


def _completion(request: ChatRequest, behaviour: Behaviour, context: AnswerContext) -> Iterator[Step]:
    """The answer that is not streamed: it comes when a stream of it would have ended.

    Breaks happen at the same moment as in a stream: a reset or a stall instead of an answer, 500 instead of
    an error event, half of the JSON instead of an early end.
    """
    meter = Meter(prompt_tokens=context.prompt_tokens, behaviour=behaviour)
    completion = Completion(request, behaviour, answer_id=context.id, created=context.created)
    chunks = 0
    for choice in range(request.choices):
        for delta in choice_deltas(request, behaviour, choice):
            meter.add(delta)
            completion.add(choice, delta)
            chunks += delta.tokens > 0 and delta.kind != "hidden"
    usage = None if behaviour.usage == "never" else meter.usage(final=True)
    body = completion.body(usage)
    continued = behaviour.continue_assistant and content_pieces(request, behaviour, 0)[1]
    breaks = [found for found in behaviour.breaks if found[1] <= chunks and not continued]
    outcome, generated = min(breaks, key=lambda found: found[1], default=("completed", chunks))
    wait_ms = behaviour.head_delay_ms + behaviour.first_chunk_delay_ms
    wait_ms += behaviour.chunk_interval_ms * max(0, generated - 1)
    match outcome:
        case "reset":
            yield Finish(wait_ms, "reset", behaviour.reset_code)
        case "stalled":
            yield Finish(wait_ms, "stalled")
        case "error_event":
            message = "Simulated failure in the middle of an answer."
            yield from simple_answer(500, error_envelope(500, message), wait_ms=wait_ms)
        case "ended_early":
            half = body[: len(body) // 2]
            yield Head(wait_ms, 200, [(b"content-type", JSON)], len(half))
            yield Body(0, half)
            yield Finish(0, "ended_early")
        case _:
            yield Head(wait_ms, 200, [(b"content-type", JSON)], len(body))
            yield Body(0, body, chunks, meter.sent_tokens, usage=usage)
            yield Finish(0, "completed")
