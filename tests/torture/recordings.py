"""Recorded streams of real providers as upstream: those whose provider keeps its word, and what they should cost.

`<folder>/chat/*.sse`. A provider keeps its word where it bills no more than what can be read in its stream, with the
reserve that a hold has for it: others show as an overrun, as they should, and are no part of this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from behest_proxy.chunk import chunk_texts, decode
from behest_proxy.meter import RESERVE_PER_CHOICE_TOKENS, RESERVE_PER_TOOL_CALL_TOKENS
from behest_proxy.sse import DONE_PAYLOAD, NamedEvent, SseFramer
from behest_proxy.tokens import counter_for
from behest_proxy.usage import UsageState

MODEL = "gpt-4o-mini"
"""Under which all recordings are asked for: they are counted as its provider counts."""
PROMPT_TOKENS_MAX = 2_500
_counter = counter_for(MODEL)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recorded stream."""

    name: str
    size_bytes: int
    prompt_tokens: int
    """What the provider says; a question must be as long, or the provider does not keep its word."""
    counted_tokens: int
    """Output tokens that can be read in it."""
    provider_tokens: int | None
    """Output tokens that the provider bills; None: it does not say."""


def count(payload: bytes) -> int:
    """The output tokens that can be read in one event."""
    return sum(
        _counter.count(texts.visible) + _counter.count(texts.tools) + _counter.count(texts.reasoning)
        for texts in chunk_texts(decode(payload))
    )


def _read(path: Path) -> Recording | None:
    framer = SseFramer()
    events: Sequence[bytes] = [*framer.feed(path.read_bytes()), *framer.finish()]
    usage = UsageState()
    choices: set[int] = set()
    finished: set[int] = set()
    counted = calls = 0
    for payload in events:
        if isinstance(payload, NamedEvent):
            return None
        if payload == DONE_PAYLOAD:
            continue
        chunk = decode(payload)
        if chunk.error is not None:
            return None
        if (seen := chunk.any_usage) is not None:
            usage.update(seen)
        for texts in chunk_texts(chunk):
            calls += texts.tool_calls
        counted += count(payload)
        choices |= {choice.index for choice in chunk.choices or ()}
        finished |= {choice.index for choice in chunk.choices or () if choice.finish_reason is not None}
    if not choices or choices != finished or len(choices) > 1:
        return None
    reserve = RESERVE_PER_CHOICE_TOKENS * len(choices) + RESERVE_PER_TOOL_CALL_TOKENS * calls
    if usage.seen and (usage.counts.output_tokens > counted + reserve or usage.counts.input_tokens > PROMPT_TOKENS_MAX):
        return None
    return Recording(
        name=path.stem,
        size_bytes=path.stat().st_size,
        prompt_tokens=usage.counts.input_tokens,
        counted_tokens=counted,
        provider_tokens=usage.counts.output_tokens if usage.seen else None,
    )


def read_recordings(folder: Path) -> dict[str, Recording]:
    """Those of a folder that can be used, by name."""
    found = [_read(path) for path in sorted((folder / "chat").glob("*.sse"))]
    return {recording.name: recording for recording in found if recording is not None}
