"""The JSON of OpenAI's chat completions: chunks of a stream, the answer in one piece, and usage."""

from typing import Any, assert_never

import msgspec

from behest_proxy.sim.behaviour import Behaviour
from behest_proxy.sim.chat_request import ChatRequest
from behest_proxy.sim.deltas import Delta

SYSTEM_FINGERPRINT = "behest-sim"

Usage = dict[str, Any]
"""OpenAI's `usage` object."""

_encode = msgspec.json.encode


class Meter:
    """Counts what all choices said."""

    def __init__(self, *, prompt_tokens: int, behaviour: Behaviour) -> None:
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = behaviour.cached_tokens
        self._extra_tokens = behaviour.extra_usage_tokens
        self._reasoning_tokens = 0
        self._completion_tokens = 0
        self.sent_tokens = 0
        """Completion tokens that the client can see."""

    def add(self, delta: Delta) -> None:
        """Counts one delta."""
        self._completion_tokens += delta.tokens
        if delta.kind in ("hidden", "reasoning"):
            self._reasoning_tokens += delta.tokens
        if delta.kind != "hidden":
            self.sent_tokens += delta.tokens

    def usage(self, *, final: bool) -> Usage:
        """The usage so far, or with the extra tokens at the end."""
        completion_tokens = self._completion_tokens + (self._extra_tokens if final else 0)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self._reasoning_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


class ChunkForm:
    """Writes the events of one stream; what all of them share is encoded once."""

    def __init__(self, request: ChatRequest, behaviour: Behaviour, *, answer_id: str, created: int) -> None:
        line_end = b"\r\n" if behaviour.crlf else b"\n"
        self._end = line_end * 2
        self._answer_id = answer_id
        envelope = _encode(
            {
                "id": answer_id,
                "object": "chat.completion.chunk",
                "created": created,
                "model": request.model,
                "service_tier": "default",
                "system_fingerprint": SYSTEM_FINGERPRINT,
            }
        )
        self._opening = b"data: " + envelope[:-1] + b',"choices":['
        self._choice_openings = [
            b'%b{"index":%d,"delta":' % (self._opening, choice) for choice in range(request.choices)
        ]
        announces_usage = behaviour.usage == "always" or (behaviour.usage == "asked" and request.wants_usage)
        self._closing = (b'],"usage":null}' if announces_usage else b"]}") + self._end

    def event(self, payload: bytes) -> bytes:
        """One event with this data line."""
        return b"data: " + payload + self._end

    def usage_event(self, usage: Usage) -> bytes:
        """The event with no choices that carries usage."""
        return self._opening + b"]" + b',"usage":' + _encode(usage) + b"}" + self._end

    def chunk(self, choice: int, delta: Delta, usage: Usage | None) -> bytes:
        """The event of one delta of one choice, with this usage."""
        closing = self._closing if usage is None else b'],"usage":' + _encode(usage) + b"}" + self._end
        opening = self._choice_openings[choice]
        said = b'{"content":' + _encode(delta.text) if delta.kind == "content" else self._other(choice, delta)
        finish = b'"%b"' % delta.text.encode() if delta.kind == "finish" else b"null"
        return b'%b%b},"logprobs":null,"finish_reason":%b}%b' % (opening, said, finish, closing)

    def _other(self, choice: int, delta: Delta) -> bytes:
        match delta.kind:
            case "role":
                return b'{"role":"assistant","content":"","refusal":null'
            case "reasoning":
                return b'{"reasoning_content":' + _encode(delta.text)
            case "tool":
                call = _tool_call(self._answer_id, choice, delta)
                return b'{"tool_calls":[' + _encode({"index": delta.tool, **call}) + b"]"
            case "arguments":
                piece = {"index": delta.tool, "function": {"arguments": delta.text}}
                return b'{"tool_calls":[' + _encode(piece) + b"]"
            case "finish" | "hidden" | "content":
                return b"{"
            case _:
                assert_never(delta.kind)


def _tool_call(answer_id: str, choice: int, delta: Delta) -> dict[str, Any]:
    return {
        "id": f"call_{answer_id.removeprefix('chatcmpl-')}_{choice}_{delta.tool}",
        "type": "function",
        "function": {"name": delta.text, "arguments": ""},
    }


class Completion:
    """Joins the deltas of all choices to the answer in one piece."""

    def __init__(self, request: ChatRequest, behaviour: Behaviour, *, answer_id: str, created: int) -> None:
        self._envelope: dict[str, Any] = {
            "id": answer_id,
            "object": "chat.completion",
            "created": created,
            "model": request.model,
        }
        self._shows_content = not behaviour.tool_calls
        self._content: list[list[str]] = [[] for _ in range(request.choices)]
        self._reasoning: list[list[str]] = [[] for _ in range(request.choices)]
        self._tool_calls: list[list[dict[str, Any]]] = [[] for _ in range(request.choices)]
        self._arguments: list[list[list[str]]] = [[] for _ in range(request.choices)]
        self._finish: list[str | None] = [None] * request.choices

    def add(self, choice: int, delta: Delta) -> None:
        """Takes the next delta of a choice."""
        match delta.kind:
            case "content":
                self._content[choice].append(delta.text)
            case "reasoning":
                self._reasoning[choice].append(delta.text)
            case "tool":
                self._tool_calls[choice].append(_tool_call(self._envelope["id"], choice, delta))
                self._arguments[choice].append([])
            case "arguments":
                self._arguments[choice][delta.tool].append(delta.text)
            case "finish":
                self._finish[choice] = delta.text
            case "role" | "hidden":
                pass
            case _:
                assert_never(delta.kind)

    def body(self, usage: Usage | None) -> bytes:
        """The JSON of the answer, with this usage."""
        answer: dict[str, Any] = {
            **self._envelope,
            "choices": [
                {
                    "index": choice,
                    "message": self._message(choice),
                    "logprobs": None,
                    "finish_reason": finish,
                }
                for choice, finish in enumerate(self._finish)
            ],
        }
        if usage is not None:
            answer["usage"] = usage
        answer["service_tier"] = "default"
        answer["system_fingerprint"] = SYSTEM_FINGERPRINT
        return _encode(answer)

    def _message(self, choice: int) -> dict[str, Any]:
        content = "".join(self._content[choice]) if self._shows_content else None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content,
            "refusal": None,
            "annotations": [],
        }
        if self._reasoning[choice]:
            message["reasoning_content"] = "".join(self._reasoning[choice])
        if self._tool_calls[choice]:
            for call, pieces in zip(self._tool_calls[choice], self._arguments[choice], strict=True):
                call["function"]["arguments"] = "".join(pieces)
            message["tool_calls"] = self._tool_calls[choice]
        return message
