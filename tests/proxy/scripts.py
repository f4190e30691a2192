"""Scripts for an exchange: events in, actions out, both as plain lists. A token is a character here."""

import json
from collections.abc import Callable
from typing import Any

from behest_ledger.charging import Outcome
from behest_ledger.holds import Answer, Granted, Refused
from behest_ledger.token_counts import TokenCounts
from behest_proxy.actions import Action, Begin, CallUpstream, CancelUpstream, Fail, Settle, Write
from behest_proxy.errors import Draining, ShownError
from behest_proxy.exchange import Exchange
from behest_proxy.sse import DONE, data_event
from behest_proxy.terms import Terms

Event = Callable[[Exchange], list[Action]]

COMPLETED = Outcome.COMPLETED
CANCELLED = Outcome.CLIENT_CANCELLED
BROKEN = Outcome.UPSTREAM_ERROR
NO_LEDGER = Outcome.LEDGER_UNAVAILABLE
QUOTA_EXCEEDED = Outcome.QUOTA_EXCEEDED

CANCEL = CancelUpstream()

INPUT_PICO, OUTPUT_PICO = 100, 1000
EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]
QUOTA = Refused(
    reason="quota",
    budget="shop/per-session",
    scope={"session": "s1"},
    limit=10**12,
    spent=9 * 10**11,
    held=10**11,
    remaining=0,
    resets_at="2030-01-01T00:00:00Z",
)
SUSPENDED = Refused(reason="suspended", what="budget", name="shop/per-session")
DETAILS = {
    "budget": "shop/per-session",
    "scope": {"session": "s1"},
    "unit": "usd",
    "limit": "1",
    "spent": "0.9",
    "held": "0.1",
    "remaining": "0",
    "resets_at": "2030-01-01T00:00:00Z",
}


def amount_pico(counts: TokenCounts) -> int:
    return counts.input_tokens * INPUT_PICO + counts.output_tokens * OUTPUT_PICO


def exchange(**changes: Any) -> Exchange:
    """An exchange about 10 tokens of input; one token a character."""
    members: dict[str, Any] = {
        "streamed": True,
        "include_usage": False,
        "choices": 1,
        "input_bound_tokens": 10_000,
        "input_counts": TokenCounts(input=10),
        "count": len,
        "ratio": 1.0,
        "amount_pico": amount_pico,
        "metered": True,
    }
    return Exchange(Terms(**{**members, **changes}))


def play(under: Exchange, *script: tuple[Event, list[Any]]) -> None:
    """Feed the events; after each one exactly these actions must come."""
    for number, (event, expected) in enumerate(script, start=1):
        actions = event(under)
        assert actions == expected, f"step {number}"


def streaming(granted_tokens: int = 1000, **changes: Any) -> Exchange:
    """An exchange whose provider has begun to stream, with the role's chunk already forwarded."""
    under = exchange(**changes)
    begun: list[Any] = [Begin()] if changes.get("streamed", True) else []
    play(
        under,
        (admitted(Granted(output_tokens=granted_tokens)), [CallUpstream()]),
        (sent(), []),
        (head(200), begun),
        (read(ROLE), [wrote(ROLE)] if begun else []),
    )
    return under


def calling(**changes: Any) -> Exchange:
    """An exchange whose request was sent, and whose provider has not answered yet."""
    under = exchange(**changes)
    play(under, (admitted(Granted(output_tokens=500)), [CallUpstream()]), (sent(), []))
    return under


def clamped(**changes: Any) -> Exchange:
    """An exchange whose whole answer was held: a budget, not its caller, bound each choice to 5 tokens."""
    under = exchange(metered=False, clamp_tokens=5, cap_tokens=50, **changes)
    play(
        under,
        (admitted(Granted(output_tokens=50, bound_by=QUOTA)), [CallUpstream()]),
        (sent(), []),
        (head(200), [Begin()] if changes.get("streamed", True) else []),
    )
    return under


def fed(under: Exchange, data: bytes, at_s: float) -> list[Action]:
    """One read of the provider's bytes, as its `Conduct` hands it in."""
    events = under.passes(data)
    return [Write(data, events), *under.ask_ahead()] if events else under.parsed(data, at_s)


# --- events in -------------------------------------------------------------------------------------------------


def admitted(answer: Answer | None) -> Event:
    return lambda under: under.admitted(answer, 0.0)


def credited(answer: Answer | None, at_s: float = 0.0) -> Event:
    return lambda under: under.credit(answer, at_s)


def granted(tokens: int) -> Event:
    return credited(Granted(output_tokens=tokens))


def sent(at_s: float = 0.0) -> Event:
    return lambda under: under.request_sent(at_s)


def head(status: int, headers: Any = EVENT_STREAM) -> Event:
    return lambda under: under.upstream_head(status, headers, 0.0)


def raw(data: bytes, at_s: float = 0.0) -> Event:
    """One read of the provider's bytes."""
    return lambda under: fed(under, data, at_s)


def read(*payloads: bytes, at_s: float = 0.0) -> Event:
    """One read that holds these events."""
    return raw(b"".join(map(data_event, payloads)), at_s)


def ended() -> Event:
    return lambda under: under.upstream_end(0.0)


def failed(kind: str) -> Event:
    return lambda under: under.upstream_failed(kind, 0.0)


def gone(at_s: float = 0.0) -> Event:
    return lambda under: under.client_gone(at_s)


def lingered() -> Event:
    return lambda under: under.lingered(0.0)


def drained() -> Event:
    return lambda under: under.stop(Outcome.DRAINING, Draining("going away", retry_after_s=1), 0.0)


# --- what a provider sends -------------------------------------------------------------------------------------


def chunk(*choices: dict[str, Any], **members: Any) -> bytes:
    """A chunk as a provider writes it, with spaces of its own, so that a rewritten one is told from it."""
    return json.dumps({"id": "c1", "model": "heron-1", "created": 5, "choices": list(choices), **members}).encode()


def choice(delta: dict[str, Any] | None = None, *, index: int = 0, finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta or {}, "finish_reason": finish}


def text(content: str, *, index: int = 0, finish: str | None = None, **members: Any) -> bytes:
    return chunk(choice({"content": content}, index=index, finish=finish), **members)


def finish(reason: str = "stop", *, index: int = 0, **members: Any) -> bytes:
    return chunk(choice(index=index, finish=reason), **members)


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


ROLE = chunk(choice({"role": "assistant", "content": ""}))
USAGE = chunk(usage=usage(12, 5))
DONE_EVENT = b"[DONE]"


# --- what is expected ------------------------------------------------------------------------------------------


def wrote(*payloads: bytes, done: bool = False) -> Write:
    """These payloads, to the letter, in one write."""
    return Write(b"".join(map(data_event, payloads)) + (DONE if done else b""), len(payloads))


FINISHED = Write(DONE)


def event_of(action: Action) -> dict[str, Any]:
    """The JSON of the first event of a write."""
    assert isinstance(action, Write)
    members: dict[str, Any] = json.loads(action.data.removeprefix(b"data: ").partition(b"\n\n")[0])
    return members


class Settled:
    """A settlement, its facts left aside."""

    def __init__(
        self, outcome: Outcome, source: str, input_: int = 0, output: int = 0, reasoning: int = 0, sent: bool = True
    ) -> None:
        self.outcome, self.source, self.sent = outcome, source, sent
        self.counts = TokenCounts(input=input_, output=output, reasoning=reasoning)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Settle)
            and other.outcome is self.outcome
            and (other.charge.counts, other.charge.source) == (self.counts, self.source)
            and other.charge.sent is self.sent
        )

    def __repr__(self) -> str:
        return f"Settled({self.outcome.name}, {self.source}, {self.counts}, sent={self.sent})"


def voided(outcome: Outcome) -> Settled:
    return Settled(outcome, "none", sent=False)


class Failed:
    """An error that answers the request as a whole."""

    def __init__(self, status: int, code: str, retry_after_s: int | None = None) -> None:
        self.status, self.code, self.retry_after_s = status, code, retry_after_s

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fail) and _is(other.error, self.status, self.code, self.retry_after_s)

    def __repr__(self) -> str:
        return f"Failed({self.status}, {self.code}, retry_after_s={self.retry_after_s})"


def _is(error: ShownError, status: int, code: str, retry_after_s: int | None) -> bool:
    return (error.status, error.shown_code, error.retry_after_s) == (status, code, retry_after_s)


class Cut:
    """The terminal event of a stream that was cut, and `[DONE]`."""

    def __init__(self, status: int, code: str, **members: Any) -> None:
        self.status, self.code, self.members = status, code, members

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Write) or not other.data.endswith(b"\n\n" + DONE):
            return False
        event: dict[str, Any] = json.loads(other.data.removesuffix(DONE).removeprefix(b"data: "))
        error = event["error"]
        return (
            event["choices"] == []
            and (error["status"], error["code"]) == (self.status, self.code)
            and {"message", "type", "param"} <= set(error)
            and all(error.get(name) == value for name, value in self.members.items())
        )

    def __repr__(self) -> str:
        return f"Cut({self.status}, {self.code}, {self.members})"
