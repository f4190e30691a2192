"""A chat completion request: what it asks, what it may cost at most, and how it goes on to the provider.

Only members that cost money, choose the answer's form or shape the bound are looked at; every other member goes on
as it came. A member that would cost what cannot be bounded yet is refused by name, never passed on in silence.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from behest_proxy.errors import InvalidRequest
from behest_proxy.members import members_of
from behest_proxy.models import ModelFacts
from behest_proxy.tokens import TokenCounter, bytes_bound

CHOICES_MAX = 128
PROMPT_TOKENIZED_BYTES_MAX = 32 * 1024
"""Prompts up to here are tokenized at admission; above, their bytes are the bound (1 MB would take 28 ms), and samples
of so much in all tell about how many tokens they are."""
_SAMPLES = 8
# What chat templates and tool definitions put around the text. Exact for the tokenizers of OpenAI's models, as their
# cookbook documents; for others the generous constants cover templates and default system prompts.
_TOKENS_PER_REPLY = 3
_TOKENS_PER_MESSAGE = 3
_TOOLS_OVERHEAD_TOKENS = 16
_FOREIGN_TOKENS_PER_MESSAGE = 8
_FOREIGN_OVERHEAD_TOKENS = 64
_TOKENS_PER_MEDIUM = 1000
"""About what a picture costs: OpenAI documents 765 for one of 1024 x 1024, Anthropic 1,600 at most. It is charged only
where the provider did not come to say what it really was."""


class _Part(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: msgspec.Raw | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks, checked. `members` holds everything as it came."""

    members: dict[str, msgspec.Raw]
    model: str | None
    """None: the project's default."""
    messages: list[_Message]
    stream: bool
    include_usage: bool
    choices: int
    output_limit_tokens: int | None
    """The caller's own limit per choice, the larger one of two; None: none was given."""
    bounded_input: bool
    """False: images, audio or files, whose tokens cannot be counted here."""
    price_context: dict[str, str]
    """What the caller asks that is priced apart: `service_tier`, `speed`, `cache_ttl`; without what is ordinary."""


class InputCount(msgspec.Struct, frozen=True):
    """The input's tokens: the best count, and the most that it can be."""

    best_tokens: int
    bound_tokens: int
    exact: bool
    """The best count comes from the text itself, not from its length."""


def _typed(members: dict[str, msgspec.Raw], key: str, type_: Any) -> Any:
    raw = members.get(key)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=type_ | None)
    except msgspec.DecodeError as error:
        # It says, for instance: Expected `str`, got `int` - at `$[0].role`
        text, _, path = str(error).partition(" - at `$")
        param = key + path.rstrip("`")
        raise InvalidRequest(f"{param}: {text[:1].lower()}{text[1:]}", param=param) from None
    except RecursionError:
        raise InvalidRequest(f"{key} is nested too deeply", param=key) from None


def _refused(members: dict[str, msgspec.Raw], key: str, why: str, *allowed: Any) -> None:
    """Refuse a member unless it is absent, null, or one of the values that cost nothing more."""
    raw = members.get(key)
    if raw is None:
        return
    value = _typed(members, key, Any)
    if value is not None and value not in allowed:
        raise InvalidRequest(f"{key}: {why}", param=key)


def _refuse_server_tools(members: dict[str, msgspec.Raw]) -> None:
    """Refuse tools that the provider runs itself: what they cost is not seen in the stream."""
    tools: list[msgspec.Raw] | None = _typed(members, "tools", list[msgspec.Raw])
    for index, text in enumerate(tools or ()):
        param = f"tools[{index}]"
        if bytes(text)[:1] != b"{":
            raise InvalidRequest(f"{param}: must be an object", param=param)
        tool = members_of(bytes(text), param)
        for key in tool:
            if key != "type" and key.casefold() == "type":
                raise InvalidRequest(f"{param}.{key} is not a member: did you mean 'type'?", param=f"{param}.{key}")
        kind = _typed(tool, "type", Any)
        if kind not in _CALLER_TOOLS:
            raise InvalidRequest(
                f"{param}.type: {str(kind)[:40]!r} is no tool that the caller runs (function, custom), and what a"
                " provider's own tools cost is not seen in the stream",
                param=f"{param}.type",
            )


_TEXT_PARTS = ("text", "refusal")
_CALLER_TOOLS = ("function", "custom")

_KNOWN = frozenset(
    (
        *("model", "messages", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "best_of"),
        *("prediction", "modalities", "audio", "service_tier", "web_search_options", "search_parameters"),
        *("enable_search", "models", "route", "provider", "plugins", "tools", "functions", "response_format"),
        *("speed", "cache_control"),
    )
)
"""The members that are looked at here: another spelling of one of them is refused."""


def parse(body: bytes) -> ChatRequest:
    """The request in a body.

    Raises `InvalidRequest`, which names the member, for what is malformed, repeated, or would cost what cannot be
    bounded.
    """
    members = members_of(body)
    for key in members:
        # Some parsers ignore case, by Unicode's folding: also the Kelvin sign is a k to them.
        if key not in _KNOWN and key.casefold() in _KNOWN:
            raise InvalidRequest(f"{key!r} is not a member: did you mean {key.casefold()!r}?", param=key)
    messages: list[_Message] | None = _typed(members, "messages", list[_Message])
    if not messages:
        raise InvalidRequest("messages: at least one message is needed", param="messages")
    model = _typed(members, "model", str)
    options: _StreamOptions | None = _typed(members, "stream_options", _StreamOptions)
    choices = _in_range(members, "n", 1, CHOICES_MAX)
    _refused(members, "best_of", "is not supported here: use n", 1)
    _refused(members, "prediction", "predicted output is billed beyond what is seen and is not supported here")
    _refused(members, "modalities", "only text can be metered", ["text"], [])
    _refused(members, "audio", "only text can be metered")
    for key in ("web_search_options", "search_parameters", "enable_search"):
        _refused(members, key, "searches by the provider are billed apart and are not supported here", False)
    for key in ("models", "route", "provider", "plugins"):
        _refused(members, key, "would let the provider choose what is billed; the upstream does not allow it")
    _refuse_server_tools(members)
    limits = [
        limit
        for key in ("max_completion_tokens", "max_tokens")
        if (limit := _in_range(members, key, 1, 2**31 - 1)) is not None
    ]
    return ChatRequest(
        members=members,
        model=model if model not in ("", "default") else None,
        messages=messages,
        stream=bool(_typed(members, "stream", bool)),
        include_usage=bool(options and options.include_usage),
        choices=choices or 1,
        # Which of the two a provider obeys is its choice.
        output_limit_tokens=max(limits) if limits else None,
        bounded_input=all(
            part.type in ("text", "refusal")
            for message in messages
            if isinstance(message.content, list)
            for part in message.content
        ),
        price_context=_price_context(members),
    )


_ORDINARY = {"service_tier": ("auto",), "speed": ("standard", "auto")}
"""Per member that chooses how fast and how dearly an answer is made: what leaves the choice as it is without it."""


def _price_context(members: dict[str, msgspec.Raw]) -> dict[str, str]:
    context: dict[str, str] = {}
    for key, ordinary in _ORDINARY.items():
        value: str | None = _typed(members, key, str)
        if value is not None and value not in ordinary:
            context[key] = value
    if any(_caches_for_long(members[key]) for key in _CACHING if key in members):
        context["cache_ttl"] = "1h"
    return context


_CACHING = ("messages", "tools", "cache_control")
_SHORT_CACHE = (None, "5m")


def _caches_for_long(raw: msgspec.Raw) -> bool:
    """Whether something in it asks for a cache that lives longer than the ordinary five minutes.

    `{"cache_control": {"type": "ephemeral", "ttl": "1h"}}`, wherever Anthropic and its resellers take it.
    """
    text = bytes(raw)
    # Almost always it is not there; a key may also be written in escapes.
    if b"ttl" not in text and b"\\u" not in text:
        return False
    try:
        left: list[Any] = [msgspec.json.decode(text)]
    except RecursionError:
        raise InvalidRequest("messages: is nested too deeply", param="messages") from None
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if value.get("type") == "ephemeral" and value.get("ttl") not in _SHORT_CACHE:
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False


def _in_range(members: dict[str, msgspec.Raw], key: str, low: int, high: int) -> int | None:
    value: int | None = _typed(members, key, int)
    if value is not None and not low <= value <= high:
        raise InvalidRequest(f"{key}: must be from {low} to {high}, got {value}", param=key)
    return value


def count_input(request: ChatRequest, counter: TokenCounter, facts: ModelFacts) -> InputCount:
    """The tokens of the input.

    Raises `InvalidRequest` where they have no bound: content that is no text, for a model whose context limit is
    not known.
    """
    texts = list(_texts(request))
    size_bytes = sum(map(bytes_bound, texts))
    messages = len(request.messages)
    if size_bytes <= PROMPT_TOKENIZED_BYTES_MAX:
        tokens = sum(map(counter.count, texts))
        exact = True
    else:
        tokens = _sampled("\n".join(texts), counter)
        exact = False
    best = tokens + _TOKENS_PER_REPLY + _TOKENS_PER_MESSAGE * messages
    if exact and counter.exact:
        bound = best + (_TOOLS_OVERHEAD_TOKENS if "tools" in request.members or "functions" in request.members else 0)
    else:
        if request.bounded_input:
            # The JSON itself, so that members that are not known here, such as documents, are inside the bound.
            size_bytes = sum(memoryview(raw).nbytes for raw in request.members.values())
        bound = size_bytes + _FOREIGN_OVERHEAD_TOKENS + _FOREIGN_TOKENS_PER_MESSAGE * messages
    if not request.bounded_input:
        if facts.context_limit_tokens is None:
            raise InvalidRequest(
                "messages: images, audio and files cannot be counted here, and the model's context limit is not known:"
                " set contextLimit on its Upstream",
                param="messages",
            )
        bound = max(bound, facts.context_limit_tokens)
    best = min(best + _TOKENS_PER_MEDIUM * _media(request), bound)
    return InputCount(best_tokens=best, bound_tokens=bound, exact=exact)


def _sampled(text: str, counter: TokenCounter) -> int:
    """About how many tokens a long text is: what samples from all over it are, for all of it."""
    data = text.encode("utf-8", "replace")
    size = PROMPT_TOKENIZED_BYTES_MAX // _SAMPLES
    step = (len(data) - size) // (_SAMPLES - 1)
    samples = (data[at : at + size] for at in range(0, step * _SAMPLES, step))
    counted = sum(counter.count(sample.decode("utf-8", "ignore")) for sample in samples)
    return -(-counted * len(data) // PROMPT_TOKENIZED_BYTES_MAX)


def _media(request: ChatRequest) -> int:
    """Parts of messages that are no text."""
    return sum(
        part.type not in _TEXT_PARTS
        for message in request.messages
        if isinstance(message.content, list)
        for part in message.content
    )


def _texts(request: ChatRequest) -> Iterator[str]:
    for message in request.messages:
        yield message.role
        if isinstance(message.content, str):
            yield message.content
        elif message.content is not None:
            for part in message.content:
                yield part.text or ""
                yield part.refusal or ""
        for text in (message.name, message.refusal):
            if text:
                yield text
        for call in message.tool_calls or ():
            yield bytes(call).decode("utf-8", "replace")
        if message.function_call is not None:
            yield bytes(message.function_call).decode("utf-8", "replace")
    for key in ("tools", "functions", "response_format"):
        if key in request.members:
            yield bytes(request.members[key]).decode("utf-8", "replace")


def upstream_body(
    request: ChatRequest,
    *,
    model: str,
    ask_usage: bool,
    clamp_field: str,
    clamp_tokens: int | None,
    streams: bool = True,
) -> bytes:
    """The body for the provider: the caller's members, with ours in the place of those that cost or route.

    The answer is always streamed where the provider can (`streams`), so that it can be stopped; `clamp_tokens` is the
    most that each choice may generate, None leaves the caller's own limit as it is.
    """
    members = dict(request.members)
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    members["stream"] = msgspec.Raw(b"true" if streams else b"false")
    if ask_usage and streams:
        options: dict[str, Any] = _typed(members, "stream_options", dict[str, Any]) or {}
        members["stream_options"] = msgspec.Raw(msgspec.json.encode({**options, "include_usage": True}))
    else:
        members.pop("stream_options", None)
    if clamp_tokens is not None:
        members.pop("max_tokens", None)
        members.pop("max_completion_tokens", None)
        members[clamp_field] = msgspec.Raw(b"%d" % clamp_tokens)
    return msgspec.json.encode(members)
