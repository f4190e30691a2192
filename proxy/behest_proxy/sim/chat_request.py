"""What the simulator reads of a chat-completions request, and how many prompt tokens it is."""

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from behest_proxy.sim.behaviour import Behaviour, parse_behaviour
from behest_proxy.sim.refusal import Refusal
from behest_proxy.sim.text import token_count

TOKENS_PER_MESSAGE = 3
TOKENS_PER_NAME = 1
TOKENS_PER_REPLY = 3

_Limit = Annotated[int, Meta(ge=1)] | None


class Message(msgspec.Struct, frozen=True):
    """One message of the prompt."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The text of the content; parts that are not text have none."""
        if isinstance(self.content, list):
            return "".join(part["text"] for part in self.content if isinstance(part.get("text"), str))
        return self.content or ""


class StreamOptions(msgspec.Struct, frozen=True):
    """What a client wants of a stream."""

    include_usage: bool | None = None


class ChatRequest(msgspec.Struct, frozen=True):
    """The members that have an effect; any other is ignored."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: _Limit = None
    max_completion_tokens: _Limit = None
    seed: int | None = None
    tools: list[dict[str, Any]] | None = None
    sim: msgspec.Raw = msgspec.Raw()

    @property
    def choices(self) -> int:
        """How many choices are asked for."""
        return self.n or 1

    @property
    def limit(self) -> int | None:
        """The most output tokens of one choice; both limits hold where both are given."""
        return min((limit for limit in (self.max_completion_tokens, self.max_tokens) if limit), default=None)

    @property
    def wants_usage(self) -> bool:
        """Whether the stream was asked to end with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def last_assistant_text(self) -> str:
        """What the assistant said last, empty where it said nothing."""
        return next((message.text for message in reversed(self.messages) if message.role == "assistant"), "")

    def tool_name(self, call: int) -> str:
        """The name of the function that this call calls: the offered ones in turn."""
        offered: list[Any] = [tool.get("function") for tool in self.tools or ()]
        names: list[str] = [
            function["name"]
            for function in offered
            if isinstance(function, dict) and isinstance(function.get("name"), str)
        ]
        return names[call % len(names)] if names else "simulated_tool"


def parse_chat_request(
    body: bytes, *, sim_header: bytes | None = None, otherwise: bytes | None = None
) -> tuple[ChatRequest, Behaviour]:
    """The request and the behaviour that it asks for.

    Raises `Refusal` (400) where a member has no such value; `param` names it.
    """
    try:
        request = msgspec.json.decode(body, type=ChatRequest)
    except msgspec.ValidationError as error:
        raise Refusal(400, str(error), param=_member_at_fault(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"The body is not a JSON object: {error}") from None
    if request.stream_options is not None and not request.stream:
        # OpenAI refuses this too, so a gateway that turns streaming off has to take the options out.
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise Refusal(400, message, param="stream_options")
    return request, parse_behaviour(header=sim_header, body=request.sim, otherwise=otherwise)


def _member_at_fault(message: str) -> str | None:
    # The place wins over the name: in `messages[0]` it is `messages` that is wrong.
    found = re.search(r"at `\$\.([^`.\[]*)", message) or re.search(r"missing required field `([^`]*)`", message)
    return found[1] if found else None


def count_prompt_tokens(messages: list[Message]) -> int:
    """Prompt tokens as OpenAI documents them for its chat models.

    Three for each message besides its role, content and name, one more for a name, three that prime the reply
    (OpenAI cookbook, "How to count tokens with tiktoken"). Tools and parts that are not text count nothing.
    """
    count = token_count
    total = TOKENS_PER_REPLY
    for message in messages:
        total += TOKENS_PER_MESSAGE + count(message.role) + count(message.text)
        if message.name is not None:
            total += TOKENS_PER_NAME + count(message.name)
    return total
