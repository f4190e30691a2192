"""Chooses the answer to a request: chat completions, models, and the simulator's own record of requests."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import msgspec

from behest_proxy.sim.answers import (
    EVENT_STREAM,
    JSON,
    AnswerContext,
    Head,
    Headers,
    Step,
    chat_answer,
    simple_answer,
)
from behest_proxy.sim.behaviour import parse_behaviour
from behest_proxy.sim.chat_request import count_prompt_tokens, parse_chat_request
from behest_proxy.sim.records import RequestLog, RequestRecord, bounded_body
from behest_proxy.sim.refusal import Refusal, error_envelope

MAX_BODY_BYTES = 32 * 1024 * 1024
_MAX_RECORDING_BYTES = 32 * 1024 * 1024
_MAX_REQUEST_ID = 200

MODELS = ("behest-sim", "gpt-4.1", "gpt-4.1-mini", "gpt-4o", "gpt-4o-mini", "gpt-5", "gpt-5-mini", "o4-mini")
"""What `/v1/models` lists; chat completions answer for any model's name."""

_CHAT_PATHS = frozenset({"/v1/chat/completions", "/chat/completions"})
_MODEL_PATHS = frozenset({"/v1/models", "/models"})


class IncomingRequest(NamedTuple):
    """A whole request; header names are in lower case."""

    method: str
    target: str
    http_version: str
    headers: Headers
    body: bytes
    too_large: bool = False

    def header(self, name: bytes) -> bytes | None:
        """The first header of this name."""
        return next((value for found, value in self.headers if found == name), None)


class Routes:
    """The simulator behind its wires."""

    def __init__(self, *, recordings: Path | None = None) -> None:
        self.requests = RequestLog()
        self._recordings = recordings
        self._otherwise = b""
        """What requests get that do not ask otherwise; a JSON object like `sim`."""

    def answer(self, request: IncomingRequest) -> tuple[Iterator[Step], RequestRecord | None]:
        """The steps of the answer, and the record to be kept of them. Never raises."""
        url = urlsplit(request.target)
        record: RequestRecord | None = None
        if not url.path.startswith("/sim/"):
            record = self._record(request, url.path)
        try:
            steps = self._route(request, url.path, url.query, record)
        except Refusal as refusal:
            envelope = error_envelope(refusal.status, refusal.message, param=refusal.param)
            steps = simple_answer(refusal.status, envelope)
        return _named(steps, record), record

    def _record(self, request: IncomingRequest, path: str) -> RequestRecord:
        request_id = request.header(b"x-request-id")
        return self.requests.add(
            method=request.method,
            path=path[:_MAX_REQUEST_ID],
            http_version=request.http_version,
            headers=request.headers,
            request_id=request_id.decode("latin-1")[:_MAX_REQUEST_ID] if request_id else None,
        )

    def _route(self, request: IncomingRequest, path: str, query: str, record: RequestRecord | None) -> Iterator[Step]:
        if request.too_large:
            raise Refusal(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
        if path in _CHAT_PATHS and record is not None:
            _allow(request, "POST")
            return self._chat(request, record)
        if path in _MODEL_PATHS:
            _allow(request, "GET")
            return simple_answer(200, _models())
        if path == "/sim/requests":
            _allow(request, "GET", "DELETE")
            return self._own_record(request, query)
        if path == "/sim/behaviour":
            _allow(request, "PUT")
            parse_behaviour(header=None, body=msgspec.Raw(request.body))
            self._otherwise = request.body
            return simple_answer(200, request.body or b"{}")
        raise Refusal(404, f"There is no {path!r} here.")

    def _chat(self, request: IncomingRequest, record: RequestRecord) -> Iterator[Step]:
        record.body = bounded_body(request.body)
        chat, behaviour = parse_chat_request(
            request.body, sim_header=request.header(b"x-sim"), otherwise=self._otherwise
        )
        record.model = chat.model
        record.prompt_tokens = count_prompt_tokens(chat.messages)
        context = AnswerContext(
            id=f"chatcmpl-sim-{record.received_ns:x}",
            created=int(record.received_at),
            prompt_tokens=record.prompt_tokens,
            load_recording=self._load_recording,
        )
        return chat_answer(chat, behaviour, context)

    def _own_record(self, request: IncomingRequest, query: str) -> Iterator[Step]:
        if request.method == "DELETE":
            self.requests.clear()
            return simple_answer(200, b"[]")
        asked = parse_qs(query)
        limit = asked.get("limit", [None])[0]
        if limit is not None and not (limit.isascii() and limit.isdecimal() and len(limit) <= 9):
            raise Refusal(400, "limit is not a number.", param="limit")
        found = self.requests.find(request_id=asked.get("id", [None])[0], limit=None if limit is None else int(limit))
        return simple_answer(200, msgspec.json.encode(found))

    def _load_recording(self, name: str) -> tuple[bytes, bytes]:
        if self._recordings is None:
            raise Refusal(400, "The simulator was started without recordings.", param="sim.recording")
        folder = self._recordings.resolve()
        for candidate in (name, f"{name}.sse"):
            path = (folder / candidate).resolve()
            if path.is_relative_to(folder) and path.is_file() and path.stat().st_size <= _MAX_RECORDING_BYTES:
                return (JSON if path.suffix == ".json" else EVENT_STREAM), path.read_bytes()
        raise Refusal(400, f"There is no recording {name!r}.", param="sim.recording")


def _allow(request: IncomingRequest, *methods: str) -> None:
    if request.method not in methods:
        raise Refusal(405, f"{request.method} is not allowed here.")


def _models() -> bytes:
    created = int(time.time())
    models = [{"id": name, "object": "model", "created": created, "owned_by": "behest-sim"} for name in MODELS]
    return msgspec.json.encode({"object": "list", "data": models})


def _named(steps: Iterator[Step], record: RequestRecord | None) -> Iterator[Step]:
    """The same steps with a head that says who answers, and which request."""
    for step in steps:
        if isinstance(step, Head):
            ours = [(b"x-behest-sim", b"1")]
            if record is not None:
                ours.append((b"x-request-id", record.id.encode("latin-1")))
            yield step._replace(headers=[*step.headers, *ours])
            break
        yield step
    yield from steps
