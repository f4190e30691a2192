"""An answer that a provider gave as a whole, as the chunks that it would have streamed.

Providers that cannot stream are asked without `stream`. What comes is turned into chunks at the border, so that all
that follows (counting, usage, finish reasons, both forms of answers to clients) knows one form alone.
"""

import json
from typing import Any

import msgspec

from behest_proxy.aggregate import BODY_BYTES_MAX
from behest_proxy.chunk import ChunkError, loads
from behest_proxy.sse import DONE_PAYLOAD, SseTooLarge

_OF_EVERY_CHUNK = ("id", "created", "model", "service_tier", "system_fingerprint")
_MADE_HERE = ("object", "choices", "usage")


class WholeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The payloads of its chunks, in order, with the end of the stream."""

    payloads: list[bytes]
    usage: bytes | None
    """The one that holds the usage; it is among `payloads` too."""


class WholeFramer:
    """Like `SseFramer`, for an answer that comes as a whole: nothing until it is, then all of it."""

    __slots__ = ("_data", "_size_bytes", "usage")

    is_between_events = False

    def __init__(self) -> None:
        self._data: list[bytes] = []
        self._size_bytes = 0
        self.usage: bytes | None = None
        """After `finish`: the chunk with the usage."""

    def feed(self, data: bytes) -> list[bytes]:
        """Body bytes. Raises `SseTooLarge` beyond `BODY_BYTES_MAX`."""
        self._size_bytes += len(data)
        if self._size_bytes > BODY_BYTES_MAX:
            raise SseTooLarge(f"the answer is larger than {BODY_BYTES_MAX} bytes")
        self._data.append(data)
        return []

    def finish(self) -> list[bytes]:
        """The body is whole: its chunks. Raises `ChunkError`."""
        body, self._data = b"".join(self._data), []
        answer = whole_answer(body)
        self.usage = answer.usage
        return answer.payloads


def whole_answer(body: bytes) -> WholeAnswer:
    """The chunks of a `chat.completion`: role and content of each choice, its finish reason, the usage.

    An `error` member becomes the chunk that says so. Raises `ChunkError` for what is no completion, or nested so deeply
    that it cannot be written again.
    """
    try:
        return _whole(loads(body))
    except RecursionError as error:
        raise ChunkError(f"the answer is nested too deeply: {error}") from None


def _whole(members: dict[str, Any]) -> WholeAnswer:
    if members.get("error") is not None:
        return WholeAnswer(payloads=[msgspec.json.encode({"error": members["error"]})], usage=None)
    choices: Any = members.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ChunkError("the answer has no choices")
    frame = {name: members[name] for name in _OF_EVERY_CHUNK if name in members}
    frame["object"] = "chat.completion.chunk"
    rest = {name: value for name, value in members.items() if name not in frame and name not in _MADE_HERE}
    contents: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for position, choice in enumerate(choices):
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            raise ChunkError("a choice has no message")
        given: Any = choice.get("index")
        index = given if isinstance(given, int) and not isinstance(given, bool) else position
        others = {name: value for name, value in choice.items() if name not in ("index", "message", "finish_reason")}
        contents.append({**others, "index": index, "delta": _delta(choice["message"]), "finish_reason": None})
        ends.append({"index": index, "delta": {}, "finish_reason": choice.get("finish_reason") or "stop"})
    payloads = [_encoded({**frame, **rest, "choices": [one]}) for one in contents]
    payloads += [_encoded({**frame, "choices": [one]}) for one in ends]
    usage = None
    if isinstance(members.get("usage"), dict):
        usage = _encoded({**frame, "choices": [], "usage": members["usage"]})
        payloads.append(usage)
    return WholeAnswer(payloads=[*payloads, DONE_PAYLOAD], usage=usage)


def _delta(message: dict[str, Any]) -> dict[str, Any]:
    """A message as the one delta that brings it: tool calls have an index there."""
    delta = {"role": "assistant", **message}
    calls: Any = message.get("tool_calls")
    if isinstance(calls, list):
        delta["tool_calls"] = [
            {"index": number, **call} if isinstance(call, dict) else call for number, call in enumerate(calls)
        ]
    return delta


def _encoded(members: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(members)
    except UnicodeEncodeError:
        return json.dumps(members).encode()  # half surrogates, which only the escaped form of JSON can carry
