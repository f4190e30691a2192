"""Usage as providers report it, made into token counts that can be priced without counting anything twice.

OpenAI's members nest: `cached_tokens` are inside `prompt_tokens`, `reasoning_tokens` inside `completion_tokens`.
Others put the same members beside instead of inside, and show it only by a `total_tokens` that is larger than
prompt and completion together. So the one rule here: a part is inside its whole, as far as it fits there, unless
the total proves that it is on top. What fits nowhere is clamped: a token is never charged twice.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from behest_ledger.token_counts import TokenCounts

COUNT_MAX = 10**9
"""No count above it is believed. Times the dearest known rate it still fits a 64-bit amount of pico-USD."""

_NO_MEMBERS: Mapping[str, Any] = {}


class UsageError(ValueError):
    """The usage is no JSON object."""


def normalise(usage: bytes | Mapping[str, Any]) -> TokenCounts:
    """The disjoint counts in a provider's `usage` object, given as JSON or decoded.

    Never fails on what a member holds: strings, nulls and negative numbers count as absent or 0, fractions are
    rounded up. Raises `UsageError` where the whole is no JSON object.
    """
    members = _decoded(usage) if isinstance(usage, bytes) else usage
    given = _Given(members)
    cache_read, cache_write, audio_input = given.cache_read, given.cache_write, given.audio_input
    prompt, spare = given.prompt, given.spare

    # Input that does not fit into the prompt, while the total has room for it, is beside the prompt.
    # (Mistral's audio: 9 prompt, 375 audio, 201 completion, 585 in total.)
    cached = cache_read + cache_write
    if audio_input and (spare == audio_input or prompt < audio_input <= spare):
        prompt += audio_input
        spare -= audio_input
    if cached and prompt < cached + audio_input and cached <= spare:
        prompt += cached
        spare -= cached
    audio_input = min(audio_input, prompt)
    cache_read = min(cache_read, prompt - audio_input)
    cache_write = min(cache_write, prompt - audio_input - cache_read)

    # Whatever else the total has on top is reasoning: xAI and Gemini report it so.
    completion = given.completion
    reasoning_beside = spare + given.reasoning_beside
    reasoning_inside = min(max(0, given.reasoning - reasoning_beside), completion)
    audio_output = min(given.audio_output, completion - reasoning_inside)
    return TokenCounts(
        input=prompt - audio_input - cache_read - cache_write,
        cache_read=cache_read,
        cache_write=cache_write,
        output=completion - reasoning_inside - audio_output,
        reasoning=reasoning_inside + reasoning_beside,
        audio_input=audio_input,
        audio_output=audio_output,
    )


class UsageState:
    """The usage of one answer. Providers repeat it, grow it or send a place holder first; it is never a sum.

    The largest report counts, and among equal ones the last. (Groq sends the same one three times, Perplexity a
    growing one in every chunk, Anthropic a place holder before the first token.)
    """

    __slots__ = ("_output", "_reasoning", "counts", "members", "seen")

    def __init__(self) -> None:
        self.counts = TokenCounts()
        self.members: Mapping[str, Any] | None = None
        """The report that counts, as the provider wrote it."""
        self.seen = False
        """True once a report with at least one token came: then the provider's number is charged."""
        self._output = self._reasoning = 0

    def update(self, usage: Mapping[str, Any], *, output: int = 0, reasoning: int = 0) -> None:
        """Takes a further report of the same answer into account; so many tokens were forwarded before it."""
        counts = normalise(usage)
        size = counts.input_tokens + counts.output_tokens
        if size and size >= self.counts.input_tokens + self.counts.output_tokens:
            self.counts = counts
            self.members = usage
            self.seen = True
            self._output, self._reasoning = output, reasoning

    def limit(self, *, input_tokens: int, output_tokens: int) -> None:
        """No more than that is charged, whatever was reported."""
        limited = self.counts.at_most(input_tokens=input_tokens, output_tokens=output_tokens)
        if limited != self.counts:
            self.counts, self.members = limited, None

    def forwarded_since(self, *, output: int, reasoning: int) -> TokenCounts:
        """What came behind the report. Nothing, where it came last, as it should; a place holder is not all."""
        if not self.seen:
            return TokenCounts()
        return TokenCounts(output=output - self._output, reasoning=reasoning - self._reasoning)


def as_openai(counts: TokenCounts) -> dict[str, Any]:
    """The counts as OpenAI's `usage` object, for answers whose provider sent none."""
    return {
        "prompt_tokens": counts.input_tokens,
        "completion_tokens": counts.output_tokens,
        "total_tokens": counts.input_tokens + counts.output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": counts.cache_read,
            "cache_write_tokens": counts.cache_write,
            "audio_tokens": counts.audio_input,
        },
        "completion_tokens_details": {
            "reasoning_tokens": counts.reasoning,
            "audio_tokens": counts.audio_output,
        },
    }


class _Given:
    """The members of a usage object under the names that providers give them."""

    __slots__ = (
        "audio_input",
        "audio_output",
        "cache_read",
        "cache_write",
        "completion",
        "prompt",
        "reasoning",
        "reasoning_beside",
        "spare",
    )

    def __init__(self, usage: Mapping[str, Any]) -> None:
        inputs = _part(usage, "prompt_tokens_details", "input_tokens_details", "prompt_token_details")
        outputs = _part(usage, "completion_tokens_details", "output_tokens_details")
        self.cache_read = max(
            _count(inputs, "cached_tokens") or 0,
            # DeepSeek, Together, Anthropic: the same number at the top
            _count(usage, "prompt_cache_hit_tokens", "cached_tokens", "cache_read_input_tokens") or 0,
        )
        self.cache_write = max(
            _count(inputs, "cache_write_tokens", "cache_creation_tokens") or 0,
            _count(usage, "cache_creation_input_tokens", "cache_write_tokens") or 0,
        )
        self.audio_input = _count(inputs, "audio_tokens") or 0
        self.audio_output = _count(outputs, "audio_tokens") or 0
        self.reasoning = max(_count(outputs, "reasoning_tokens") or 0, _count(usage, "reasoning_tokens") or 0)
        prompt = _count(usage, "prompt_tokens")
        if prompt is None:
            prompt = _count(usage, "input_tokens")
            if prompt is not None and not inputs:
                # Anthropic's names: what was cached is beside `input_tokens`.
                prompt += self.cache_read + self.cache_write
        completion = _count(usage, "completion_tokens", "output_tokens")
        total = _count(usage, "total_tokens")
        self.prompt = prompt or 0
        if completion is None:
            completion = max(0, (total or 0) - self.prompt) if prompt is not None else 0
        self.completion = completion
        if total is None:
            total = self.prompt + completion
            # No total to prove it, but so much reasoning cannot be inside this completion.
            self.reasoning_beside = self.reasoning if self.reasoning > completion else 0
        else:
            self.reasoning_beside = 0
        self.spare = max(0, total - self.prompt - completion) if prompt is not None else 0
        """Tokens of the total that are in neither prompt nor completion."""


def _decoded(usage: bytes) -> Mapping[str, Any]:
    try:
        return msgspec.json.decode(usage, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the usage is no JSON object: {error}") from None


def _part(usage: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        part = usage.get(name)
        if isinstance(part, dict):
            return part
    return _NO_MEMBERS


def _count(members: Mapping[str, Any], *names: str) -> int | None:
    """The first of the members that holds a number, as a count; `None` where none does."""
    for name in names:
        value = members.get(name)
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            return min(max(0, value), COUNT_MAX)
        if isinstance(value, float) and not math.isnan(value):
            return math.ceil(min(max(0.0, value), COUNT_MAX))
    return None
