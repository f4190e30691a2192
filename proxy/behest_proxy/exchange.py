r"""One request from admission to its end: the state machine that decides, and does nothing itself.

Events come in as method calls, with the time where it matters; actions come out, to be carried out in their order.
Every exchange whose hold may exist ends with exactly one `Settle`, the last of its actions.

    ADMITTING --granted--> CALLING --2xx head--> STREAMING --all done--> ENDED
        |                     |  \--other head--> REFUSED --body--> ENDED
        |                     |                     |
        |                     |              client leaves after every finish_reason
        |                     |                     v
        +--refused, gone------+--gone, cut---> LINGERING / ENDED

What is forwarded is paid for before: count, price, credit, then the write. When credit is short the chunk is kept,
the provider is paused, and only a definite refusal ends the stream.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from behest_ledger.charging import Evidence, Outcome, charge
from behest_ledger.holds import Answer, Granted, Refused
from behest_ledger.money import usd_from_pico
from behest_ledger.token_counts import TokenCounts
from behest_proxy import provider_errors, refusals
from behest_proxy.actions import (
    Action,
    AskCredit,
    Begin,
    CallUpstream,
    CancelUpstream,
    Fail,
    Finish,
    Linger,
    Pause,
    Respond,
    Resume,
    Settle,
    Write,
)
from behest_proxy.aggregate import AggregateTooLarge, Aggregator
from behest_proxy.chunk import (
    Chunk,
    ChunkError,
    chunk_texts,
    decode,
    ended_by_length,
    is_usage_only,
    plain_text,
    with_finish_reason_null,
    with_usage_cost,
)
from behest_proxy.errors import LedgerUnavailable, QuotaExceeded, ShownError, UpstreamError, UpstreamTimeout
from behest_proxy.meter import Meter
from behest_proxy.sse import DONE, DONE_PAYLOAD, NamedEvent, SseFramer, SseTooLarge, data_event, data_events
from behest_proxy.usage import UsageState, as_openai


class Phase(enum.Enum):
    """Where an exchange is; the drawing above shows how they follow each other."""

    ADMITTING = "admitting"
    CALLING = "calling"
    REFUSED = "refused"
    """The provider answered other than 2xx: its body is read, within a bound."""
    STREAMING = "streaming"
    LINGERING = "lingering"
    """The client has every finish_reason and left: only the usage is waited for."""
    ENDED = "ended"


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What is fixed when the request is admitted."""

    streamed: bool
    """The client asked for a stream; otherwise the answer is put together and given as a whole."""
    include_usage: bool
    choices: int
    input_counts: TokenCounts
    count: Callable[[str], int]
    """Tokens in a text."""
    ratio: float
    """What a local count is multiplied with to be above the provider's."""
    amount_pico: Callable[[TokenCounts], int]
    """The price of some tokens, by the rates fixed at admission."""
    metered: bool
    """Held in tranches; False: the worst case is held, and the provider was told to stop there."""
    clamp_tokens: int | None = None
    """The limit per choice that we set or lowered; None: the caller's own limit stands."""
    cap_tokens: int | None = None
    """The most output that the provider may bill, over all choices, where its limits make that known."""
    hidden_tokens_per_second: int = 0


class Exchange:
    """The decisions of one request. See the module for its life."""

    def __init__(self, terms: Terms) -> None:
        self.phase = Phase.ADMITTING
        self._terms = terms
        self._meter = Meter(
            ratio=terms.ratio,
            choices=terms.choices,
            credit_tokens=0,
            cap_tokens=terms.cap_tokens,
            metered=terms.metered,
        )
        self._framer = SseFramer()
        self._usage = UsageState()
        self._counted_at_usage = (0, 0)
        self._aggregator = None if terms.streamed else Aggregator()
        self._bound_by: Refused | None = None
        self._client_gone = False
        self._request_sent_s: float | None = None
        self._first_byte = False
        self._begun = False
        self._status = 0
        self._headers: Sequence[tuple[bytes, bytes]] = ()
        self._error_body = b""
        self._pending: list[bytes] = []
        """Payloads that wait for credit. The provider is paused meanwhile, so they are one read's worth."""
        self._asked: AskCredit | None = None
        self._early_ask_refused = False
        self._upstream_over: Callable[[float], list[Action]] | None = None
        """What to do about the provider's end once the pending payloads are through."""
        self._seen: set[int] = set()
        self._finish_reasons: dict[int, str] = {}
        self._clamped = False
        self._usage_forwarded = False
        self._chunks = 0

    # --- the ledger's answers ---------------------------------------------------------------------------------

    def admitted(self, answer: Answer | None, now_s: float) -> list[Action]:
        """The ledger's answer to the admission; None: it gave none, so whether a hold exists is not known."""
        if isinstance(answer, Refused):
            self.phase = Phase.ENDED
            return [Fail(refusals.shown(answer))]
        if not isinstance(answer, Granted):
            return self._end(Outcome.LEDGER_UNAVAILABLE, now_s, _no_ledger())
        if self._client_gone:
            return self._end(Outcome.CLIENT_CANCELLED, now_s)
        self._meter.add_credit(answer.output_tokens)
        self._bound_by = answer.bound_by
        self.phase = Phase.CALLING
        return [CallUpstream()]

    def credit(self, answer: Answer | None, now_s: float) -> list[Action]:
        """The ledger's answer to `AskCredit`; None: it gave none."""
        asked, self._asked = self._asked, None
        if self.phase is not Phase.STREAMING:
            return []
        if isinstance(answer, Granted):
            self._early_ask_refused = False
            self._meter.add_credit(answer.output_tokens)
            if not self._pending:
                return []
            pending, self._pending = self._pending, []
            actions = self._walk(pending, now_s)
            if not self._pending and self.phase is Phase.STREAMING:
                actions.append(Resume())
                if self._upstream_over is not None:
                    actions += self._upstream_over(now_s)
            return actions
        if not self._pending:
            # The stream had asked ahead of need. It goes on; when it is really short it asks again.
            self._early_ask_refused = True
            return []
        if asked is not None and not asked.is_short:
            # It ran short while it asked ahead of need. Only an answer to the real need is final.
            return self._ask(self._missing_for(self._pending[0]), is_short=True)
        if isinstance(answer, Refused):
            outcome = Outcome.KILLED if answer.reason == "suspended" else Outcome.QUOTA_EXCEEDED
            return self._cut(outcome, now_s, answer)
        # No answer, or the hold is gone from the books: nothing may be spent on it any more.
        return self._end(Outcome.LEDGER_UNAVAILABLE, now_s, _no_ledger())

    # --- the provider -----------------------------------------------------------------------------------------

    def request_sent(self, now_s: float) -> list[Action]:
        """The whole request is with the provider's connection: from now on its input may be billed."""
        self._request_sent_s = now_s
        return []

    def upstream_head(self, status: int, headers: Sequence[tuple[bytes, bytes]], now_s: float) -> list[Action]:
        """The head of the provider's answer."""
        if self.phase is not Phase.CALLING:
            return []
        self._status, self._headers = status, headers
        if not 200 <= status < 300:
            self.phase = Phase.REFUSED
            return []
        content_type = dict(headers).get(b"content-type", b"text/event-stream")
        if not content_type.lower().startswith(b"text/event-stream"):
            return self._end(
                Outcome.UPSTREAM_ERROR,
                now_s,
                provider_errors.ProviderRefused("the provider's answer is no event stream"),
            )
        self.phase = Phase.STREAMING
        if self._terms.streamed:
            self._begun = True
            return [Begin()]
        return []

    def upstream_data(self, data: bytes, now_s: float) -> list[Action]:
        """Body bytes of one read: the way of a chunk."""
        phase = self.phase
        if phase is Phase.REFUSED:
            room = provider_errors.ERROR_BODY_BYTES_MAX - len(self._error_body)
            self._error_body += data[:room]
            return []
        if phase is not Phase.STREAMING and phase is not Phase.LINGERING:
            return []
        self._first_byte = True
        try:
            payloads = self._framer.feed(data)
        except SseTooLarge:
            return self._end(Outcome.UPSTREAM_ERROR, now_s, _broken())
        if self._pending:
            self._pending += payloads
            return []
        return self._walk(payloads, now_s)

    def upstream_end(self, now_s: float) -> list[Action]:
        """The provider's answer ended as its framing says it must."""
        if self.phase is Phase.REFUSED:
            return self._refused_by_provider(now_s)
        if self.phase not in (Phase.STREAMING, Phase.LINGERING):
            return []
        rest = self._framer.finish()
        if self._pending:
            self._pending += rest
            self._upstream_over = self._ended_by_provider
            return []
        actions = self._walk(rest, now_s) if rest else []
        if self._pending:
            self._upstream_over = self._ended_by_provider
            return actions
        return actions + self._ended_by_provider(now_s)

    def upstream_failed(self, kind: str, now_s: float) -> list[Action]:
        """The call to the provider broke; `kind` is the upstream client's word for how."""
        if self.phase is Phase.ENDED or self.phase is Phase.ADMITTING:
            return []
        if self.phase is Phase.LINGERING:
            return self._end(Outcome.COMPLETED, now_s)
        if self.phase is Phase.REFUSED:
            return self._refused_by_provider(now_s)

        def failed(at_s: float) -> list[Action]:
            error = provider_errors.failed(kind, in_stream=self._first_byte)
            timed_out = isinstance(error, UpstreamTimeout)
            return self._end(Outcome.UPSTREAM_TIMEOUT if timed_out else Outcome.UPSTREAM_ERROR, at_s, error)

        if self._pending:
            self._upstream_over = failed
            return []
        return failed(now_s)

    # --- the client and the operator of this process -----------------------------------------------------------

    def client_gone(self, now_s: float) -> list[Action]:
        """The client reset, closed or went away."""
        self._client_gone = True
        if self.phase is Phase.ENDED or self.phase is Phase.ADMITTING:
            return []  # while admitting, the answer decides whether there is a hold to give back
        if self.phase is Phase.STREAMING and self._all_finished():
            # The client has all it asked for and left; the provider's usage is still on its way.
            self.phase = Phase.LINGERING
            pending, self._pending = self._pending, []
            return [Linger(), *([Resume(), *self._walk(pending, now_s)] if pending else [])]
        if self.phase is Phase.LINGERING:
            return []
        return self._end(Outcome.CLIENT_CANCELLED, now_s)

    def lingered(self, now_s: float) -> list[Action]:
        """The provider's usage did not come in time after the client had left."""
        return self._end(Outcome.COMPLETED, now_s) if self.phase is Phase.LINGERING else []

    def stop(self, outcome: Outcome, error: ShownError, now_s: float) -> list[Action]:
        """End it from outside: killed, draining, or a client that does not read."""
        if self.phase in (Phase.ENDED, Phase.ADMITTING, Phase.LINGERING):
            return []
        return self._end(outcome, now_s, error)

    # --- the walk of a chunk -----------------------------------------------------------------------------------

    def _walk(self, payloads: list[bytes], now_s: float) -> list[Action]:
        forward: list[bytes] = []
        actions: list[Action] = []
        ending: list[Action] | None = None
        count = self._terms.count
        pay = self._meter.pay
        for index, payload in enumerate(payloads):
            if payload == DONE_PAYLOAD:
                ending = self._hand_over(forward) + self._complete(now_s)
                forward = []
                break
            try:
                chunk = decode(payload)
            except ChunkError:
                if payload.strip():
                    ending = self._hand_over(forward) + self._end(Outcome.UPSTREAM_ERROR, now_s, _broken())
                    forward = []
                    break
                continue
            text = plain_text(chunk)
            if text is not None and self._is_ordinary(chunk):
                if pay(count(text)):
                    forward.append(payload)
                    continue
                self._pending = payloads[index:]
                break
            if chunk.error is not None or (payload.__class__ is NamedEvent and payload.name == "error"):
                error = provider_errors.reported(chunk.error)
                ending = self._hand_over(forward) + self._end(Outcome.UPSTREAM_ERROR, now_s, error)
                forward = []
                break
            if not self._pay_for(chunk):
                self._pending = payloads[index:]
                break
            edited = self._taken(chunk, payload)
            if edited is not None:
                forward.append(edited)
        if forward:
            actions = self._hand_over(forward)
        if ending is not None:
            return actions + ending
        if self._pending:
            missing = self._missing_for(self._pending[0])
            return [*actions, Pause(), *self._ask(missing, is_short=True)]
        if (
            self._meter.runs_low
            and self._asked is None
            and not self._early_ask_refused
            and self.phase is Phase.STREAMING
        ):
            actions += self._ask(1, is_short=False)
        return actions

    def _is_ordinary(self, chunk: Chunk) -> bool:
        """A chunk that adds text to a known choice and says nothing else."""
        choices = chunk.choices
        return (
            chunk.usage is None
            and chunk.error is None
            and chunk.x_groq is None
            and choices is not None
            and choices[0].finish_reason is None
            and choices[0].index in self._seen
            and self.phase is Phase.STREAMING
        )

    def _pay_for(self, chunk: Chunk) -> bool:
        """Count what a chunk adds, whatever its form. False: the credit does not reach; nothing was counted."""
        if self.phase is Phase.LINGERING:
            return True
        output, reasoning, calls = self._tokens_of(chunk)
        if calls:
            self._meter.reserve_tool_calls(calls)
        if self._meter.pay(output, reasoning):
            return True
        if calls:
            self._meter.reserve_tool_calls(-calls)  # it comes again with the chunk
        return False

    def _tokens_of(self, chunk: Chunk) -> tuple[int, int, int]:
        count = self._terms.count
        output = reasoning = calls = 0
        for texts in chunk_texts(chunk):
            output += count(texts.visible) + count(texts.tools)
            reasoning += count(texts.reasoning)
            calls += texts.tool_calls
        return output, reasoning, calls

    def _missing_for(self, payload: bytes) -> int:
        output, reasoning, calls = self._tokens_of(decode(payload))
        self._meter.reserve_tool_calls(calls)
        missing = self._meter.missing_tokens(output, reasoning)
        self._meter.reserve_tool_calls(-calls)
        return missing

    def _taken(self, chunk: Chunk, payload: bytes) -> bytes | None:
        """A chunk that is paid for, as it goes on: None where the client did not ask for it."""
        finished_before = self._all_finished()
        for choice in chunk.choices or ():
            self._seen.add(choice.index)
            reason = choice.finish_reason
            if reason is None:
                continue
            self._finish_reasons[choice.index] = reason
            if ended_by_length(reason) and self._terms.clamp_tokens is not None:
                self._clamped = True
        if self._clamped and chunk.choices:
            payload = with_finish_reason_null(payload)
        usage = chunk.any_usage
        if usage is not None:
            self._usage.update(usage)
            if self._usage.members is usage:
                self._counted_at_usage = (self._meter.output, self._meter.reasoning)
            if not self._terms.include_usage:
                return None if is_usage_only(chunk, finished=finished_before) else payload
            if chunk.usage is not None:
                self._usage_forwarded = True
                return with_usage_cost(payload, self._cost_usd(self._usage.counts))
        return payload

    def _hand_over(self, payloads: list[bytes]) -> list[Action]:
        """Paid payloads on their way to the client."""
        if not payloads or self.phase is Phase.LINGERING:
            return []
        self._chunks += len(payloads)
        if self._aggregator is None:
            return [Write(data_events(payloads))]
        try:
            for payload in payloads:
                self._aggregator.feed(payload)
        except AggregateTooLarge:
            return self._end(Outcome.UPSTREAM_ERROR, 0.0, _broken())
        return []

    def _ask(self, need_tokens: int, *, is_short: bool) -> list[Action]:
        if self._asked is not None:
            return []  # a question asked ahead of need is under way: its answer comes first
        self._asked = AskCredit(need_tokens, self._meter.next_want_tokens(need_tokens), is_short)
        return [self._asked]

    # --- ends --------------------------------------------------------------------------------------------------

    def _all_finished(self) -> bool:
        return len(self._finish_reasons) >= max(self._terms.choices, len(self._seen))

    def _ended_by_provider(self, now_s: float) -> list[Action]:
        if self.phase is Phase.ENDED:
            return []
        if self.phase is Phase.LINGERING:
            return self._end(Outcome.COMPLETED, now_s)
        if self._finish_reasons and len(self._finish_reasons) >= len(self._seen):
            return self._complete(now_s)
        error = provider_errors.failed("closed", in_stream=self._first_byte)
        return self._end(Outcome.UPSTREAM_ERROR, now_s, error)

    def _complete(self, now_s: float) -> list[Action]:
        """The answer is whole."""
        if self.phase is Phase.ENDED:
            return []
        if self.phase is Phase.LINGERING:
            return self._end(Outcome.COMPLETED, now_s)
        if self._clamped:
            return self._cut(Outcome.QUOTA_EXCEEDED, now_s, self._bound_by)
        counts = self._charged_counts()
        cost_usd = self._cost_usd(counts)
        if self._aggregator is not None:
            usage = self._usage.members if self._usage.seen else as_openai(counts)
            body = self._aggregator.body(usage=usage, cost_usd=cost_usd)
            return [Respond(200, body), *self._end(Outcome.COMPLETED, now_s)]
        last = b""
        if self._terms.include_usage and not self._usage_forwarded:
            usage = {**as_openai(counts), "cost_usd": msgspec.Raw(cost_usd.encode())}
            last = data_event(msgspec.json.encode({"object": "chat.completion.chunk", "choices": [], "usage": usage}))
        return [Write(last + DONE), Finish(), *self._end(Outcome.COMPLETED, now_s)]

    def _cut(self, outcome: Outcome, now_s: float, refusal: Refused | None) -> list[Action]:
        """A budget ends the answer."""
        partial = None
        if self._aggregator is not None:
            body = self._aggregator.body(usage=as_openai(self._charged_counts()))
            partial = msgspec.json.decode(body)
        error: ShownError
        if refusal is None:
            error = QuotaExceeded(
                "the budget paid for no more of this answer", details=partial and {"partial": partial}
            )
        else:
            error = refusals.shown(refusal, partial=partial)
        return self._end(outcome, now_s, error)

    def _refused_by_provider(self, now_s: float) -> list[Action]:
        answer = provider_errors.refused(self._status, self._headers, self._error_body)
        if isinstance(answer, ShownError):
            outcome = Outcome.UPSTREAM_ERROR if self._status >= 500 else Outcome.REFUSED
            return self._end(outcome, now_s, answer)
        return [Respond(answer.status, answer.body), *self._end(Outcome.REFUSED, now_s)]

    def _end(self, outcome: Outcome, now_s: float, error: ShownError | None = None) -> list[Action]:
        """The one way to the end: stop the provider, tell the client, settle."""
        if self.phase is Phase.ENDED:
            return []
        was_called = self.phase is not Phase.ADMITTING
        self.phase = Phase.ENDED
        self._pending = []
        actions: list[Action] = []
        if was_called and outcome is not Outcome.COMPLETED:
            actions.append(CancelUpstream())
        if error is not None and not self._client_gone:
            actions += [Write(error.terminal_event()), Finish()] if self._begun else [Fail(error)]
        facts: dict[str, Any] = {
            "chunks": self._chunks,
            "finish_reasons": [self._finish_reasons[index] for index in sorted(self._finish_reasons)],
            "counted_output_tokens": self._meter.counted_tokens,
            "held_output_tokens": self._meter.credit_tokens,
        }
        actions.append(Settle(outcome, charge(outcome, self._evidence(now_s)), facts))
        return actions

    def _evidence(self, now_s: float) -> Evidence:
        meter = self._meter
        counted = msgspec.structs.replace(self._terms.input_counts, output=meter.output, reasoning=meter.reasoning)
        since = TokenCounts()
        if self._usage.seen and not self._all_finished():
            since = TokenCounts(
                output=meter.output - self._counted_at_usage[0], reasoning=meter.reasoning - self._counted_at_usage[1]
            )
        hidden = 0
        if self._terms.hidden_tokens_per_second and self._request_sent_s is not None:
            elapsed_s = max(0.0, now_s - self._request_sent_s)
            hidden = max(
                0,
                min(
                    meter.credit_tokens - meter.counted_tokens,
                    int(elapsed_s * self._terms.hidden_tokens_per_second),
                ),
            )
        return Evidence(
            request_sent=self._request_sent_s is not None,
            first_byte=self._first_byte,
            counted=counted,
            provider=self._usage.counts if self._usage.seen else None,
            forwarded_since_provider=since,
            hidden_tokens=hidden,
        )

    def _charged_counts(self) -> TokenCounts:
        return charge(Outcome.COMPLETED, self._evidence(0.0)).counts

    def _cost_usd(self, counts: TokenCounts) -> str:
        return usd_from_pico(self._terms.amount_pico(counts))


def _no_ledger() -> ShownError:
    return LedgerUnavailable("the ledger cannot be reached, and nothing is spent without it", retry_after_s=1)


def _broken() -> ShownError:
    return UpstreamError("the provider's stream is broken")
