"""One request's report: the times that it leaves on its way, and what is told of it at its end."""

import logging
import time
from typing import TYPE_CHECKING, Any, Protocol

from behest_ledger.charging import Outcome
from behest_ledger.holds import Admission, Refused, Settlement
from behest_ledger.money import usd_from_pico
from behest_ledger.telemetry import names
from behest_ledger.telemetry.logs import FIELDS
from behest_ledger.telemetry.meter import Key, tellable
from behest_ledger.token_counts import TokenCounts
from behest_proxy.app.context import RequestContext

if TYPE_CHECKING:
    from behest_proxy.app.telemetry import Telemetry

logger = logging.getLogger(__name__)

ID_CHARS_MAX = 256
"""Of a user's or session's id, on a span."""
_FAILED = frozenset(
    {Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_TIMEOUT, Outcome.LEDGER_UNAVAILABLE, Outcome.CRASHED, Outcome.REFUSED}
)
"""Outcomes that are errors of a span: the others are what somebody wanted."""


class Report(Protocol):
    """What a request tells while it runs: each at most once, none for a chunk."""

    def called(self) -> None:
        """The call to the provider begins."""
        ...

    def first_byte(self) -> None:
        """The first bytes of the provider's answer are here."""
        ...

    def handed_over(self) -> None:
        """What came first has gone to the client's connection."""
        ...

    def client_left(self, seconds: float) -> None:
        """The client left, and it took so long to stop the provider."""
        ...

    def refused(self, answer: Refused) -> None:
        """The ledger did not admit it."""
        ...

    def ended(self, settlement: Settlement, counts: TokenCounts, model: str, chunk_s: float | None) -> None:
        """It is over. `model` is what the provider says it used, `chunk_s` the mean time between two chunks."""
        ...


class NoReport:
    """Tells nothing."""

    def called(self) -> None:
        """See `Report`."""

    def first_byte(self) -> None:
        """See `Report`."""

    def handed_over(self) -> None:
        """See `Report`."""

    def client_left(self, seconds: float) -> None:
        """See `Report`."""

    def refused(self, answer: Refused) -> None:
        """See `Report`."""

    def ended(self, settlement: Settlement, counts: TokenCounts, model: str, chunk_s: float | None) -> None:
        """See `Report`."""


class CallReport:
    """The report of one call to a model."""

    __slots__ = (
        "_admission",
        "_attribution",
        "_called_s",
        "_context",
        "_first_byte_s",
        "_handed_over_s",
        "_model",
        "_provider",
        "_server",
        "_streamed",
        "_telemetry",
    )

    def __init__(
        self,
        telemetry: "Telemetry",
        context: RequestContext,
        admission: Admission,
        *,
        provider: str,
        server_address: str,
        server_port: str,
        streamed: bool,
    ) -> None:
        self._telemetry = telemetry
        self._context = context
        self._admission = admission
        self._streamed = streamed
        self._called_s = self._first_byte_s = self._handed_over_s = 0.0
        bounded, attributes = telemetry.bounded, admission.attributes
        workload = attributes.get("workload", "")
        project = bounded[names.PROJECT](attributes.get("project"))
        self._attribution: Key = (
            project,
            bounded[names.NAMESPACE](workload.partition("/")[0] or attributes.get("namespace")),
            bounded[names.WORKLOAD](workload),
            bounded[names.TEAM](attributes.get("team")),
            bounded[names.COST_CENTER](attributes.get("cost_center")),
        )
        self._provider = bounded[names.PROVIDER](names.PROVIDER_NAMES.get(provider, provider))
        self._model = bounded[names.REQUEST_MODEL](attributes.get("model"))
        self._server: Key = (bounded[names.SERVER_ADDRESS](server_address), bounded[names.SERVER_PORT](server_port))
        context.told = {
            names.PROJECT: project,
            names.ENDUSER_ID: tellable(attributes.get("user", ""), ID_CHARS_MAX),
            names.CONVERSATION_ID: tellable(attributes.get("session", ""), ID_CHARS_MAX),
        }

    def called(self) -> None:
        """See `Report`."""
        self._called_s = time.monotonic()

    def first_byte(self) -> None:
        """See `Report`."""
        self._first_byte_s = time.monotonic()

    def handed_over(self) -> None:
        """See `Report`."""
        self._handed_over_s = time.monotonic()

    def client_left(self, seconds: float) -> None:
        """See `Report`."""
        self._telemetry.cancel_latency.record((self._provider, self._server[0]), seconds)

    def refused(self, answer: Refused) -> None:
        """See `Report`."""
        self._telemetry.refusals.add((*self._attribution, answer.reason))
        if logger.isEnabledFor(logging.INFO):
            fields = {**self._fields(), "reason": answer.reason, "budget": answer.budget or answer.name}
            logger.info(
                "request %s was not admitted: %s", self._context.request_id, answer.reason, extra={FIELDS: fields}
            )

    def ended(self, settlement: Settlement, counts: TokenCounts, model: str, chunk_s: float | None) -> None:
        """See `Report`."""
        now_s, context, telemetry = time.monotonic(), self._context, self._telemetry
        outcome = settlement.outcome
        error = "" if outcome is Outcome.COMPLETED else str(outcome)
        spent: Key = (*self._attribution, self._provider, self._model)
        telemetry.outcomes.add((*spent, outcome))
        telemetry.cost.add((*spent, outcome), settlement.amount_pico)
        if outcome is Outcome.CLIENT_CANCELLED:
            telemetry.released.add(spent, max(0, self._held_pico(settlement) - settlement.amount_pico))
        telemetry.submitted(settlement.request_id, self._attribution[0])
        if error:
            context.told[names.ERROR_TYPE] = error
        if self._called_s:
            self._called(settlement, counts, model, chunk_s, error, now_s)
        if logger.isEnabledFor(logging.INFO):
            cost_usd = usd_from_pico(settlement.amount_pico)
            fields = {
                **self._fields(),
                "outcome": outcome,
                "source": settlement.source,
                "input_tokens": settlement.input_tokens,
                "output_tokens": settlement.output_tokens,
                "cost_usd": cost_usd,
                "duration_ms": round((now_s - context.arrived_s) * 1000),
            }
            logger.info("request %s ended: %s", context.request_id, outcome, extra={FIELDS: fields})

    def _called(
        self,
        settlement: Settlement,
        counts: TokenCounts,
        model: str,
        chunk_s: float | None,
        error: str,
        now_s: float,
    ) -> None:
        """The metrics of the call to the provider, and its CLIENT span."""
        context, telemetry = self._context, self._telemetry
        answered = telemetry.bounded[names.RESPONSE_MODEL](model)
        call: Key = (*self._attribution, "chat", self._provider, self._model, answered, *self._server)
        now_ns = time.time_ns()
        span = None
        if telemetry.spans is not None and context.sampled:
            span = (now_ns, int(context.trace_id, 16), int(context.call_span_id, 16))
        telemetry.duration.record((*call, error), now_s - self._called_s, span)
        telemetry.token_usage.record((*call, "input"), counts.input_tokens, span)
        telemetry.token_usage.record((*call, "output"), counts.output_tokens, span)
        telemetry.input_tokens.add(call, counts.input_tokens)
        telemetry.output_tokens.add(call, counts.output_tokens)
        if counts.cache_read:
            telemetry.cache_read_tokens.add(call, counts.cache_read)
        if counts.cache_write:
            telemetry.cache_write_tokens.add(call, counts.cache_write)
        if counts.reasoning:
            telemetry.reasoning_tokens.add(call, counts.reasoning)
        if self._first_byte_s:
            if self._streamed:
                telemetry.first_chunk.record(call, self._first_byte_s - self._called_s, span)
                if chunk_s is not None:
                    telemetry.per_chunk.record(call, chunk_s, span)
            added_s = self._called_s - context.arrived_s
            if self._handed_over_s:
                added_s += self._handed_over_s - self._first_byte_s
            telemetry.overhead.record((self._attribution[0],), added_s, span)
        if span is not None:
            self._tell_span(settlement, counts, model, now_ns - round((now_s - self._called_s) * 1e9), now_ns)

    def _tell_span(
        self, settlement: Settlement, counts: TokenCounts, model: str, started_ns: int, ended_ns: int
    ) -> None:
        context, spans = self._context, self._telemetry.spans
        assert spans is not None
        attributes: dict[str, Any] = {
            names.GEN_AI_OPERATION: "chat",
            names.PROVIDER: self._provider,
            names.REQUEST_MODEL: self._model,
            names.SERVER_ADDRESS: self._server[0],
            names.SERVER_PORT: int(self._server[1]),
            names.REQUEST_STREAM: self._streamed,
            names.USAGE_INPUT: counts.input_tokens,
            names.USAGE_OUTPUT: counts.output_tokens,
            names.FINISH_REASONS: settlement.facts.get("finish_reasons", []),
            names.CHUNKS: settlement.facts.get("chunks", 0),
            names.REQUEST_ID: str(context.request_id),
            names.COST_USD: usd_from_pico(settlement.amount_pico),
            names.SOURCE: settlement.source,
            names.OUTCOME: str(settlement.outcome),
            **context.told,
        }
        if model:
            attributes[names.RESPONSE_MODEL] = tellable(model)
        if self._first_byte_s and self._streamed:
            attributes[names.TIME_TO_FIRST_CHUNK] = self._first_byte_s - self._called_s
        classes = {
            names.USAGE_CACHE_READ: counts.cache_read,
            names.USAGE_CACHE_WRITE: counts.cache_write,
            names.USAGE_REASONING: counts.reasoning,
        }
        attributes |= {name: count for name, count in classes.items() if count}
        spans.ended(
            spans.Ended(
                f"chat {self._model}",
                is_client=True,
                trace_id=int(context.trace_id, 16),
                span_id=int(context.call_span_id, 16),
                parent_id=int(context.span_id, 16),
                parent_is_remote=False,
                trace_state=context.trace_state.decode("ascii"),
                started_ns=started_ns,
                ended_ns=ended_ns,
                attributes=attributes,
                failed=settlement.outcome in _FAILED,
            )
        )

    def _held_pico(self, settlement: Settlement) -> int:
        """What was on hold when it ended, in the worst case that the hold was for."""
        tokens = settlement.facts.get("held_output_tokens", 0)
        return self._admission.input_amount_pico + int(tokens) * self._admission.output_rate_pico

    def _fields(self) -> dict[str, Any]:
        attributes = self._admission.attributes
        return {
            **self._context.log_fields,
            "tenant": self._admission.tenant_id,
            "project": attributes.get("project"),
            "user": attributes.get("user"),
            "session": attributes.get("session"),
            "model": attributes.get("model"),
        }
