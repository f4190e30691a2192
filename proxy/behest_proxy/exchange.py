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

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from behest_ledger.charging import Charge, Evidence, Outcome, charge
from behest_ledger.holds import Answer, Gone, Granted, Refused
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
    Keep,
    Linger,
    Pause,
    Respond,
    Resume,
    Settle,
    Write,
)
from behest_proxy.aggregate import CHOICES_MAX, AggregateTooLarge, Aggregator
from behest_proxy.chunk import (
    Chunk,
    ChunkError,
    chunk_texts,
    decode,
    ended_by_length,
    finish_chunk,
    is_usage_only,
    model_of,
    ordinary_text,
    usage_chunk,
    with_finish_reason_null,
    with_usage_cost,
)
from behest_proxy.errors import QuotaExceeded, ShownError, UpstreamError, UpstreamTimeout
from behest_proxy.likeness import Likeness
from behest_proxy.meter import Meter
from behest_proxy.sse import DONE, DONE_PAYLOAD, SseFramer, SseTooLarge, data_event, data_events, is_error_event
from behest_proxy.terms import Phase, Terms
from behest_proxy.usage import UsageState, as_openai
from behest_proxy.whole import WholeFramer

FINISH_REASON_CHARS_MAX = 40

_Ending = Callable[[float], list[Action]]
"""A way to end, given the time at which it comes to it."""


class Exchange:
    """The decisions of one request. See the module for its life."""

    def __init__(self, terms: Terms) -> None:
        # What each chunk asks for stands first, as in `Conduct`.
        self.phase = Phase.ADMITTING
        self._pending: Sequence[bytes] = ()
        """Payloads that wait for credit. The provider is paused meanwhile, so they are one read's worth."""
        self._upstream_over: _Ending | None = None
        """What to do about the provider's end once the pending payloads are through."""
        self._is_between_events = False
        """The next read begins an event."""
        self._likeness = Likeness()
        self._count = terms.count
        self._chunks = 0
        self._meter = Meter(
            ratio=terms.ratio,
            choices=terms.choices,
            credit_tokens=0,
            cap_tokens=terms.cap_tokens,
            metered=terms.metered,
        )
        self._terms = terms
        self._framer = SseFramer() if terms.upstream_streams else WholeFramer()
        self._is_paid_whole = False
        """A whole answer whose usage is within the hold: there is nothing to count."""
        self._usage = UsageState()
        self._aggregator = None if terms.streamed else Aggregator(chunks=terms.said)
        self._bound_by: Refused | None = None
        self._client_gone = False
        self._stopped: _Ending | None = None
        self._request_sent_s: float | None = None
        self._first_byte = False
        self._begun = False
        self._status = 0
        self._headers: Sequence[tuple[bytes, bytes]] = ()
        self._error_body = b""
        self._asked: AskCredit | None = None
        self._early_ask_refused = False
        self._seen: set[int] = set()
        self._finish_reasons: dict[int, str] = {}
        self._shortened: set[int] = set()
        """Choices that ended for their length while a limit of ours was in force: whose limit it was, usage tells."""
        self._shown_counts: TokenCounts | None = None
        """The usage that the client was told last."""
        self._frame = b"{}"
        """A chunk whose id, model and so on a chunk of our own may bear."""

    @property
    def forwarded(self) -> tuple[int, int, int]:
        """Output tokens, reasoning tokens and chunks that are paid for, with those of the actions just returned."""
        meter = self._meter
        return meter.output, meter.reasoning, self._chunks

    @property
    def response_model(self) -> str:
        """The model that the provider says it used; empty: its answer did not come so far."""
        return model_of(self._frame)

    def charge_if_lost(self, now_s: float) -> Charge:
        """What is charged if this process and its journal are lost now."""
        return self._charge(Outcome.CRASHED, now_s)

    # --- the ledger's answers ---------------------------------------------------------------------------------

    def admitted(self, answer: Answer | None, now_s: float) -> list[Action]:
        """The ledger's answer to the admission; None: it gave none, so whether a hold exists is not known."""
        if self.phase is not Phase.ADMITTING:
            return []
        if isinstance(answer, Refused):
            self.phase = Phase.ENDED
            return [] if self._client_gone else [Fail(refusals.shown(answer))]
        if not isinstance(answer, Granted):
            return self._end(Outcome.LEDGER_UNAVAILABLE, now_s, refusals.no_ledger())
        if self._client_gone:
            return self._end(Outcome.CLIENT_CANCELLED, now_s)
        if self._stopped is not None:
            return self._stopped(now_s)
        self._meter.add_credit(answer.output_tokens)
        self._bound_by = answer.bound_by
        self.phase = Phase.CALLING
        return [CallUpstream()]

    def credit(self, answer: Answer | None, now_s: float) -> list[Action]:
        """The ledger's answer to `AskCredit`; None: it gave none."""
        asked, self._asked = self._asked, None
        if asked is None or self.phase is not Phase.STREAMING:
            return []
        if isinstance(answer, Gone):
            # The hold is not open any more: nothing may be spent on it, also not what was granted before.
            return self._end(Outcome.LEDGER_UNAVAILABLE, now_s, refusals.no_ledger())
        if isinstance(answer, Granted):
            self._early_ask_refused = False
            self._meter.add_credit(answer.output_tokens)
            if not self._pending:
                return []
            return self._walk_pending(now_s)
        if not self._pending:
            # The stream had asked ahead of need. It goes on; when it is really short it asks again.
            self._early_ask_refused = True
            return []
        if not asked.is_short:
            # It ran short while it asked ahead of need. Only an answer to the real need is final.
            return self._ask(self._missing_for(self._pending[0]), is_short=True)
        if isinstance(answer, Refused):
            outcome = Outcome.KILLED if answer.reason == "suspended" else Outcome.QUOTA_EXCEEDED
            return self._cut(outcome, now_s, answer)
        return self._end(Outcome.LEDGER_UNAVAILABLE, now_s, refusals.no_ledger())

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
        error = provider_errors.unreadable(headers, streams=self._terms.upstream_streams)
        if error is not None:
            return self._end(Outcome.UPSTREAM_ERROR, now_s, error)
        self.phase = Phase.STREAMING
        if self._terms.streamed:
            self._begun = True
            return [Begin()]
        return []

    def passes(self, read: bytes) -> int:
        """Pay for a read that goes on as it came; returns its events. 0: it is one for `parsed`.

        The shortest way of a chunk, and that of nearly each. What else is to be done then tells `ask_ahead`.
        """
        if self.phase is not Phase.STREAMING or self._pending or self._upstream_over is not None:
            return 0
        texts = self._likeness.texts_of(read) if self._is_between_events else None
        if texts is None:
            return 0
        if not self._meter.pay(self._count(texts[0]) if len(texts) == 1 else sum(map(self._count, texts))):
            return 0
        self._chunks += len(texts)
        return len(texts)

    def parsed(self, data: bytes, now_s: float) -> list[Action]:
        """The way of a read that does not pass."""
        if self.phase is Phase.REFUSED:
            room = provider_errors.ERROR_BODY_BYTES_MAX - len(self._error_body)
            self._error_body += data[:room]
            return self._refused_by_provider(now_s) if len(data) > room else []
        if self.phase not in (Phase.STREAMING, Phase.LINGERING) or self._upstream_over is not None:
            return []
        self._first_byte = True
        try:
            payloads = self._framer.feed(data)
        except SseTooLarge:
            return self._end(Outcome.UPSTREAM_ERROR, now_s, provider_errors.broken())
        self._is_between_events = self._framer.is_between_events
        if self._pending:
            self._pending = [*self._pending, *payloads]
            return []
        return self._walk(payloads, now_s)

    def upstream_end(self, now_s: float) -> list[Action]:
        """The provider's answer ended as its framing says it must."""
        if self.phase is Phase.REFUSED:
            return self._refused_by_provider(now_s)
        if self.phase not in (Phase.STREAMING, Phase.LINGERING) or self._upstream_over is not None:
            return []
        try:
            rest = self._framer.finish()
        except ChunkError:
            return self._end(Outcome.UPSTREAM_ERROR, now_s, provider_errors.broken())
        if isinstance(self._framer, WholeFramer) and self._framer.usage is not None:
            # Known before the first chunk of it is paid: where the hold covers it nothing has to be counted.
            self._take_usage(decode(self._framer.usage))
            self._is_paid_whole = self._usage.seen and self._usage.counts.output_tokens <= self._meter.credit_tokens
        if self._pending:
            self._pending = [*self._pending, *rest]
            actions: list[Action] = []
        else:
            actions = self._walk(rest, now_s) if rest else []
        if self._pending:
            self._upstream_over = self._ended_by_provider
            return actions
        return actions + self._ended_by_provider(now_s)

    def upstream_failed(self, kind: str, now_s: float) -> list[Action]:
        """The call to the provider broke; `kind` is the upstream client's word for how."""
        if self.phase in (Phase.ENDED, Phase.ADMITTING) or self._upstream_over is not None:
            return []
        if self.phase is Phase.REFUSED:
            return self._refused_by_provider(now_s)
        error = provider_errors.failed(kind, in_stream=self.phase is not Phase.CALLING)
        timed_out = isinstance(error, UpstreamTimeout)
        failed = self._failing(error, Outcome.UPSTREAM_TIMEOUT if timed_out else Outcome.UPSTREAM_ERROR)
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
        if self.phase is Phase.STREAMING and self._terms.streamed and self._all_finished():
            # The client has all it asked for and left; the provider's usage is still on its way.
            self.phase = Phase.LINGERING
            return [Linger(), *(self._walk_pending(now_s) if self._pending else [])]
        if self.phase is Phase.LINGERING:
            return []
        return self._end(Outcome.CLIENT_CANCELLED, now_s)

    def lingered(self, now_s: float) -> list[Action]:
        """The provider's usage did not come in time after the client had left."""
        if self.phase is not Phase.LINGERING:
            return []
        return [CancelUpstream(), *self._end(Outcome.COMPLETED, now_s)]

    def stop(self, outcome: Outcome, error: ShownError, now_s: float) -> list[Action]:
        """End it from outside: killed, draining, or a client that does not read."""
        if self.phase is Phase.ADMITTING:
            self._stopped = self._stopped or self._failing(error, outcome)
            return []  # the answer decides whether there is a hold to give back
        return self._end(outcome, now_s, error)

    # --- the walk of a chunk -----------------------------------------------------------------------------------

    def _walk(self, payloads: Sequence[bytes], now_s: float) -> list[Action]:
        """Decode, count, pay, edit and hand over, in their order, as far as the credit reaches."""
        forward: list[bytes] = []
        over: _Ending | None = None
        seen = self._seen if self.phase is Phase.STREAMING else frozenset[int]()
        count = self._count
        pay: Callable[[int], bool] = self._meter.pay if not self._is_paid_whole else lambda _tokens: True
        for index, payload in enumerate(payloads):
            try:
                chunk = decode(payload)
                text = ordinary_text(chunk, seen)
                if text is not None and payload.__class__ is bytes:
                    if pay(count(text)):
                        forward.append(payload)
                        if self._aggregator is None:
                            self._likeness.learn(payload, text)
                        continue
                    self._pending = payloads[index:]
                    break
                if chunk.error is not None or is_error_event(payload):
                    self._take_usage(chunk)
                    over = self._failing(provider_errors.reported(chunk.error))
                    break
                if not self._pay_for(chunk):
                    self._pending = payloads[index:]
                    break
                edited = self._taken(chunk, payload)
                if edited is not None:
                    forward.append(edited)
            except ChunkError:
                over = self._without_chunk(payload)
                if over is not None:
                    break
        actions = self._hand_over(forward, now_s) if forward else []
        if over is not None:
            return actions + over(now_s)
        if self._pending:
            missing = self._missing_for(self._pending[0])
            return [*actions, Pause(), *self._ask(missing, is_short=True)]
        if self.phase is Phase.STREAMING and self._upstream_over is None:
            actions += self.ask_ahead()
        return actions

    def _walk_pending(self, now_s: float) -> list[Action]:
        """Walk over what waited, and go on where it is through."""
        pending, self._pending = self._pending, ()
        actions = self._walk(pending, now_s)
        if self._pending or self.phase is Phase.ENDED:
            return actions
        if self._upstream_over is not None:
            return actions + self._upstream_over(now_s)
        return [*actions, Resume()]

    def _without_chunk(self, payload: bytes) -> _Ending | None:
        """What to do about a payload that is no chunk; None: nothing, it is blank."""
        text = payload.strip()
        if not text:
            return None
        if text == DONE_PAYLOAD:
            return self._complete
        if is_error_event(payload):
            return self._failing(provider_errors.reported(text.decode("utf-8", "replace")))
        return self._failing(provider_errors.broken())

    def _pay_for(self, chunk: Chunk) -> bool:
        """Count what a chunk adds, whatever its form. False: the credit does not reach; nothing was counted."""
        if self.phase is Phase.LINGERING:
            return True  # nothing is forwarded any more
        choices = chunk.choices or ()
        if len(choices) + len(self._seen) > CHOICES_MAX and len(
            self._seen.union(choice.index for choice in choices)
        ) > max(CHOICES_MAX, self._terms.choices):
            raise ChunkError("more choices than any request asks for")
        output, reasoning, calls = self._tokens_of(chunk)
        if calls:
            self._meter.reserve_tool_calls(calls)
        if self._is_paid_whole or self._meter.pay(output, reasoning):
            return True
        if calls:
            self._meter.reserve_tool_calls(-calls)  # it comes again with the chunk
        return False

    def _tokens_of(self, chunk: Chunk) -> tuple[int, int, int]:
        count = self._count
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
        shortened = False
        for choice in chunk.choices or ():
            self._seen.add(choice.index)
            reason = choice.finish_reason
            if reason is None:
                continue
            self._frame = payload
            self._finish_reasons[choice.index] = reason[:FINISH_REASON_CHARS_MAX]
            if self._terms.clamp_tokens is not None and ended_by_length(reason):
                self._shortened.add(choice.index)
                shortened = True
        if shortened:
            payload = with_finish_reason_null(payload)
        if not self._take_usage(chunk):
            return payload
        if not self._terms.include_usage:
            return None if is_usage_only(chunk, finished=finished_before) else payload
        if chunk.usage is None:
            return payload
        self._shown_counts = self._usage.counts
        return with_usage_cost(payload, self._cost_usd(self._usage.counts))

    def _take_usage(self, chunk: Chunk) -> bool:
        """Take the usage of a chunk, if it has any."""
        usage = chunk.any_usage
        if usage is None:
            return False
        self._usage.update(usage, output=self._meter.output, reasoning=self._meter.reasoning)
        return True

    def _take_waiting_usage(self) -> None:
        """A provider's usage counts also where it waits behind text that cannot be paid for any more.

        Of the output no more is charged than the client got, and of the input what was held: that is the ceiling.
        """
        got, held = self._meter.output + self._meter.reasoning, self._terms.input_bound_tokens
        for payload in self._pending:
            with suppress(ChunkError):
                if self._take_usage(decode(payload)):
                    self._usage.limit(input_tokens=held, output_tokens=got)
        self._pending = ()

    def _hand_over(self, payloads: list[bytes], now_s: float) -> list[Action]:
        """Paid payloads on their way to the client."""
        if self.phase is Phase.LINGERING:
            return []
        self._chunks += len(payloads)
        if self._aggregator is None:
            return [Write(data_events(payloads), len(payloads))]
        try:
            for payload in payloads:
                self._aggregator.feed(payload)
        except AggregateTooLarge:
            return self._end(Outcome.UPSTREAM_ERROR, now_s, UpstreamError("the provider's answer is too large"))
        return [Keep(data_events(payloads), len(payloads))] if self._terms.kept else []

    def ask_ahead(self) -> list[Action]:
        """Once half of the tranche is used: ask for the next one, while the stream goes on."""
        is_time = self._meter.runs_low and self._asked is None and not self._early_ask_refused
        return self._ask(1, is_short=False) if is_time else []

    def _ask(self, need_tokens: int, *, is_short: bool) -> list[Action]:
        if self._asked is not None:
            return []  # a question asked ahead of need is under way: its answer comes first
        self._asked = AskCredit(need_tokens, self._meter.next_want_tokens(need_tokens), is_short)
        return [self._asked]

    # --- ends --------------------------------------------------------------------------------------------------

    def _all_finished(self) -> bool:
        return len(self._finish_reasons) >= max(self._terms.choices, len(self._seen))

    def _ended_by_provider(self, now_s: float) -> list[Action]:
        if self._finish_reasons and len(self._finish_reasons) >= len(self._seen):
            return self._complete(now_s)
        return self._end(Outcome.UPSTREAM_ERROR, now_s, provider_errors.failed("closed", in_stream=True))

    def _reached_clamp(self) -> bool:
        """Whether the limit that a budget lowered ended the answer, and not one of the model's own.

        A provider may also stop because its context is full. Its usage tells: whoever was stopped by our limit used
        all of it (one token less, where the last one is not counted). Without usage nothing speaks against it.
        """
        clamp_tokens, shortened = self._terms.clamp_tokens, len(self._shortened)
        if clamp_tokens is None or not shortened:
            return False
        return not self._usage.seen or self._usage.counts.output_tokens >= (clamp_tokens - 1) * shortened

    def _own_ends(self) -> bytes | None:
        """The chunk with the finish reasons that were kept back, where they are the model's own after all."""
        if not self._shortened:
            return None
        return finish_chunk(self._frame, {index: self._finish_reasons[index] for index in sorted(self._shortened)})

    def _failing(self, error: ShownError, outcome: Outcome = Outcome.UPSTREAM_ERROR) -> _Ending:
        return lambda now_s: self._end(outcome, now_s, error)

    def _complete(self, now_s: float) -> list[Action]:
        """The answer is whole."""
        if self.phase is not Phase.STREAMING:
            return self._end(Outcome.COMPLETED, now_s)
        if self._reached_clamp():
            return self._cut(Outcome.QUOTA_EXCEEDED, now_s, self._bound_by)
        own_ends = self._own_ends()
        if self._aggregator is not None:
            kept = self._hand_over([own_ends], now_s) if own_ends else []
            if self.phase is not Phase.STREAMING:
                return kept  # it got too large
            body = self._whole_body(self._aggregator, Outcome.COMPLETED, now_s)
            return [*kept, Respond(200, body), *self._end(Outcome.COMPLETED, now_s)]
        last = b""
        counts = self._charge(Outcome.COMPLETED, now_s).counts
        if self._terms.include_usage and self._shown_counts != counts:
            usage = {**as_openai(counts), "cost_usd": msgspec.Raw(self._cost_usd(counts).encode())}
            last = data_event(usage_chunk(self._frame, usage))
        last = (data_event(own_ends) if own_ends else b"") + last
        return [Write(last + DONE, last.count(b"\n\n")), Finish(), *self._end(Outcome.COMPLETED, now_s)]

    def _cut(self, outcome: Outcome, now_s: float, refusal: Refused | None) -> list[Action]:
        """A budget ends the answer."""
        self._take_waiting_usage()
        partial = None
        if self._aggregator is not None:
            partial = msgspec.Raw(self._whole_body(self._aggregator, outcome, now_s))
        error: ShownError
        if refusal is None:
            details = None if partial is None else {"partial": partial}
            error = QuotaExceeded("the budget paid for no more of this answer", details=details)
        else:
            error = refusals.shown(refusal, partial=partial)
        return self._end(outcome, now_s, error)

    def _whole_body(self, aggregator: Aggregator, outcome: Outcome, now_s: float) -> bytes:
        """The answer as one body, as far as it came, with the usage that is charged for it."""
        counts = self._charge(outcome, now_s).counts
        members = self._usage.members
        usage = members if members is not None and counts == self._usage.counts else as_openai(counts)
        return aggregator.body(usage=usage, cost_usd=self._cost_usd(counts))

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
        if self.phase is Phase.LINGERING:
            # The client has everything; whatever becomes of the provider now changes nothing about that.
            outcome, error = Outcome.QUOTA_EXCEEDED if self._reached_clamp() else Outcome.COMPLETED, None
        was_called = self.phase is not Phase.ADMITTING
        self.phase = Phase.ENDED
        self._take_waiting_usage()
        actions: list[Action] = []
        if was_called and outcome is not Outcome.COMPLETED:
            actions.append(CancelUpstream())
        if error is not None and not self._client_gone:
            actions += [Write(error.terminal_event()), Finish()] if self._begun else [Fail(error)]
        facts: dict[str, Any] = {
            "chunks": self._chunks,
            # A provider's text on its way into the books: escaped, because PostgreSQL's JSON takes no NUL.
            "finish_reasons": [ascii(self._finish_reasons[index])[1:-1] for index in sorted(self._finish_reasons)],
            "counted_output_tokens": self._meter.counted_tokens,
            "held_output_tokens": self._meter.credit_tokens,
        }
        actions.append(Settle(outcome, self._charge(outcome, now_s), facts))
        return actions

    def _evidence(self, now_s: float) -> Evidence:
        meter = self._meter
        counted = msgspec.structs.replace(self._terms.input_counts, output=meter.output, reasoning=meter.reasoning)
        sent_s = self._request_sent_s
        seen, room = meter.output + meter.reasoning, meter.credit_tokens - meter.counted_tokens
        elapsed_s = 0.0 if sent_s is None else now_s - sent_s
        hidden = self._terms.hidden_tokens(elapsed_s, seen_tokens=seen, room_tokens=room)
        return Evidence(
            request_sent=sent_s is not None,
            first_byte=self._first_byte,
            counted=counted,
            provider=self._usage.counts if self._usage.seen else None,
            forwarded_since_provider=self._usage.forwarded_since(output=meter.output, reasoning=meter.reasoning),
            hidden_tokens=hidden,
        )

    def _charge(self, outcome: Outcome, now_s: float) -> Charge:
        return charge(outcome, self._evidence(now_s))

    def _cost_usd(self, counts: TokenCounts) -> str:
        return usd_from_pico(self._terms.amount_pico(counts))
