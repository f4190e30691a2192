"""Chunks of a streamed chat completion: only the members that metering needs are decoded, the rest is passed by.

A typed decoder takes what providers ordinarily send in under a microsecond. What it refuses (a number where a text
belongs, half a surrogate pair, `NaN`) goes the lenient way, member by member: an odd member costs itself, not the
stream. The few edits that the wire contract allows are here too; they leave every other value's text as it came.
"""

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Literal, TypeVar, cast

import msgspec


class ChunkError(ValueError):
    """A payload that is no JSON object."""


class Part(msgspec.Struct, gc=False):
    """One element of a content array: text, or thinking (Mistral), whose text is one level deeper."""

    type: str | None = None
    text: str | None = None
    thinking: "str | list[Part] | None" = None


class Function(msgspec.Struct, gc=False):
    """The function of a tool call, its arguments as a piece of JSON text."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct, gc=False):
    """A piece of a tool call. Mistral sends no index; Alibaba repeats an empty id."""

    index: int | None = None
    id: str | None = None
    function: Function | None = None


class ReasoningDetail(msgspec.Struct, gc=False):
    """One element of OpenRouter's `reasoning_details`; encrypted ones have neither text nor summary."""

    text: str | None = None
    summary: str | None = None


class Audio(msgspec.Struct, gc=False):
    """A piece of spoken output; its base64 data is not looked at."""

    transcript: str | None = None


class Something(msgspec.Struct, gc=False):
    """An object of which only the presence matters."""


class Delta(msgspec.Struct, gc=False):
    """What a chunk adds to a choice."""

    content: str | list[Part] | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[ReasoningDetail] | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Function | None = None
    audio: Audio | None = None
    annotations: list[Something] | None = None
    images: list[Something] | None = None


_NO_DELTA = Delta()


class Choice(msgspec.Struct, gc=False):
    """A choice of a chunk. `message` and `text` count only where there is no `delta`: some send both, the same."""

    index: int = 0
    delta: Delta | None = None
    finish_reason: str | None = None
    text: str | None = None
    message: Delta | None = None

    @property
    def added(self) -> Delta:
        """What the chunk adds, under whichever name."""
        return self.delta or self.message or _NO_DELTA


class XGroq(msgspec.Struct, gc=False):
    """Groq's own member, at times the only one that holds the usage."""

    usage: dict[str, Any] | None = None


class Chunk(msgspec.Struct, gc=False):
    """The members of a chunk that matter here."""

    id: str | None = None
    object: str | None = None
    model: str | None = None
    choices: list[Choice] | None = None
    usage: dict[str, Any] | None = None
    x_groq: XGroq | None = None
    error: Any = None
    """An object or a text where the provider reports a failure inside the stream."""

    @property
    def any_usage(self) -> dict[str, Any] | None:
        """The usage, wherever the provider put it; `None` in nearly all chunks."""
        if self.usage is None and self.x_groq is not None:
            return self.x_groq.usage
        return self.usage


class ChoiceTexts(msgspec.Struct, frozen=True, gc=False):
    """What one choice of a chunk adds, as texts to be counted."""

    index: int
    visible: str
    """Content, refusal and what was said aloud."""
    reasoning: str
    tools: str
    """Names and arguments of tool calls."""
    tool_calls: int
    """Tool calls that begin here. One whose id and name come apart is counted twice, never missed."""


_decode_typed = msgspec.json.Decoder(Chunk).decode


def decode(payload: bytes) -> Chunk:
    """The chunk in the JSON text of an event.

    Raises `ChunkError` where that is no JSON object; `[DONE]` and an empty payload are none.
    """
    try:
        return _decode_typed(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _lenient(Chunk, loads(payload))


def loads(payload: bytes) -> dict[str, Any]:
    """The JSON object in a payload, also where strict parsers refuse it: invalid UTF-8, half surrogates, `NaN`.

    `NaN` and the infinities become null. Raises `ChunkError` where it is no JSON object.
    """
    try:
        # An event stream is decoded with replacement of what is no UTF-8 (WHATWG HTML, "Server-sent events").
        members = json.loads(payload.decode("utf-8", "replace"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ChunkError(f"the event is no JSON: {error}") from None
    if not isinstance(members, dict):
        raise ChunkError("the event is no JSON object")
    return cast("dict[str, Any]", members)


def plain_text(chunk: Chunk) -> str | None:
    """The text of an ordinary chunk: one choice, adding content and nothing else. `None` for any other chunk."""
    choices = chunk.choices
    if choices is None or len(choices) != 1:
        return None
    delta = choices[0].delta
    if delta is None:
        return None
    content = delta.content
    if (
        isinstance(content, str)
        and delta.tool_calls is None
        and delta.reasoning_content is None
        and delta.reasoning is None
        and delta.reasoning_details is None
        and delta.refusal is None
        and delta.function_call is None
        and delta.audio is None
    ):
        return content
    return None


def ordinary_text(chunk: Chunk, seen: AbstractSet[int]) -> str | None:
    """The text of a chunk that adds content to a known choice and says nothing else; None for any other."""
    if chunk.usage is None and chunk.error is None and chunk.x_groq is None:
        choices = chunk.choices
        if choices and choices[0].finish_reason is None and choices[0].index in seen:
            return plain_text(chunk)
    return None


def chunk_texts(chunk: Chunk) -> list[ChoiceTexts]:
    """What each choice of the chunk adds, apart by what it is."""
    return [_choice_texts(choice) for choice in chunk.choices or ()]


def is_usage_only(chunk: Chunk, *, finished: bool = False) -> bool:
    """True for a chunk that only reports usage: dropped when the client did not ask for it.

    That is a chunk with usage and empty `choices`. LiteLLM and OpenRouter put a choice without content into it:
    such a chunk counts too, but only where `finished` says that every choice has finished before, because until
    then it may be the one that names the role. A chunk with a `finish_reason` never counts, nor does Azure's
    prompt filter chunk, which has no usage.
    """
    if chunk.any_usage is None or chunk.error is not None:
        return False
    if not chunk.choices:
        return chunk.choices is not None
    return finished and all(
        choice.finish_reason is None and not choice.text and not _adds(choice.added) for choice in chunk.choices
    )


def with_usage_cost(payload: bytes, cost_usd: str) -> bytes:
    """The payload with `cost_usd`, a plain decimal number as text, as a JSON number in its `usage`.

    A payload without a `usage` object is returned as it is. Order and values of all else are kept to the letter,
    so 64-bit seeds and long fractions survive. Raises `ChunkError` where it is no JSON object.
    """
    members = _raw_members(payload)
    usage = members.get("usage")
    if usage is None or bytes(usage)[:1] != b"{":
        return payload
    counts = _raw_members(bytes(usage))
    counts["cost_usd"] = msgspec.Raw(cost_usd.encode())
    members["usage"] = msgspec.Raw(msgspec.json.encode(counts))
    return msgspec.json.encode(members)


def with_finish_reason_null(payload: bytes) -> bytes:
    """The payload with `finish_reason` null for the choices that ended for their length.

    Choices that ended otherwise keep their reason; all else is kept to the letter.
    Raises `ChunkError` where it is no JSON object with a list of choices.
    """
    members = _raw_members(payload)
    try:
        texts = msgspec.json.decode(members.get("choices", b"[]"), type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        given: Any = loads(payload).get("choices")
        if not isinstance(given, list):
            raise ChunkError("choices are no list") from None
        texts = [msgspec.Raw(json.dumps(each).encode()) for each in given]
    choices: list[Any] = [_raw_members(bytes(text)) if bytes(text)[:1] == b"{" else text for text in texts]
    for choice in choices:
        if isinstance(choice, dict) and bytes(choice.get("finish_reason", b"")) in _RAW_LENGTH_REASONS:
            choice["finish_reason"] = msgspec.Raw(b"null")
    members["choices"] = msgspec.Raw(msgspec.json.encode(choices))
    return msgspec.json.encode(members)


def usage_chunk(like: bytes, usage: Mapping[str, Any]) -> bytes:
    """A chunk that only reports usage, with the id, model and so on of another chunk of its stream.

    Raises `ChunkError` where that one is no JSON object.
    """
    members: dict[str, Any] = {name: raw for name, raw in _raw_members(like).items() if name in _FRAME}
    return msgspec.json.encode({"object": "chat.completion.chunk", **members, "choices": [], "usage": usage})


def finish_chunk(like: bytes, reasons: Mapping[int, str]) -> bytes:
    """A chunk that only ends choices, with the id, model and so on of another chunk of its stream.

    Raises `ChunkError` where that one is no JSON object.
    """
    members: dict[str, Any] = {name: raw for name, raw in _raw_members(like).items() if name in _FRAME}
    choices = [{"index": index, "delta": {}, "finish_reason": reason} for index, reason in reasons.items()]
    return msgspec.json.encode({"object": "chat.completion.chunk", **members, "choices": choices})


_FRAME = ("id", "object", "created", "model", "service_tier", "system_fingerprint")
"""What all chunks of one stream have in common."""

_LENGTH_REASONS = ("length", "max_tokens")
_RAW_LENGTH_REASONS = tuple(f'"{reason}"'.encode() for reason in _LENGTH_REASONS)


def ended_by_length(finish_reason: str | None) -> bool:
    """True where the reason says that the limit of output tokens was reached."""
    return finish_reason in _LENGTH_REASONS


def _choice_texts(choice: Choice) -> ChoiceTexts:
    delta = choice.added
    content = delta.content
    visible = reasoning = ""
    if isinstance(content, str):
        visible = content
    elif content:
        visible = _parts_text(content, "text")
        reasoning = _parts_text(content, "thinking")
    elif delta is _NO_DELTA:
        visible = choice.text or ""
    if delta.refusal:
        visible += delta.refusal
    if delta.audio is not None and delta.audio.transcript:
        visible += delta.audio.transcript
    # The same reasoning may come under all three names.
    reasoning += delta.reasoning_content or delta.reasoning or _details_text(delta.reasoning_details)
    tools = ""
    begun = 0
    for call in delta.tool_calls or ():
        function = call.function
        if function is not None:
            tools += (function.name or "") + (function.arguments or "")
        if call.id or (function is not None and function.name):
            begun += 1
    if delta.function_call is not None:
        tools += (delta.function_call.name or "") + (delta.function_call.arguments or "")
        begun += bool(delta.function_call.name)
    return ChoiceTexts(choice.index, visible, reasoning, tools, begun)


def _parts_text(parts: list[Part], kind: Literal["text", "thinking"]) -> str:
    text = ""
    for part in parts:
        if kind == "text":
            text += part.text or ""
        elif isinstance(part.thinking, str):
            text += part.thinking
        elif part.thinking:
            text += _parts_text(part.thinking, "text")
    return text


def _details_text(details: list[ReasoningDetail] | None) -> str:
    if not details:
        return ""
    return "".join(detail.text or detail.summary or "" for detail in details)


def _adds(delta: Delta) -> bool:
    """True where the delta holds anything but a role."""
    return any(getattr(delta, name) for name in Delta.__struct_fields__)


def _raw_members(payload: bytes) -> dict[str, msgspec.Raw]:
    """The members of an object, each as its JSON text."""
    try:
        return msgspec.json.decode(payload, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        members = loads(payload)
    return {
        name.encode("utf-8", "replace").decode(): msgspec.Raw(json.dumps(value).encode())
        for name, value in members.items()
    }


_Made = TypeVar("_Made", bound=msgspec.Struct)

_STRUCTS: Mapping[str, type[msgspec.Struct]] = {
    "choices": Choice,
    "delta": Delta,
    "message": Delta,
    "tool_calls": ToolCall,
    "function": Function,
    "function_call": Function,
    "reasoning_details": ReasoningDetail,
    "audio": Audio,
    "content": Part,
    "thinking": Part,
    "annotations": Something,
    "images": Something,
    "x_groq": XGroq,
}
"""What an object, or each object of an array, is made into, by the name of the member that holds it."""


def _lenient(made: type[_Made], members: Mapping[str, Any]) -> _Made:
    """A struct of the members that are of their type; the others keep their defaults."""
    taken: dict[str, Any] = {}
    for field in msgspec.structs.fields(made):
        value = members.get(field.name)
        if value is None:
            continue
        inner = _STRUCTS.get(field.name)
        if inner is not None and isinstance(value, dict):
            value = _lenient(inner, cast("dict[str, Any]", value))
        elif inner is not None and isinstance(value, list):
            objects = (each for each in value if isinstance(each, dict))
            value = [_lenient(inner, cast("dict[str, Any]", each)) for each in objects]
        elif field.name == "arguments" and not isinstance(value, str):
            # Native APIs behind thin adapters send the arguments as an object.
            value = json.dumps(value)
        try:
            taken[field.name] = msgspec.convert(value, field.type)
        except msgspec.ValidationError:
            continue
    return made(**taken)


class _Model(msgspec.Struct):
    model: str | None = None


def model_of(payload: bytes) -> str:
    """The model that a chunk names; empty: none."""
    try:
        return _MODEL.decode(payload).model or ""
    except (msgspec.MsgspecError, UnicodeError):
        return ""


_MODEL = msgspec.json.Decoder(_Model)
