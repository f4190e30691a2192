"""Any events in any order, also impossible ones: what must hold of an exchange whatever happens to it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import behest_proxy.exchange
from behest_ledger.charging import Charge, Evidence, Outcome, charge
from behest_ledger.holds import Answer, Gone, Granted
from behest_ledger.token_counts import TokenCounts
from behest_proxy.actions import Action, AskCredit, Begin, Fail, Finish, Respond, Settle, Write
from behest_proxy.chunk import ChunkError, chunk_texts, decode, loads
from behest_proxy.errors import Forbidden
from behest_proxy.meter import RESERVE_PER_CHOICE_TOKENS, RESERVE_PER_TOOL_CALL_TOKENS
from behest_proxy.sse import DONE_PAYLOAD, SseFramer
from behest_proxy.terms import Phase
from proxy.scripts import EVENT_STREAM, QUOTA, SUSPENDED, exchange, fed

STREAMS = [path.read_bytes() for path in sorted((Path(__file__).parent / "streams").glob("*.sse"))]


def count(text: str) -> int:
    """Not additive, as no tokenizer is: chunks have to be counted one by one."""
    return (len(text) + 1) // 2


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """A few streams as if they were one, perhaps damaged in a few places."""
    *before, last = draw(st.lists(st.sampled_from(STREAMS), min_size=1, max_size=5))
    stream = b"".join(each.replace(b"data: [DONE]", b": more") for each in before) + last
    damaged = bytearray(stream)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        at = draw(st.integers(0, len(damaged)))
        damaged[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(damaged)


GRANTS = st.builds(
    Granted, output_tokens=st.one_of(st.integers(0, 30), st.integers(0, 300)), bound_by=st.sampled_from([None, QUOTA])
)
ANSWERS: st.SearchStrategy[Answer | None] = st.one_of(
    GRANTS, GRANTS, GRANTS, st.sampled_from([QUOTA, SUSPENDED, Gone(), None])
)
TIMES = st.floats(0, 1000)
KINDS = ["connect", "connect_timeout", "reset", "closed", "protocol", "first_byte_timeout", "idle_timeout"]


class AnyLife(RuleBasedStateMachine):
    """Plays any life, keeps what came out, and what was asked and granted."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[Action] = []
        self.evidence: list[tuple[Outcome, Evidence]] = []
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(behest_proxy.exchange, "charge", self._charge)
        self.stream = b""
        self.given = b""
        self.granted_tokens = 0
        self.open_asks = 0
        self.sent = False

    def _charge(self, outcome: Outcome, evidence: Evidence) -> Charge:
        self.evidence.append((outcome, evidence))
        return charge(outcome, evidence)

    @initialize(
        stream=streams(),
        streamed=st.booleans(),
        include_usage=st.booleans(),
        choices=st.integers(1, 3),
        ratio=st.sampled_from([1.0, 1.35, 1.1]),
        metered=st.booleans(),
        cap_tokens=st.one_of(st.none(), st.integers(1, 500)),
        clamped=st.booleans(),
        hidden=st.sampled_from([0, 0, 30]),
        straight=st.booleans(),
        grant=GRANTS,
    )
    def begin(self, stream: bytes, straight: bool, grant: Granted, clamped: bool, hidden: int, **terms: Any) -> None:
        self.stream = stream
        self.terms = terms
        clamp = terms["cap_tokens"] if clamped and not terms["metered"] else None
        self.under = exchange(count=count, clamp_tokens=clamp, hidden_tokens_per_second=hidden, **terms)
        if straight:  # else nearly no life would get as far as the stream
            self.admitted(grant, 0.0)
            self.request_sent(0.0)
            self.head(200, EVENT_STREAM, 0.0)

    def _do(self, actions: list[Action]) -> None:
        if any(isinstance(action, Settle) for action in self.actions):
            assert actions == []
        self.actions += actions
        self.open_asks += sum(isinstance(action, AskCredit) for action in actions)

    # --- what may happen ---------------------------------------------------------------------------------------

    @rule(size=st.one_of(st.integers(1, 60), st.integers(1, 3000)), at_s=TIMES)
    def data(self, size: int, at_s: float) -> None:
        if self.under.phase in (Phase.STREAMING, Phase.LINGERING):
            self.given += self.stream[:size]
        data, self.stream = self.stream[:size], self.stream[size:]
        self._do(fed(self.under, data, at_s))

    @precondition(lambda self: self.open_asks)
    @rule(tokens=st.integers(1, 40), at_s=TIMES)
    def granted(self, tokens: int, at_s: float) -> None:
        self.credit(Granted(output_tokens=tokens), at_s)

    @precondition(lambda self: self.open_asks or self.under.phase is not Phase.STREAMING)
    @rule(answer=ANSWERS, at_s=TIMES)
    def credit(self, answer: Answer | None, at_s: float) -> None:
        if self.open_asks and isinstance(answer, Granted):
            self.granted_tokens += answer.output_tokens
        self.open_asks = 0
        self._do(self.under.credit(answer, at_s))

    # The rest comes under one rule, so that it is rarer than the provider's bytes: most lives should be long.
    @rule(
        what=st.sampled_from(["admitted", "sent", "head", "end", "failed", "gone", "lingered", "stop"]),
        answer=ANSWERS,
        status=st.sampled_from([200, 200, 200, 204, 302, 400, 401, 429, 500]),
        headers=st.sampled_from([EVENT_STREAM, [], [(b"content-type", b"application/json"), (b"retry-after", b"x")]]),
        kind=st.sampled_from(KINDS),
        at_s=TIMES,
    )
    def anything(self, what: str, answer: Answer | None, status: int, headers: Any, kind: str, at_s: float) -> None:
        match what:
            case "admitted":
                self.admitted(answer, at_s)
            case "sent":
                self.request_sent(at_s)
            case "head":
                self.head(status, headers, at_s)
            case "end":
                self._do(self.under.upstream_end(at_s))
            case "failed":
                self._do(self.under.upstream_failed(kind, at_s))
            case "gone":
                self._do(self.under.client_gone(at_s))
            case "lingered":
                self._do(self.under.lingered(at_s))
            case _:
                self.stop(at_s)

    def admitted(self, answer: Answer | None, at_s: float) -> None:
        if isinstance(answer, Granted) and self.under.phase is Phase.ADMITTING:
            self.granted_tokens += answer.output_tokens
        self._do(self.under.admitted(answer, at_s))

    def request_sent(self, at_s: float) -> None:
        self.sent = True
        self._do(self.under.request_sent(at_s))

    def head(self, status: int, headers: Any, at_s: float) -> None:
        self._do(self.under.upstream_head(status, headers, at_s))

    def stop(self, at_s: float) -> None:
        self._do(self.under.stop(Outcome.KILLED, Forbidden("suspended"), at_s))

    # --- what must hold ----------------------------------------------------------------------------------------

    @invariant()
    def the_client_gets_one_answer_in_order(self) -> None:
        kinds = [type(action) for action in self.actions]
        for kind in (Begin, Finish, Settle):
            assert kinds.count(kind) <= 1
        assert kinds.count(Respond) + kinds.count(Fail) + kinds.count(Begin) <= 1
        begun = kinds.index(Begin) if Begin in kinds else len(kinds)
        finished = kinds.index(Finish) if Finish in kinds else len(kinds)
        assert all(begun < number < finished for number, kind in enumerate(kinds) if kind is Write)
        assert Finish not in kinds or begun < finished
        assert Settle not in kinds or kinds[-1] is Settle

    def teardown(self) -> None:
        try:
            if hasattr(self, "under"):
                self._finish()
        finally:
            self.patch.undo()

    def _finish(self) -> None:
        refused = self.under.phase is Phase.ENDED and not any(isinstance(each, Settle) for each in self.actions)
        self.stop(5.0)
        self.admitted(Granted(output_tokens=5), 5.0)
        assert self.under.phase is Phase.ENDED
        self.the_client_gets_one_answer_in_order()
        if refused:
            assert not any(isinstance(action, (Begin, Write, Respond, Settle)) for action in self.actions)
            return
        settle = self.actions[-1]
        assert isinstance(settle, Settle)
        self._check_written(settle)
        self._check_credit(settle)
        self._check_charge(settle)

    def _texts(self) -> tuple[list[bytes], TokenCounts, int]:
        """The chunks that the client got, their tokens, and the tool calls that begin in them."""
        written = b"".join(action.data for action in self.actions if isinstance(action, Write))
        framer = SseFramer()
        payloads = [payload for payload in framer.feed(written) if payload != DONE_PAYLOAD]
        assert framer.finish() == []
        output = reasoning = calls = 0
        for payload in payloads:
            for texts in chunk_texts(decode(payload)):
                output += count(texts.visible) + count(texts.tools)
                reasoning += count(texts.reasoning)
                calls += texts.tool_calls
        return payloads, TokenCounts(input=10, output=output, reasoning=reasoning), calls

    def _check_written(self, settle: Settle) -> None:
        """What was forwarded is what the provider wrote, to the letter but for the edits that are allowed."""
        framer = SseFramer()
        came = [payload.replace(b"\n", b" ") for payload in [*framer.feed(self.given), *framer.finish()]]
        last = -1
        for payload in self._texts()[0]:
            at = next((number for number in range(last + 1, len(came)) if _same(came[number], payload)), None)
            if at is None:
                members = loads(payload)
                assert members["choices"] == []
                assert "error" in members or "cost_usd" in members["usage"]
            else:
                last = at

    def _check_credit(self, settle: Settle) -> None:
        held = settle.facts["held_output_tokens"]
        counted = settle.facts["counted_output_tokens"]
        assert held <= self.granted_tokens
        assert counted <= max(held, 0)
        if self.terms["streamed"]:
            _, forwarded, calls = self._texts()
            assert forwarded.output_tokens == counted
            if self.terms["metered"] and counted:
                reserve = RESERVE_PER_CHOICE_TOKENS * self.terms["choices"] + RESERVE_PER_TOOL_CALL_TOKENS * calls
                required = counted * self.terms["ratio"] + reserve
                assert required <= held + 1e-6 or held >= (self.terms["cap_tokens"] or held + 1)

    def _check_charge(self, settle: Settle) -> None:
        outcome, evidence = self.evidence[-1]
        assert outcome is settle.outcome
        assert settle.charge == charge(outcome, evidence)
        assert not evidence.request_sent or self.sent
        assert settle.charge.sent is evidence.request_sent
        assert evidence.hidden_tokens <= settle.facts["held_output_tokens"] - settle.facts["counted_output_tokens"]
        if self.terms["streamed"]:
            assert evidence.counted == self._texts()[1]


def _same(was: bytes, is_: bytes) -> bool:
    if was == is_:
        return True
    try:
        before, after = loads(was), loads(is_)
    except ChunkError:
        return False
    if isinstance(after.get("usage"), dict):
        after["usage"].pop("cost_usd", None)
        if isinstance(before.get("usage"), dict):
            before["usage"].pop("cost_usd", None)
    return json.dumps(_without_length(before)) == json.dumps(_without_length(after))


def _without_length(members: dict[str, Any]) -> dict[str, Any]:
    choices: Any = members.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("finish_reason") in ("length", "max_tokens"):
            choice["finish_reason"] = None
    return members


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("seed", range(400))
def test_a_long_life_keeps_its_rules(seed: int) -> None:
    """The machine above seldom lives long, as it tries what is odd; these lives mostly stream, on scarce credit."""
    chance = random.Random(seed)
    *before, last = chance.choices(STREAMS, k=chance.randint(1, 8))
    metered = chance.random() < 0.7
    life = AnyLife()
    try:
        life.begin(
            stream=b"".join(each.replace(b"data: [DONE]", b": more") for each in before) + last,
            straight=True,
            grant=Granted(output_tokens=chance.randint(0, 60), bound_by=QUOTA),
            clamped=chance.random() < 0.5,
            hidden=chance.choice([0, 30]),
            streamed=chance.random() < 0.8,
            include_usage=chance.random() < 0.5,
            choices=chance.randint(1, 3),
            ratio=chance.choice([1.0, 1.35, 1.1]),
            metered=metered,
            cap_tokens=chance.choice([None, 20, 200]),
        )
        odd = chance.choice([0.0, 0.02, 0.1])
        for step in range(300):
            if chance.random() < odd:
                what = chance.choice(["admitted", "sent", "head", "end", "failed", "gone", "lingered", "stop"])
                life.anything(what, None, 200, EVENT_STREAM, chance.choice(KINDS), step / 10)
            elif life.open_asks and chance.random() < 0.5:
                answer = chance.choice([None, QUOTA]) if chance.random() < odd else None
                life.credit(answer or Granted(output_tokens=chance.randint(1, 80)), step / 10)
            else:
                life.data(chance.choice([1, 20, 200, 800]), step / 10)
        life.the_client_gets_one_answer_in_order()
    finally:
        life.teardown()
