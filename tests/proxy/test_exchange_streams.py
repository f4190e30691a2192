"""Whole streams through an exchange: forwarded by the rules wherever reads were cut, charged as recorded.

The streams are those of `test_recordings`: our own in `streams/`, and real ones where `BEHEST_RECORDINGS` names them.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from behest_ledger.charging import Outcome
from behest_ledger.holds import Granted
from behest_ledger.token_counts import TokenCounts
from behest_proxy.actions import Action, AskCredit, Begin, Fail, Finish, Pause, Respond, Resume, Settle, Write
from behest_proxy.chunk import chunk_texts, decode, is_usage_only, loads
from behest_proxy.exchange import Exchange
from behest_proxy.sse import DONE_PAYLOAD, NamedEvent, SseFramer
from behest_proxy.terms import Phase
from behest_proxy.tokens import counter_for
from behest_proxy.usage import normalise
from proxy.scripts import EVENT_STREAM, exchange, fed

STREAMS = Path(__file__).parent / "streams"
EXPECTED: dict[str, dict[str, Any]] = json.loads((STREAMS / "expected.json").read_text())
FOLDER = os.environ.get("BEHEST_RECORDINGS")
RECORDINGS = sorted(Path(FOLDER, "chat").glob("*.sse")) if FOLDER else []
COUNTER = counter_for("gpt-4o")


class Passed:
    """What became of a stream that was read in pieces of the given sizes, on credit that comes as it is asked for."""

    def __init__(self, stream: bytes, sizes: list[int], *, seed: int, first_grant: int = 40, **terms: Any) -> None:
        self.actions: list[Action] = []
        chance = random.Random(seed)
        under = exchange(count=COUNTER.count, **terms)
        self._do(under, under.admitted(Granted(output_tokens=first_grant), 0.0))
        self._do(under, under.request_sent(0.0))
        self._do(under, under.upstream_head(200, EVENT_STREAM, 0.0))
        at = 0
        while at < len(stream):
            size = chance.choice(sizes)
            self._do(under, fed(under, stream[at : at + size], 0.0))
            at += size
        self._do(under, under.upstream_end(0.0))
        assert under.phase is Phase.ENDED
        settle = self.actions[-1]
        assert isinstance(settle, Settle)
        self.settle = settle

    def _do(self, under: Exchange, actions: list[Action]) -> None:
        for action in actions:
            self.actions.append(action)
            if isinstance(action, AskCredit):
                self._do(under, under.credit(Granted(output_tokens=action.want_tokens), 0.0))

    @property
    def written(self) -> list[bytes]:
        """The payloads that the client got."""
        return SseFramer().feed(b"".join(action.data for action in self.actions if isinstance(action, Write)))


def forwarded(stream: bytes, *, include_usage: bool) -> list[bytes]:
    """What a client has to get of a provider's stream, said once more in the plainest way, without the edits."""
    framer = SseFramer()
    payloads: list[bytes] = []
    finished: set[int] = set()
    seen: set[int] = set()
    for payload in [*framer.feed(stream), *framer.finish()]:
        if payload.strip() == DONE_PAYLOAD:
            break
        if not payload.strip():
            continue
        chunk = decode(payload)
        if chunk.error is not None or isinstance(payload, NamedEvent):
            break
        if include_usage or not is_usage_only(chunk, finished=bool(seen) and finished == seen):
            payloads.append(payload.replace(b"\n", b" "))
        for choice in chunk.choices or ():
            seen.add(choice.index)
            if choice.finish_reason is not None:
                finished.add(choice.index)
    return payloads


def without_cost(payload: bytes) -> dict[str, Any]:
    members = loads(payload)
    usage = members.get("usage")
    if isinstance(usage, dict):
        usage.pop("cost_usd")
    return members


def check_forwarding(stream: bytes, passed: Passed, *, include_usage: bool) -> None:
    expected = forwarded(stream, include_usage=include_usage)
    written = passed.written
    assert written[-1] == DONE_PAYLOAD
    assert len(written) >= len(expected) + 1
    for was, is_ in zip(expected, written, strict=False):
        if include_usage and isinstance(loads(was).get("usage"), dict):
            assert without_cost(is_) == loads(was)
        else:
            assert is_ == was
    rest = [loads(payload) for payload in written[len(expected) : -1]]
    if passed.settle.outcome is Outcome.COMPLETED:
        assert [(each["choices"], "cost_usd" in each["usage"]) for each in rest] in ([], [([], True)])
    else:
        assert [each["error"]["code"] for each in rest] == ["upstream_error"]


def check_order(actions: list[Action]) -> None:
    """One beginning, one end, one settlement, and nothing after it."""
    kinds = [type(action) for action in actions]
    assert kinds.count(Settle) == 1
    assert kinds[-1] is Settle
    if Begin in kinds:
        assert kinds.count(Finish) == 1
        writes = [number for number, kind in enumerate(kinds) if kind is Write]
        assert all(kinds.index(Begin) < number < kinds.index(Finish) for number in writes)
    assert kinds.count(Pause) >= kinds.count(Resume)


def counted(stream: bytes) -> TokenCounts:
    output = reasoning = 0
    for payload in forwarded(stream, include_usage=True):
        for texts in chunk_texts(decode(payload)):
            output += COUNTER.count(texts.visible) + COUNTER.count(texts.tools)
            reasoning += COUNTER.count(texts.reasoning)
    return TokenCounts(input=10, output=output, reasoning=reasoning)


def check(stream: bytes, *, complete: bool, usage: TokenCounts | None, seed: int) -> None:
    choices = max(
        1,
        len({choice.index for each in forwarded(stream, include_usage=True) for choice in decode(each).choices or ()}),
    )
    for sizes in ([1], [1, 3, 20], [100, 700], [100_000]):
        for include_usage in (False, True):
            passed = Passed(stream, sizes, seed=seed, include_usage=include_usage, choices=choices)
            settle = passed.settle
            assert settle.outcome is (Outcome.COMPLETED if complete else Outcome.UPSTREAM_ERROR)
            assert settle.charge.counts == (counted(stream) if usage is None else usage)
            assert settle.charge.source == ("local" if usage is None else "provider")
            check_order(passed.actions)
            check_forwarding(stream, passed, include_usage=include_usage)
        whole = Passed(stream, sizes, seed=seed, first_grant=10**6, streamed=False, metered=False, choices=choices)
        assert whole.settle.charge == settle.charge
        check_order(whole.actions)
        assert isinstance(whole.actions[-2], Respond if complete else Fail)


def is_complete(expected: dict[str, Any]) -> bool:
    return (expected["done"] or bool(expected["finish_reasons"])) and not expected.get("error", False)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_peculiar_stream_is_forwarded_by_the_rules_and_charged_as_its_provider_says(name: str) -> None:
    expected = EXPECTED[name]
    usage = None if expected["usage"] is None else TokenCounts(**expected["usage"])
    stream = (STREAMS / f"{name}.sse").read_bytes()
    check(stream, complete=is_complete(expected), usage=usage, seed=len(name))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_peculiar_stream_that_breaks_anywhere_is_charged_no_more_than_what_came(name: str) -> None:
    stream = (STREAMS / f"{name}.sse").read_bytes()
    most = counted(stream)
    for at in range(0, len(stream), 37):
        passed = Passed(stream[:at], [64], seed=at, choices=1)
        check_order(passed.actions)
        charge = passed.settle.charge
        if (
            charge.source == "local"
            and passed.settle.outcome is not Outcome.COMPLETED
            and not any(decode(each).any_usage for each in forwarded(stream, include_usage=True))
        ):
            assert charge.counts.output_tokens <= most.output_tokens


if RECORDINGS:

    @pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: str(path.stem))
    def test_a_recorded_stream_is_forwarded_by_the_rules_and_charged_as_recorded(path: Path) -> None:
        about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        usage = about["usage"] or (about.get("usage_elsewhere") or {}).get("x_groq.usage")
        stream = path.read_bytes()
        framer = SseFramer()
        events = [*framer.feed(stream), *framer.finish()]
        complete = not about.get("error") and (DONE_PAYLOAD in events or bool(about["finish_reasons"]))
        check(stream, complete=complete, usage=None if usage is None else normalise(usage), seed=len(path.stem))
