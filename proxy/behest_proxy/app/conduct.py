"""Conducts one exchange: carries out what it decides, and tells it what happens.

It is the owner of the request: it outlives the client's task, so that whatever becomes of the client, the provider is
stopped and the books are written. It decides nothing itself.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from behest_ledger.charging import Outcome
from behest_ledger.holds import Admission, Answer, Granted, Refused, Settlement
from behest_ledger.prices.rates import Rates
from behest_ledger.settlement import lines_of, settlement_for
from behest_ledger.store.credit import Account
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.holders import Checkpoint
from behest_ledger.telemetry.logs import FIELDS
from behest_ledger.token_counts import TokenCounts
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
from behest_proxy.app.client_stream import STREAM_HEADERS, ClientStream
from behest_proxy.app.context import RequestContext
from behest_proxy.app.generation import Generation
from behest_proxy.app.memory import Trace
from behest_proxy.app.rates import rate_headers
from behest_proxy.app.report import NoReport, Report
from behest_proxy.errors import ShownError, our_bug
from behest_proxy.exchange import Exchange
from behest_proxy.sse import KEEP_ALIVE
from behest_proxy.terms import Phase
from behest_proxy.upstream import UpstreamCall, UpstreamFailure, UpstreamRequest

if TYPE_CHECKING:
    from behest_proxy.app.gateway import Gateway

logger = logging.getLogger(__name__)

LINGER_S = 2.0
"""How long a provider's usage is waited for once the client has left with everything."""
UPSTREAM_TAIL_S = 1.0
"""How long a provider may take to end its body after `[DONE]`, so that its connection can be used again."""

_NOTHING = (-1, 0, 0)


class Conduct:
    """One request's owner, and the handler of its upstream call."""

    def __init__(
        self,
        gateway: "Gateway",
        *,
        admission: Admission,
        rates: Rates,
        trace: Trace,
        exchange: Callable[[Granted | None], Exchange],
        upstream_request: Callable[[Granted], UpstreamRequest],
        client: ClientStream | Generation,
        context: RequestContext,
        attempt: int = 1,
        report: Report | None = None,
    ) -> None:
        """`exchange` and `upstream_request` are made when the ledger's answer is known: it sets the limit.

        The client of a reply that is kept is its `Generation`; `attempt` says how often that was begun.
        """
        # What each chunk asks for stands first, on as few lines of the processor's cache as hold it: where many streams
        # take turns, each finds its own cold.
        self._exchange: Exchange | None = None
        self._gateway = gateway
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._last_write_s = 0.0
        self._generation = client if isinstance(client, Generation) else None
        self._client = client
        self._client_paused = False
        self._admission = admission
        self._rates = rates
        self._make_exchange = exchange
        self._make_upstream_request = upstream_request
        self._attempt = attempt
        self._context = context
        self._report: Report = report if report is not None else NoReport()
        self._grant: Granted | None = None
        self._checkpointed = _NOTHING
        self._granted_tokens = 0
        self._account: Account | None = None
        self._call: UpstreamCall | None = None
        self._client_left = client.gone
        self._stopped: tuple[Outcome, ShownError] | None = None
        self._credit_paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._started_s = self._loop.time()
        self._first_byte_s: float | None = None
        self._upstream_done = False
        self.answered: asyncio.Future[Respond | Fail | None] = self._loop.create_future()
        """What the endpoint has to send; None: the answer was streamed, or nobody is there to read one."""
        if self._generation is not None:
            self._generation.conduct = self
        client.on_gone = self._on_client_gone
        client.on_resume = self._on_client_resume

    @property
    def admission(self) -> Admission:
        """What was asked of the ledger: whose request it is."""
        return self._admission

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows that hold for it; none before it is admitted."""
        return self._grant.windows if self._grant is not None else ()

    async def admit(self) -> None:
        """Ask the ledger, and begin. Returns when the request is under way or refused."""
        answer: Answer | None
        try:
            answer = await self._gateway.admit(self._admission)
        except LedgerError as error:
            logger.warning(
                "admission of %s: %s", self._context.request_id, error, extra={FIELDS: self._context.log_fields}
            )
            answer = None
        self._context.rate_headers = rate_headers(answer, datetime.now(UTC))
        if isinstance(answer, Granted):
            self._grant = answer
            self._granted_tokens = answer.output_tokens
            self._trace.granted(self._granted_tokens)
            self._account = self._gateway.desk.open(
                self._admission.tenant_id, self._admission.request_id, answer.windows
            )
        self._exchange = self._make_exchange(self._grant)
        if self._client_left:
            self._perform(self._exchange.client_gone(self._loop.time()))
        if self._stopped is not None:
            self._perform(self._exchange.stop(*self._stopped, self._loop.time()))
        self._perform(self._exchange.admitted(answer, self._loop.time()))
        if isinstance(answer, Refused):
            self._trace.refused()
            self._report.refused(answer)
            self._gateway.ended(self)
            if self._generation is not None:
                self._generation.finished(None, is_charged=False)

    def stop(self, outcome: Outcome, error: ShownError) -> None:
        """End the request from outside, also while the ledger is still being asked."""
        if self._exchange is None:
            self._stopped = (outcome, error)
        else:
            self._perform(self._exchange.stop(outcome, error, self._loop.time()))

    def failed(self, error: Exception) -> None:
        """It could not be begun."""
        if not self.answered.done():
            self.answered.set_exception(error)
        if self._generation is not None:
            self._generation.finished(None, is_charged=False)
            self._generation.answer(Fail(our_bug()))

    def checkpoint(self) -> Checkpoint | None:
        """How far the request has come; None where that is no farther than the last time."""
        exchange = self._exchange
        if exchange is None or self._account is None or exchange.forwarded == self._checkpointed:
            return None
        self._checkpointed = exchange.forwarded
        charge = exchange.charge_if_lost(self._loop.time())
        return Checkpoint(
            tenant_id=self._admission.tenant_id,
            request_id=self._admission.request_id,
            lines=lines_of(charge, self._rates),
        )

    def checkpoint_again(self) -> None:
        """The last checkpoint was not written: make the next one, however far the request has come."""
        self._checkpointed = _NOTHING

    # --- the upstream call's handler ---------------------------------------------------------------------------

    def on_request_sent(self) -> None:
        """See `UpstreamHandler`."""
        assert self._exchange is not None
        self._trace.sent()
        self._perform(self._exchange.request_sent(self._loop.time()))

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """See `UpstreamHandler`."""
        assert self._exchange is not None
        self._perform(self._exchange.upstream_head(status, headers, self._loop.time()))

    def on_data(self, data: bytes) -> None:
        """See `UpstreamHandler`. The way of a chunk: one synchronous walk to the client's socket."""
        assert self._exchange is not None
        exchange = self._exchange
        if not self._gateway.holder.lives:
            self._gateway.lose_all()
            return
        events = exchange.passes(data)
        if events:
            self._trace.store(*exchange.forwarded)  # before the client gets it: what was sent is never uncounted
            self._write(data, events, self._loop.time())
            if actions := exchange.ask_ahead():
                self._perform(actions)
            return
        now_s = self._loop.time()
        if self._first_byte_s is not None or exchange.phase is Phase.REFUSED:
            self._perform(exchange.parsed(data, now_s))
            return
        # The first read never passes: nothing is known that it could be like.
        self._first_byte_s = now_s
        self._trace.first_byte()
        self._report.first_byte()
        self._perform(exchange.parsed(data, now_s))
        self._report.handed_over()

    def on_end(self) -> None:
        """See `UpstreamHandler`."""
        assert self._exchange is not None
        self._upstream_done = True
        self._perform(self._exchange.upstream_end(self._loop.time()))

    def on_failure(self, failure: UpstreamFailure) -> None:
        """See `UpstreamHandler`."""
        assert self._exchange is not None
        self._upstream_done = True
        logger.info(
            "upstream of %s: %s", self._context.request_id, failure.message, extra={FIELDS: self._context.log_fields}
        )
        self._perform(self._exchange.upstream_failed(failure.kind, self._loop.time()))

    def on_broken(self) -> None:
        """See `UpstreamHandler`. A bug of ours must keep neither the money held nor the client waiting."""
        logger.error(
            "request %s is ended: a bug of ours", self._context.request_id, extra={FIELDS: self._context.log_fields}
        )
        self.stop(Outcome.UPSTREAM_ERROR, our_bug())

    # --- carrying out ------------------------------------------------------------------------------------------

    def _perform(self, actions: Sequence[Action]) -> None:
        if self._exchange is not None:
            self._trace.store(*self._exchange.forwarded)
        rest = iter(actions)
        try:
            for action in rest:
                self._carry_out(action)
        except Exception:
            # Whatever cannot be done at a request's end, the settlement is.
            if settle := [action for action in rest if isinstance(action, Settle)]:
                self._perform(settle)
                self._client.reset()
            raise

    def _carry_out(self, action: Action) -> None:
        match action:
            case Write(data, events):
                self._write(data, events, self._loop.time())
            case Keep(data, events):
                if self._generation is not None:
                    self._generation.add(data, events)
            case AskCredit(need_tokens, want_tokens, is_short):
                assert self._account is not None
                self._gateway.desk.ask(
                    self._account,
                    need_tokens=need_tokens,
                    want_tokens=want_tokens,
                    may_wait=is_short,
                    answer=self._on_credit,
                )
            case CallUpstream():
                self._call_upstream()
            case Begin():
                self._begin()
            case Finish():
                self._client.end()
                self._answer(None)
            case Pause():
                self._credit_paused = True
                self._pause()
            case Resume():
                self._credit_paused = False
                self._resume()
            case CancelUpstream():
                self._cancel_upstream()
            case Linger():
                self._loop.call_later(LINGER_S, self._on_lingered)
            case Respond() | Fail():
                self._answer(action)
            case Settle():
                self._settle(action)

    def _call_upstream(self) -> None:
        assert self._grant is not None
        if self._generation is not None:
            self._generation.granted()
        self._report.called()
        self._call = self._gateway.upstream.send(self._make_upstream_request(self._grant), self)

    def _begin(self) -> None:
        self._context.status = 200
        self._client.begin(200, [*STREAM_HEADERS, *self._context.headers()])
        if self._exchange is not None and self._exchange.phase is Phase.ENDED:
            return  # its client was gone with the first bytes
        self._last_write_s = self._loop.time()
        self._timer = self._loop.call_later(self._gateway.settings.keep_alive_s, self._keep_alive)

    def _write(self, data: bytes, events: int, now_s: float) -> None:
        self._last_write_s = now_s
        if self._generation is None:
            self._client.write(data)
        else:
            self._generation.add(data, events)
        if self._client.paused and not self._client_paused:
            self._await_client()

    def _settle(self, action: Settle) -> None:
        for timer in (self._timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        now_s = self._loop.time()
        facts: dict[str, Any] = {
            **action.facts,
            "trace_id": self._context.trace_id.decode(),
            "duration_ms": round((now_s - self._started_s) * 1000),
        }
        if self._first_byte_s is not None:
            facts["first_byte_ms"] = round((self._first_byte_s - self._started_s) * 1000)
        if self._attempt > 1:
            facts["attempt"] = self._attempt
        settlement = settlement_for(
            tenant_id=self._admission.tenant_id,
            request_id=self._admission.request_id,
            outcome=action.outcome,
            charge=action.charge,
            rates=self._rates,
            facts=facts,
        )
        self._trace.ended(settlement)
        self._tell(settlement, action)
        if self._account is not None:
            self._gateway.desk.ended(self._account)
        self._gateway.writer.submit(settlement)
        self._gateway.ended(self)
        self._answer(None)
        if self._generation is not None:
            self._generation.finished(action.outcome, is_charged=action.charge.counts != TokenCounts())
        if self._call is not None and not self._upstream_done:
            self._loop.call_later(UPSTREAM_TAIL_S, self._cancel_upstream)

    def _tell(self, settlement: Settlement, action: Settle) -> None:
        assert self._exchange is not None
        chunks, chunk_s = action.facts["chunks"], None
        if chunks > 1 and self._first_byte_s is not None:
            chunk_s = max(0.0, self._last_write_s - self._first_byte_s) / (chunks - 1)
        try:
            self._report.ended(settlement, action.charge.counts, self._exchange.response_model, chunk_s)
        except Exception:
            # The books are what counts: nothing that is told about a request may keep it from being settled.
            logger.exception("nothing could be told of request %s", self._context.request_id)

    def _answer(self, answer: Respond | Fail | None) -> None:
        if not self.answered.done():
            self.answered.set_result(answer)
            if self._generation is not None:
                self._generation.answer(answer)

    def _cancel_upstream(self) -> None:
        if self._call is not None:
            self._call.cancel()

    # --- pauses ------------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def _resume(self) -> None:
        if self._call is not None and not self._credit_paused and not self._client_paused:
            self._call.resume()

    def _await_client(self) -> None:
        self._client_paused = True
        self._stall_timer = self._loop.call_later(self._gateway.settings.client_stall_s, self._on_stall)
        self._pause()

    def _on_client_resume(self) -> None:
        if not self._client_paused:
            return
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._client.paused:
            self._await_client()  # full anew with what it lacked: it reads, if slowly, so its time begins anew
            return
        self._client_paused = False
        self._resume()

    def _on_stall(self) -> None:
        logger.info(
            "request %s: the client read nothing for too long",
            self._context.request_id,
            extra={FIELDS: self._context.log_fields},
        )
        self._client.reset()
        self._on_client_gone()

    # --- what happens meanwhile --------------------------------------------------------------------------------

    def _on_client_gone(self) -> None:
        self._client_left = True
        if self._exchange is not None:
            left_s, was_called = time.monotonic(), self._call is not None and not self._upstream_done
            self._perform(self._exchange.client_gone(self._loop.time()))
            if was_called and self._exchange.phase is Phase.ENDED:
                self._report.client_left(time.monotonic() - left_s)
        self._answer(None)

    def _on_lingered(self) -> None:
        assert self._exchange is not None
        self._perform(self._exchange.lingered(self._loop.time()))
        self._cancel_upstream()

    def _on_credit(self, answer: Answer | LedgerError) -> None:
        try:
            self._take_credit(answer)
        except Exception:
            logger.exception("the ledger's answer could not be taken")
            self.on_broken()

    def _take_credit(self, answer: Answer | LedgerError) -> None:
        assert self._exchange is not None
        if not self._gateway.holder.lives:
            # Asked for while it lived, answered to a process that was stopped meanwhile: what was granted is gone.
            self._gateway.lose_all()
            return
        if isinstance(answer, Granted):
            self._granted_tokens += answer.output_tokens
            self._trace.granted(self._granted_tokens)
        self._perform(self._exchange.credit(None if isinstance(answer, LedgerError) else answer, self._loop.time()))

    def _keep_alive(self) -> None:
        every_s = self._gateway.settings.keep_alive_s
        due_s = self._last_write_s + every_s - self._loop.time()
        if due_s <= 0:
            if not self._client.paused:
                self._client.write(KEEP_ALIVE)
                self._last_write_s = self._loop.time()
            due_s = every_s
        self._timer = self._loop.call_later(due_s, self._keep_alive)
