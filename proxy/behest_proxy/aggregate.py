"""A stream of chunks put together into the one body that a call without `stream` expects.

Calls without `stream` are streamed from the provider all the same, where it can, so that they can be cancelled. Members
that are not known here are kept: strings of a delta concatenate, arrays append, of anything else the last counts.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast

import msgspec

from behest_proxy.chunk import loads

BODY_BYTES_MAX = 32 * 1024 * 1024
"""Default bound on the payloads of one answer together."""

CHOICES_MAX = 128
"""OpenAI's own bound on `n`."""

TOOL_CALLS_MAX = 1024

_Members: TypeAlias = dict[str, Any]

_FIRST_COUNTS = ("id", "created", "model", "system_fingerprint", "service_tier")
"""Top-level members of which the first that is not empty counts: Azure's first chunk holds empty ones."""

_LEFT_OUT = ("object", "choices", "usage", "obfuscation")
"""Top-level members that are made here, and OpenAI's padding."""

_LABELS = ("role", "type", "channel", "format", "name", "id")
"""Strings of a delta that name something: repeated, not continued."""


class AggregateTooLarge(ValueError):
    """The answer is larger than the bound."""


class _Text(list[str]):
    """A text in pieces, joined once at the end."""


class Aggregator:
    """Takes the payloads of one answer's chunks and makes its `chat.completion` body."""

    __slots__ = ("_bytes", "_bytes_max", "_choices", "_top")

    def __init__(self, bytes_max: int = BODY_BYTES_MAX, *, chunks: Iterable[bytes] = ()) -> None:
        """`chunks` came before, from an earlier attempt: see `feed`, also for what that raises."""
        self._bytes = 0
        self._bytes_max = bytes_max
        self._top: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}
        for chunk in chunks:
            self.feed(chunk)

    def feed(self, payload: bytes) -> None:
        """Takes one chunk.

        Raises `ChunkError` where it is no JSON object and `AggregateTooLarge` where the answer gets too large.
        """
        self._bytes += len(payload)
        if self._bytes > self._bytes_max:
            raise AggregateTooLarge(f"the answer is larger than {self._bytes_max} bytes")
        try:
            members = msgspec.json.decode(payload, type=dict[str, msgspec.Raw])
            choices: Any = msgspec.json.decode(members.get("choices", b"null"))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            lenient = loads(payload)
            choices = lenient.get("choices")
            self._take_top(lenient)
        else:
            self._take_top(members)
        for position, choice in enumerate(_objects(choices)):
            index = choice.get("index")
            self._choice(index if isinstance(index, int) else position).take(choice)

    def body(self, *, usage: Mapping[str, Any] | None = None, cost_usd: str | None = None) -> bytes:
        """The JSON body, with the usage that is charged and its cost, a plain decimal number of USD as text."""
        top = dict(self._top)
        body: dict[str, Any] = {"id": top.pop("id", ""), "object": "chat.completion"}
        body["created"] = top.pop("created", 0)
        body["model"] = top.pop("model", "")
        body["choices"] = [self._choices[index].finished(index) for index in sorted(self._choices)]
        if usage is not None:
            body["usage"] = dict(usage)
            if cost_usd is not None:
                body["usage"]["cost_usd"] = msgspec.Raw(cost_usd.encode())
        return _encoded(body | top)

    def _take_top(self, members: Mapping[str, Any]) -> None:
        for name, value in members.items():
            if name in _LEFT_OUT:
                continue
            if name in _FIRST_COUNTS:
                if name not in self._top and not _is_empty(value):
                    self._top[name] = value
            elif not _is_null(value):
                self._top[name] = value

    def _choice(self, index: int) -> "_Choice":
        choice = self._choices.get(index)
        if choice is None:
            if len(self._choices) >= CHOICES_MAX:
                raise AggregateTooLarge(f"the answer has more than {CHOICES_MAX} choices")
            choice = self._choices[index] = _Choice()
        return choice


class _Choice:
    """One choice as far as it came."""

    __slots__ = ("_calls", "_logprobs", "_members", "_message")

    def __init__(self) -> None:
        self._message: _Members = {}
        self._calls: list[_Members] = []
        self._logprobs: _Members | None = None
        self._members: _Members = {}

    def take(self, choice: Mapping[str, Any]) -> None:
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            # Who sends both sends the same in both.
            delta = choice.get("message")
        if isinstance(delta, dict):
            self._take_delta(cast("_Members", delta))
        for name, value in choice.items():
            if value is None or name in ("index", "delta", "message"):
                continue
            if name == "logprobs" and isinstance(value, dict):
                self._logprobs = self._logprobs or {}
                for kind, tokens in cast("_Members", value).items():
                    _add(self._logprobs, kind, tokens)
            elif name == "text" or isinstance(value, list):
                _add(self._members, name, value)
            else:
                self._members[name] = value

    def finished(self, index: int) -> _Members:
        """The choice as it stands in a body."""
        members = {name: _joined(value) for name, value in self._members.items()}
        message: _Members = {"role": "assistant", "content": None}
        message |= {name: _joined(value) for name, value in self._message.items()}
        if not self._message and "text" in members:
            message["content"] = members["text"]
        if self._calls:
            message["tool_calls"] = [
                {name: _joined(value) for name, value in call.items() if name != "index"} for call in self._calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": _joined(self._logprobs),
            "finish_reason": members.pop("finish_reason", None),
            **members,
        }

    def _take_delta(self, delta: _Members) -> None:
        for name, value in delta.items():
            if value is None:
                self._message.setdefault(name, None)
            elif name == "tool_calls" and isinstance(value, list):
                for piece in _objects(cast("Any", value)):
                    self._take_call(piece)
            elif name in ("function_call", "audio") and isinstance(value, dict):
                held = self._message.get(name)
                self._message[name] = held if isinstance(held, dict) else {}
                _merge(self._message[name], cast("_Members", value))
            elif name == "content":
                self._take_content(value)
            else:
                _add(self._message, name, value)
        self._message.pop("tool_calls", None)

    def _take_content(self, value: Any) -> None:
        """Adds a text or an array of parts; once there were parts, texts are parts too."""
        held = self._message.get("content")
        if isinstance(value, str) and not (isinstance(held, list) and not isinstance(held, _Text)):
            _add(self._message, "content", value)
            return
        if isinstance(held, list) and not isinstance(held, _Text):
            parts = cast("list[_Members]", held)
        else:
            text = _joined(cast("Any", held))
            parts = [{"type": "text", "text": _Text([text])}] if text else []
            self._message["content"] = parts
        for part in _objects([{"type": "text", "text": value}] if isinstance(value, str) else value):
            _append_part(parts, part)

    def _take_call(self, piece: _Members) -> None:
        call = self._call_of(piece)
        for name, value in piece.items():
            if name == "function" and isinstance(value, dict):
                function = call.setdefault("function", {})
                for part, text in cast("_Members", value).items():
                    if part == "arguments" and not isinstance(text, str):
                        # An object where its text belongs
                        _add(function, part, "" if text is None else json.dumps(text))
                    else:
                        _add(function, part, text)
            elif value not in (None, ""):
                _add(call, name, value)
        call.setdefault("type", "function")

    def _call_of(self, piece: _Members) -> _Members:
        """The call that a piece belongs to: by index, else by id, else the last one that was begun."""
        index, identifier = piece.get("index"), piece.get("id")
        function = piece.get("function")
        begins = bool(identifier) and isinstance(function, dict) and bool(cast("_Members", function).get("name"))
        for call in reversed(self._calls):
            known = call.get("id")
            # Some number all calls 0: another id with a name begins another call.
            if begins and known and known != identifier:
                continue
            if isinstance(index, int) and "index" in call:
                if call["index"] == index:
                    return call
            elif not identifier or known == identifier:
                return call
        if len(self._calls) >= TOOL_CALLS_MAX:
            raise AggregateTooLarge(f"the answer has more than {TOOL_CALLS_MAX} tool calls")
        self._calls.append({"id": identifier or ""})
        return self._calls[-1]


def _add(members: _Members, name: str, value: Any) -> None:
    """Continues a member: strings concatenate, arrays append, else the last counts; null changes nothing."""
    held = members.get(name)
    if value is None:
        members.setdefault(name, None)
    elif isinstance(value, str) and name not in _LABELS:
        if isinstance(held, _Text):
            held.append(value)
        else:
            members[name] = _Text([value])
    elif isinstance(value, list) and isinstance(held, list) and not isinstance(held, _Text):
        held.extend(value)
    elif not (isinstance(value, str) and held):
        members[name] = value


def _merge(members: _Members, piece: Mapping[str, Any]) -> None:
    for name, value in piece.items():
        _add(members, name, value)


def _append_part(parts: list[_Members], part: _Members) -> None:
    """Adds a part of content; one of the same type as the last continues it."""
    last = parts[-1] if parts and parts[-1].get("type") == part.get("type") else None
    if last is None:
        last = {}
        parts.append(last)
    for name, value in part.items():
        if name == "thinking" and isinstance(value, list):
            inner = last.setdefault(name, [])
            if isinstance(inner, list) and not isinstance(inner, _Text):
                for each in _objects(cast("Any", value)):
                    _append_part(cast("list[_Members]", inner), each)
        else:
            _add(last, name, value)


def _joined(value: Any) -> Any:
    """The value with every text in pieces made whole."""
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, list):
        return [_joined(each) for each in value]
    if isinstance(value, dict):
        return {name: _joined(each) for name, each in cast("_Members", value).items()}
    return value


def _objects(value: Any) -> list[_Members]:
    if not isinstance(value, list):
        return []
    return [cast("_Members", each) for each in value if isinstance(each, dict)]


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, msgspec.Raw) and bytes(value) == b"null")


def _is_empty(value: Any) -> bool:
    return bytes(value) in (b"null", b'""', b"0") if isinstance(value, msgspec.Raw) else not value


def _encoded(body: _Members) -> bytes:
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        # Half surrogates, which only the escaped form of JSON can carry; the halves of a pair meet again here.
        return json.dumps(body, default=lambda raw: json.loads(bytes(raw))).encode()
