"""What this sidecar tells of its requests: metrics, spans, one line a request. All of it when something has ended.

While a stream runs nothing is told and nothing is added up: a request leaves a handful of times on its way, and at its
end they become what `behest_ledger.telemetry.names` lists. Never what a user wrote, or what a model answered.
"""

import asyncio
import contextlib
import importlib.metadata
import re
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

from starlette.routing import compile_path

from behest_ledger.charging import Outcome
from behest_ledger.holds import Admission
from behest_ledger.store.holds import Settled
from behest_ledger.telemetry import names
from behest_ledger.telemetry.meter import BoundedValues, Key, Meter
from behest_ledger.telemetry.settings import TelemetrySettings
from behest_proxy.app.context import RequestContext
from behest_proxy.app.report import CallReport

if TYPE_CHECKING:
    from behest_ledger.telemetry.otlp import Push
    from behest_ledger.telemetry.spans import Spans

UNSETTLED_MAX = 20_000
"""Requests whose project is remembered until the ledger has settled them."""
_METHODS = frozenset({"GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT", "PATCH"})


class Telemetry:
    """One for the process."""

    def __init__(self, settings: TelemetrySettings, *, name: str) -> None:
        """`name` is what this process calls itself."""
        self.meter = Meter()
        counter, histogram = self.meter.counter, self.meter.histogram
        self.token_usage = histogram(names.TOKEN_USAGE)
        self.duration = histogram(names.DURATION)
        self.first_chunk = histogram(names.FIRST_CHUNK)
        self.per_chunk = histogram(names.PER_CHUNK)
        self.input_tokens = counter(names.INPUT_TOKENS)
        self.output_tokens = counter(names.OUTPUT_TOKENS)
        self.cache_read_tokens = counter(names.CACHE_READ_TOKENS)
        self.cache_write_tokens = counter(names.CACHE_WRITE_TOKENS)
        self.reasoning_tokens = counter(names.REASONING_TOKENS)
        self.cost = counter(names.COST)
        self.outcomes = counter(names.OUTCOMES)
        self.released = counter(names.RELEASED)
        self.refusals = counter(names.REFUSALS)
        self.overhead = histogram(names.OVERHEAD)
        self.cancel_latency = histogram(names.CANCEL_LATENCY)
        self.admission_latency = histogram(names.ADMISSION_LATENCY)
        self.connections_refused = counter(names.CONNECTIONS_REFUSED)
        self._overrun = counter(names.OVERRUN)
        self._commit_latency = histogram(names.COMMIT_LATENCY)
        self._batch_size = histogram(names.BATCH_SIZE)
        self.bounded = {attribute: BoundedValues() for attribute in names.ATTRIBUTES}
        self._servers: dict[str, tuple[str, str]] = {}
        self._projects: dict[UUID, str] = {}
        self._paths: frozenset[str] = frozenset()
        self._templates: list[tuple[re.Pattern[str], str]] = []
        self._push_task: asyncio.Task[None] | None = None
        self._push: Push | None = None
        self.spans: Spans | None = None
        if settings.traces is not None or settings.metrics is not None:
            # Loaded only here: a sidecar that pushes nothing pays for none of it.
            from behest_ledger.telemetry import otlp, spans

            version = importlib.metadata.version("behest-sidecar")
            described = otlp.resource({"service.version": version, "service.instance.id": name})
            self._push = otlp.Push(settings, self.meter, described, version)
            self.spans = spans.Spans(self._push) if self._push.takes_spans else None

    def start(self) -> None:
        """Begin to push, if anything is."""
        if self._push is not None:
            self._push_task = asyncio.create_task(self._push.run(), name="telemetry")

    async def aclose(self) -> None:
        """Push what is left."""
        if self._push_task is not None:
            self._push_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._push_task
        if self._push is not None:
            await self._push.aclose()
            self._push = self.spans = None

    def watch(
        self, *, live: Callable[[], list[Admission]], backlog: Callable[[], int], lag_s: Callable[[], float]
    ) -> None:
        """What runs and what waits, whenever somebody asks."""

        def active() -> Mapping[Key, float]:
            project, model = self.bounded[names.PROJECT], self.bounded[names.REQUEST_MODEL]
            return Tally(
                (project(item.attributes.get("project")), model(item.attributes.get("model"))) for item in live()
            )

        self.meter.gauge(names.STREAMS_ACTIVE, active)
        self.meter.gauge(names.BACKLOG, lambda: {(): float(backlog())})
        self.meter.gauge(names.JOURNAL_LAG, lambda: {(): lag_s()})

    def know_routes(self, paths: Iterable[str]) -> None:
        """The routes that there are, such as `/v1/threads/{thread_id}`: of another path nobody is told its text."""
        self._paths = frozenset(paths)
        self._templates = [(compile_path(path)[0], path) for path in self._paths if "{" in path]

    def route_of(self, path: str) -> str:
        """The route of a path; empty: there is none."""
        if path in self._paths:
            return path
        return next((template for pattern, template in self._templates if pattern.match(path)), "")

    # --- requests ----------------------------------------------------------------------------------------------

    def arrived(self, context: RequestContext) -> None:
        """A request is here: decide whether its trace is told of."""
        if self.spans is not None:
            parent = (int(context.parent_id, 16), context.sampled) if context.parent_id else None
            context.sampled = self.spans.is_sampled(int(context.trace_id, 16), "request", parent)

    def begin(
        self, context: RequestContext, admission: Admission, *, provider: str, base_url: str, streamed: bool
    ) -> CallReport:
        """A request that is about to be admitted."""
        address, port = self._server(base_url)
        return CallReport(
            self, context, admission, provider=provider, server_address=address, server_port=port, streamed=streamed
        )

    def answered(self, context: RequestContext, scope: Mapping[str, Any]) -> None:
        """A request of whatever kind is over: the SERVER span."""
        if self.spans is None or not context.sampled:
            return
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        attributes: dict[str, Any] = {
            names.HTTP_METHOD: method,
            names.URL_SCHEME: scope.get("scheme", "http"),
            names.REQUEST_ID: str(context.request_id),
            **context.told,
        }
        if context.status:
            attributes[names.HTTP_STATUS] = context.status
        left = context.told.get(names.ERROR_TYPE) == Outcome.CLIENT_CANCELLED
        failed = context.status >= 500 or not (context.status or left)
        if failed:
            attributes.setdefault(names.ERROR_TYPE, str(context.status or "aborted"))
        route = self.route_of(scope["path"])
        if route:
            attributes[names.HTTP_ROUTE] = route
        self.spans.ended(
            self.spans.Ended(
                f"{method} {route}" if route else method,
                is_client=False,
                trace_id=int(context.trace_id, 16),
                span_id=int(context.span_id, 16),
                parent_id=int(context.parent_id, 16) if context.parent_id else None,
                parent_is_remote=True,
                trace_state=context.trace_state.decode("ascii"),
                started_ns=context.arrived_ns,
                ended_ns=time.time_ns(),
                attributes=attributes,
                failed=failed,
            )
        )

    def _server(self, base_url: str) -> tuple[str, str]:
        """Host and port of a provider; of so many different ones as are told."""
        found = self._servers.get(base_url)
        if found is None:
            parts = urlsplit(base_url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            found = (parts.hostname or "", str(port))
            if len(self._servers) < names.VALUES_MAX:
                self._servers[base_url] = found
        return found

    # --- the ledger --------------------------------------------------------------------------------------------

    def ledger_called(self, operation: str, *, items: int, seconds: float) -> None:
        """One call that moved money came back."""
        self._batch_size.record((operation,), items)
        self._commit_latency.record((operation,), seconds)

    def submitted(self, request_id: UUID, project: str) -> None:
        """A settlement is on its way: whose, for if it passes what the budget could pay."""
        if len(self._projects) < UNSETTLED_MAX:
            self._projects[request_id] = project

    def settled(self, settled: Settled) -> None:
        """The ledger has a settlement."""
        project = self._projects.pop(settled.request_id, "")
        if settled.overrun:
            self._overrun.add((project,))

    def put_aside(self, request_id: UUID) -> None:
        """The ledger refuses a settlement."""
        self._projects.pop(request_id, None)
