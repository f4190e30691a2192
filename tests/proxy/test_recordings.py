"""Whole streams, each with one peculiarity of a real provider, through framer, decoder, usage and aggregation.

`streams/` holds streams of our own wording; `expected.json` beside them says what is in each. Recordings of real
providers are used too where `BEHEST_RECORDINGS` names their folder: `<folder>/chat/*.sse`, each with a `.json` of
the same name that holds the final `usage` (or `usage_elsewhere`) and the `finish_reasons`.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from behest_ledger.token_counts import TokenCounts
from behest_proxy.aggregate import Aggregator
from behest_proxy.chunk import Chunk, chunk_texts, decode
from behest_proxy.sse import DONE_PAYLOAD, NamedEvent, SseFramer
from behest_proxy.usage import UsageState, normalise

STREAMS = Path(__file__).parent / "streams"
EXPECTED: dict[str, dict[str, Any]] = json.loads((STREAMS / "expected.json").read_text())
FOLDER = os.environ.get("BEHEST_RECORDINGS")
RECORDINGS = sorted(Path(FOLDER, "chat").glob("*.sse")) if FOLDER else []


class Heard:
    """What a stream says when it is read in pieces of the given sizes."""

    def __init__(self, stream: bytes, sizes: list[int], seed: int) -> None:
        self.events: list[bytes] = []
        self.chunks: list[Chunk] = []
        self.usage = UsageState()
        self.finish_reasons: dict[int, str] = {}
        self.visible = self.reasoning = self.tools = ""
        self.tool_calls = 0
        aggregator = Aggregator()
        chance = random.Random(seed)
        framer = SseFramer()
        at = 0
        while at < len(stream):
            size = chance.choice(sizes)
            self.events += framer.feed(stream[at : at + size])
            at += size
        self.events += framer.finish()
        self.done = DONE_PAYLOAD in self.events
        for event in self.events:
            if event != DONE_PAYLOAD:
                self._hear(decode(event))
                aggregator.feed(event)
        self.body: dict[str, Any] = json.loads(aggregator.body(usage=self.usage.members, cost_usd="0.01"))

    def _hear(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        usage = chunk.any_usage
        if usage is not None:
            self.usage.update(usage)
        for texts in chunk_texts(chunk):
            self.visible += texts.visible
            self.reasoning += texts.reasoning
            self.tools += texts.tools
            self.tool_calls += texts.tool_calls
        for choice in chunk.choices or ():
            if choice.finish_reason is not None:
                self.finish_reasons[choice.index] = choice.finish_reason

    def reasons(self) -> list[str]:
        return [self.finish_reasons[index] for index in sorted(self.finish_reasons)]


def paired(text: str) -> str:
    """The text with halves of surrogate pairs put together."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def test_every_stream_says_what_is_expected_of_it() -> None:
    assert {path.stem for path in STREAMS.glob("*.sse")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
@pytest.mark.parametrize("sizes", [[1], [1, 3, 20], [100, 700], [100_000]], ids=str)
def test_a_peculiar_stream_is_understood_wherever_its_reads_were_cut(name: str, sizes: list[int]) -> None:
    expected = EXPECTED[name]
    heard = Heard((STREAMS / f"{name}.sse").read_bytes(), sizes, seed=len(name))
    usage = expected["usage"]
    assert heard.usage.seen == (usage is not None)
    assert heard.usage.counts == (TokenCounts() if usage is None else TokenCounts(**usage))
    assert heard.reasons() == expected["finish_reasons"]
    assert paired(heard.visible) == expected["visible"]
    assert heard.reasoning == expected["reasoning"]
    assert heard.tools == expected["tools"]
    assert heard.tool_calls == expected["tool_calls"]
    assert heard.done == expected["done"]
    assert any(chunk.error is not None for chunk in heard.chunks) == expected.get("error", False)


def test_an_error_event_is_named() -> None:
    heard = Heard((STREAMS / "error-event.sse").read_bytes(), [5], seed=1)
    assert [event.name for event in heard.events if isinstance(event, NamedEvent)] == ["error"]


@pytest.mark.parametrize("name", ["text-usage-in-own-chunk", "message-beside-delta", "legacy-text-beside-delta"])
def test_a_text_is_aggregated_once(name: str) -> None:
    heard = Heard((STREAMS / f"{name}.sse").read_bytes(), [50], seed=1)
    assert heard.body["choices"][0]["message"]["content"] == "The heron waits."
    assert heard.body["usage"]["cost_usd"] == 0.01


if RECORDINGS:

    @pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: str(path.stem))
    def test_a_recorded_stream_ends_with_the_recorded_usage(path: Path) -> None:
        about: dict[str, Any] = msgspec.json.decode(path.with_suffix(".json").read_bytes())
        elsewhere: dict[str, Any] = about.get("usage_elsewhere") or {}
        usage: dict[str, Any] | None = about["usage"] or elsewhere.get("x_groq.usage")
        heard = Heard(path.read_bytes(), [1, 7, 100, 1000, 60_000], seed=len(path.stem))
        assert heard.reasons() == about["finish_reasons"]
        assert heard.usage.seen == (usage is not None)
        if usage is not None:
            assert heard.usage.members == usage
            assert heard.usage.counts == normalise(usage)
