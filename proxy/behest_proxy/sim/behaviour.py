"""What a request may ask of the simulator: the member `sim` of the body, and equally the header `x-sim`.

The members' meanings stand beside them, once: `--help` and the table of docs/simulator.md are made of them.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import msgspec
from msgspec import Meta

from behest_proxy.sim.refusal import Refusal

MAX_OUTPUT_TOKENS = 1_000_000
_HOUR_MS = 3_600_000

Count = Annotated[int, Meta(ge=0, le=MAX_OUTPUT_TOKENS)]
Positive = Annotated[int, Meta(ge=1, le=MAX_OUTPUT_TOKENS)]
Duration = Annotated[float, Meta(ge=0, le=_HOUR_MS)]


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The members of `sim`. A *chunk* is an event that carries output tokens; with a recording, any event."""

    output_tokens: Annotated[Count, Meta(description="tokens that each choice says, before any limit")] = 64
    text: Annotated[str | None, Meta(description="exactly this text instead of made-up words")] = None
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        Meta(description="which made-up words; without it the request's `seed`, else 0"),
    ] = None
    tool_calls: Annotated[
        Annotated[int, Meta(ge=0, le=32)],
        Meta(description="so many parallel tool calls instead of text; `output_tokens` are shared among them"),
    ] = 0
    reasoning_tokens: Annotated[Count, Meta(description="tokens of reasoning before the answer")] = 0
    reasoning_visible: Annotated[
        bool, Meta(description="reasoning is sent as `reasoning_content`; else only usage knows of it")
    ] = False
    ignore_max_tokens: Annotated[bool, Meta(description="does not stop at `max_completion_tokens` or `max_tokens`")] = (
        False
    )
    continue_assistant: Annotated[
        bool,
        Meta(
            description="where the last assistant message is the beginning of this text, says only the rest "
            "and is not broken off again: so the same request can be sent after a break"
        ),
    ] = False
    recording: Annotated[
        str | None,
        Meta(description="sends this file of `--recordings` byte for byte (`.sse` may be left out)"),
    ] = None

    tokens_per_chunk: Annotated[Positive, Meta(description="output tokens in one chunk")] = 1
    chunk_interval_ms: Annotated[Duration, Meta(description="time from one chunk to the next")] = 0
    first_chunk_delay_ms: Annotated[Duration, Meta(description="time from the head to the first event")] = 0
    head_delay_ms: Annotated[Duration, Meta(description="time from the request to the head")] = 0

    usage: Annotated[
        Literal["asked", "always", "never", "every_chunk", "finish_chunk"],
        Meta(
            description="where usage stands: in an event of its own if `stream_options` asks or `always`, "
            "so far in `every_chunk`, in the `finish_chunk`, or `never`"
        ),
    ] = "asked"
    cached_tokens: Annotated[Count, Meta(description="reported as `prompt_tokens_details.cached_tokens`")] = 0
    extra_usage_tokens: Annotated[Count, Meta(description="reports so many completion tokens more than it said")] = 0

    status: Annotated[
        Annotated[int, Meta(ge=200, le=599)],
        Meta(description="another status than 200 answers with OpenAI's error envelope"),
    ] = 200
    retry_after_s: Annotated[
        Annotated[int, Meta(ge=0, le=86_400)] | None,
        Meta(description="header `retry-after` of an error answer; without it 1 where the status is 429"),
    ] = None
    body: Annotated[
        Literal["normal", "html", "garbage", "bad_json", "empty"],
        Meta(description="another body: a proxy's page, random bytes, JSON cut short, nothing at all"),
    ] = "normal"
    reset_before_head: Annotated[bool, Meta(description="resets instead of answering")] = False
    reset_after_chunks: Annotated[
        Count | None, Meta(description="after so many chunks HTTP/2 resets the stream, HTTP/1.1 just closes")
    ] = None
    reset_code: Annotated[
        Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)],
        Meta(description="the HTTP/2 error code of both resets (2 INTERNAL_ERROR, 7 REFUSED_STREAM)"),
    ] = 2
    end_after_chunks: Annotated[
        Count | None,
        Meta(description="after so many chunks the body ends cleanly, without finish and `[DONE]`"),
    ] = None
    stall_after_chunks: Annotated[
        Count | None, Meta(description="after so many chunks nothing more comes until the client goes")
    ] = None
    error_event_after_chunks: Annotated[
        Count | None, Meta(description="after so many chunks an error event comes, then the end")
    ] = None
    error_event_named: Annotated[bool, Meta(description="the error event has a line `event: error`")] = False
    no_done: Annotated[bool, Meta(description="leaves `[DONE]` out")] = False

    crlf: Annotated[bool, Meta(description="ends lines with CR LF")] = False
    chunk_split: Annotated[
        Positive | None,
        Meta(
            description="cuts events (a recording: the body) into network writes of so many bytes; "
            "a recording is then paced by the write"
        ),
    ] = None
    chunk_split_random: Annotated[
        bool, Meta(description="cuts by seed into 1 to 2 x `chunk_split` - 1 bytes instead")
    ] = False

    @property
    def breaks(self) -> tuple[tuple[str, int], ...]:
        """The ways in which the body breaks off, each with the number of chunks before it."""
        named = (
            ("reset", self.reset_after_chunks),
            ("ended_early", self.end_after_chunks),
            ("stalled", self.stall_after_chunks),
            ("error_event", self.error_event_after_chunks),
        )
        return tuple((how, chunks) for how, chunks in named if chunks is not None)


def parse_behaviour(*, header: bytes | None, body: msgspec.Raw, otherwise: bytes | None = None) -> Behaviour:
    """The behaviour that a request asks for; a member of the body wins over the same one of the header.

    Members that neither names are those of `otherwise`, a JSON object like theirs.

    Raises `Refusal` (400) naming the member where one is unknown or has no such value.
    """
    try:
        members: dict[str, msgspec.Raw] = {}
        for source in (otherwise, header, bytes(body)):
            if source:
                members.update(msgspec.json.decode(source, type=dict[str, msgspec.Raw] | None) or {})
        return msgspec.json.decode(msgspec.json.encode(members), type=Behaviour) if members else _DEFAULT
    except msgspec.DecodeError as error:
        raise Refusal(400, f"sim: {error}", param=_member_at_fault(str(error))) from None


_DEFAULT = Behaviour()


def _member_at_fault(message: str) -> str:
    found = re.search(r"unknown field `([^`]*)`|at `\$\.([^`.\[]*)", message)
    return f"sim.{found[1] or found[2]}" if found else "sim"


class MemberHelp(NamedTuple):
    """One row of the table of behaviour."""

    name: str
    values: str
    default: str
    meaning: str


def behaviour_help() -> Iterator[MemberHelp]:
    """The members of `sim` in their order, for `--help` and docs/simulator.md."""
    hints = get_type_hints(Behaviour, include_extras=True)
    for field in msgspec.structs.fields(Behaviour):
        annotation = hints[field.name]
        meanings: list[str] = [
            note.description for note in annotation.__metadata__ if getattr(note, "description", None)
        ]
        yield MemberHelp(
            name=field.name,
            values=_values_of(annotation),
            default=msgspec.json.encode(field.default).decode(),
            meaning=meanings[-1],
        )


def _values_of(annotation: Any) -> str:
    shape: Any = msgspec.inspect.type_info(annotation)
    while isinstance(shape, msgspec.inspect.Metadata):
        shape = shape.type
    if isinstance(shape, msgspec.inspect.UnionType):
        shape = next(kind for kind in shape.types if not isinstance(kind, msgspec.inspect.NoneType))
    match shape:
        case msgspec.inspect.LiteralType(values=values):
            return " ".join(f'"{value}"' for value in values)
        case msgspec.inspect.BoolType():
            return "true false"
        case msgspec.inspect.StrType():
            return "text"
        case msgspec.inspect.FloatType():
            return "ms"
        case msgspec.inspect.IntType(ge=lowest, le=highest):
            return f"{lowest}..{highest}"
        case _:
            raise TypeError(f"a member of sim has a type without a name: {shape}")
