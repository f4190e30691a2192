"""What a call of a thread means: which messages go to the provider, which are new, and whether a broken reply goes on.

Pure: history and request come in, a `Turn` goes out. The client says what it will, and often everything again: what
history already holds is neither sent nor kept twice. One question has more than one answer, the repeated message:

- the thread's last reply broke off, and the call ends with the very message that it answered: it *continues*;
- the reply is whole: the same message is a new turn, unless the client only asks for the events that it missed.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from uuid import UUID

import msgspec

from behest_proxy.aggregate import AggregateTooLarge, Aggregator
from behest_proxy.chunk import ChunkError, loads
from behest_proxy.error_codes import ErrorCode
from behest_proxy.errors import Conflict, InvalidRequest
from behest_proxy.request import ChatRequest, parse
from behest_proxy.sse import DONE_PAYLOAD

WINDOW_MESSAGES = 40
"""Stored messages that go before a request's own, where the project does not say otherwise."""
WINDOW_BYTES = 64 * 1024
MESSAGE_BYTES_MAX = 1024 * 1024
"""Of one message that is kept."""

Continuation = Literal["Prefix", "ContinueFinalMessage", "Prompt", "None"]

GO_ON = (
    "Your answer above was cut off in transit. Continue it exactly where it ends, in the middle of a word if need be."
    " Repeat nothing of it and add no introduction."
)

_INSTRUCTIONS = ("system", "developer")


class CannotContinue(Conflict):
    """A broken reply that cannot be continued as it was asked."""

    code = ErrorCode.CANNOT_CONTINUE


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the history."""

    role: str
    content: bytes
    """The whole message, a JSON object."""
    is_whole: bool = True
    """False: a reply that broke off, or is still under way."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a thread is remembered."""

    messages: int = WINDOW_MESSAGES
    size_bytes: int = WINDOW_BYTES
    system_prompt: str | None = None


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What a call of a thread means."""

    messages: list[msgspec.Raw]
    """What the provider is sent, but for what continues a reply (`continued`)."""
    new: list[msgspec.Raw]
    """What the thread keeps, before the reply."""
    repeats: bool = False
    """The call ends with the message that the thread's last reply answers. If that broke off, nothing is new."""


class EventId(msgspec.Struct, frozen=True):
    """`<generation>-<n>`: the n-th event of a reply, over all attempts to give it. From 1."""

    generation_id: UUID
    number: int

    def __str__(self) -> str:
        return f"{self.generation_id.hex}-{self.number}"


def event_id(text: str) -> EventId:
    """The event id in a Last-Event-ID header. Raises `InvalidRequest`."""
    generation, _, number = text.partition("-")
    try:
        if len(generation) == 32 and number.isascii() and number.isdigit() and len(number) < 10:
            return EventId(UUID(hex=generation), int(number))
    except ValueError:
        pass
    raise InvalidRequest("Last-Event-ID: is no id of an event of ours", param="Last-Event-ID")


def take_turn(history: Sequence[Said], request: ChatRequest, memory: Memory) -> Turn:
    """What a call with this history means.

    A system message at the request's beginning is an instruction for this call: it is sent first and not kept. Raises
    `InvalidRequest`.
    """
    raws = msgspec.json.decode(request.members["messages"], type=list[msgspec.Raw])
    led = next((at for at, one in enumerate(request.messages) if one.role not in _INSTRUCTIONS), len(raws))
    lead, asked = raws[:led], raws[led:]
    if not asked:
        raise InvalidRequest("messages: a thread needs a message that is no instruction", param="messages")
    if request.choices > 1:
        raise InvalidRequest("n: a thread has one reply", param="n")
    for at, raw in enumerate(asked):
        if memoryview(raw).nbytes > MESSAGE_BYTES_MAX:
            raise InvalidRequest(
                f"messages[{led + at}]: a thread keeps no message of more than {MESSAGE_BYTES_MAX} bytes",
                param=f"messages[{led + at}]",
                details={"limit": "message_bytes", "max": MESSAGE_BYTES_MAX},
            )
    known = [_known(one.content, is_whole=one.is_whole) for one in history]
    said = [_known(bytes(raw), is_whole=True) for raw in asked]
    instructions = [*([_instruction(memory.system_prompt)] if memory.system_prompt else []), *lead]
    repeats = _repeats(known, said)
    if repeats and not history[-1].is_whole:
        return Turn(messages=[*instructions, *_window(history[:-1], memory, at_least=1)], new=[], repeats=True)
    new = asked[_held(known, said[:-1]) :]
    return Turn(messages=[*instructions, *_window(history, memory), *new], new=new, repeats=repeats)


def without_thread(request: ChatRequest, system_prompt: str | None) -> list[msgspec.Raw] | None:
    """The messages of a call that has no thread, where the project adds to them."""
    if not system_prompt:
        return None
    return [_instruction(system_prompt), *msgspec.json.decode(request.members["messages"], type=list[msgspec.Raw])]


def with_messages(
    request: ChatRequest, messages: Sequence[msgspec.Raw], more: Mapping[str, msgspec.Raw] | None = None
) -> ChatRequest:
    """The request with other messages: what is charged and bounded is reckoned from them. Raises `InvalidRequest`."""
    return parse(msgspec.json.encode({**request.members, "messages": list(messages), **(more or {})}))


def continued(
    turn: Turn, reply: Mapping[str, Any], *, said_tokens: int, request: ChatRequest, continuation: Continuation
) -> ChatRequest:
    """The request that goes on where a reply broke off; `said_tokens` are counted off the caller's own limit.

    A reply that had said nothing yet is asked for again. Raises `CannotContinue`.
    """
    if reply.get("tool_calls") or reply.get("function_call"):
        raise CannotContinue("the reply broke off inside a tool call, which cannot be continued: begin a new turn")
    text = text_of(reply)
    if not text:
        return with_messages(request, turn.messages)
    more: dict[str, msgspec.Raw] = {}
    for name in ("max_tokens", "max_completion_tokens"):
        limit = request.members.get(name)
        if limit is not None and bytes(limit) != b"null":
            more[name] = msgspec.Raw(b"%d" % max(1, msgspec.json.decode(limit, type=int) - said_tokens))
    if continuation == "None":
        raise CannotContinue("the provider of this model cannot continue a broken reply: begin a new turn")
    beginning: dict[str, Any] = {"role": "assistant", "content": text}
    after: list[msgspec.Raw] = []
    match continuation:
        case "Prefix":
            beginning["prefix"] = True
        case "ContinueFinalMessage":
            more |= {"continue_final_message": msgspec.Raw(b"true"), "add_generation_prompt": msgspec.Raw(b"false")}
        case "Prompt":
            after = [msgspec.Raw(msgspec.json.encode({"role": "user", "content": GO_ON}))]
    return with_messages(request, [*turn.messages, msgspec.Raw(encoded(beginning)), *after], more)


def reply_of(events: Sequence[bytes]) -> dict[str, Any]:
    """The message that the events of a reply come to, as far as they go."""
    aggregator = Aggregator()
    for event in events:
        payload = event.removeprefix(b"data: ").rstrip(b"\n")
        if payload == DONE_PAYLOAD:
            continue
        try:
            aggregator.feed(payload)
        except (ChunkError, AggregateTooLarge):
            break
    choices: list[dict[str, Any]] = loads(aggregator.body()).get("choices") or []
    message: dict[str, Any] = choices[0]["message"] if choices else {}
    return {"role": "assistant", "content": None, **message}


def encoded(message: Mapping[str, Any]) -> bytes:
    """A message as JSON text, also where a provider sent half a surrogate pair."""
    try:
        return msgspec.json.encode(message)
    except UnicodeEncodeError:
        return json.dumps(message).encode()


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message's content, whatever its form."""
    content: Any = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def _instruction(text: str) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode({"role": "system", "content": text}))


class _Known(msgspec.Struct, frozen=True):
    """What two messages are compared by."""

    role: str
    text: str
    rest: bytes
    """Everything else that makes a difference."""
    is_whole: bool

    def is_same(self, other: "_Known") -> bool:
        """Whether a client means this message with `other`: of a broken reply it may have seen less, or more."""
        if self.role != other.role:
            return False
        if not self.is_whole and self.role == "assistant":
            return self.text.startswith(other.text) or other.text.startswith(self.text)
        return self.text == other.text and self.rest == other.rest


_COMPARED = ("tool_calls", "tool_call_id", "function_call", "name")


def _known(content: bytes, *, is_whole: bool) -> _Known:
    message = _members(content)
    parts: Any = message.get("content")
    others = [
        part for part in (parts if isinstance(parts, list) else []) if not isinstance(part, dict) or "text" not in part
    ]
    rest = {name: message[name] for name in _COMPARED if message.get(name)}
    return _Known(
        role=str(message.get("role")),
        text=text_of(message),
        rest=json.dumps([others, rest], sort_keys=True).encode(),
        is_whole=is_whole,
    )


def _repeats(known: Sequence[_Known], said: Sequence[_Known]) -> bool:
    """Whether the call ends with the message that the last reply is an answer to."""
    if len(known) < 2 or known[-1].role != "assistant" or not known[-2].is_same(said[-1]):
        return False
    # Who sends everything again, the reply too, says the same a second time: that is another turn.
    before = said[:-1]
    seen = known[len(known) - len(before) :] if 0 < len(before) <= len(known) else []
    return not (seen and all(ours.is_same(theirs) for ours, theirs in zip(seen, before, strict=True)))


def _held(known: Sequence[_Known], said: Sequence[_Known]) -> int:
    """How many of the first messages are held by the history already, as one piece of it."""
    best = 0
    for begin in range(len(known)):
        if best >= min(len(said), len(known) - begin):
            break
        length = 0
        while length < len(said) and begin + length < len(known) and known[begin + length].is_same(said[length]):
            length += 1
        best = max(best, length)
    return best


def _window(history: Sequence[Said], memory: Memory, *, at_least: int = 0) -> list[msgspec.Raw]:
    """The end of the history that is remembered. It begins with a user's message, so that no answer lacks its question.

    `at_least` so many messages are in it, whatever the bounds say: what is asked now.
    """
    begin = len(history)
    size_bytes = 0
    while begin > 0 and len(history) - begin < max(memory.messages, at_least):
        size_bytes += len(history[begin - 1].content)
        if size_bytes > memory.size_bytes and len(history) - begin >= at_least:
            break
        begin -= 1
    while begin < len(history) - at_least and history[begin].role != "user":
        begin += 1
    # A reply that broke off before its first word is nothing that a provider could read.
    return [msgspec.Raw(_sendable(one)) for one in history[begin:] if one.is_whole or text_of(_members(one.content))]


def _sendable(one: Said) -> bytes:
    """A stored message as a provider takes it: of a reply only what a request may contain."""
    if one.role != "assistant":
        return one.content
    message = _members(one.content)
    sent: dict[str, Any] = {"role": "assistant", "content": message.get("content")}
    for name in ("refusal", "tool_calls", "function_call", "name"):
        if message.get(name):
            sent[name] = message[name]
    if not one.is_whole:
        # A tool call that broke off is nothing that a provider could read.
        sent.pop("tool_calls", None)
        sent.pop("function_call", None)
        sent["content"] = text_of(message)
    return encoded(sent)


def _members(content: bytes) -> dict[str, Any]:
    try:
        return loads(content)
    except ChunkError:
        raise InvalidRequest("messages: a message cannot be read", param="messages") from None
