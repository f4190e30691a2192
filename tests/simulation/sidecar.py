"""A sidecar of a simulated world: the real gateway, conducts, exchanges, desk, writer and holder, on a virtual loop."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar, cast

import msgspec

from behest_ledger.holds import Admission, Granted
from behest_ledger.leases import LeasePolicy
from behest_ledger.store import holds
from behest_ledger.store.admissions import AdmissionDesk
from behest_ledger.store.credit import CreditDesk
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.writer import SettlementWriter
from behest_ledger.telemetry.settings import TelemetrySettings
from behest_ledger.token_counts import TokenCounts
from behest_proxy.app.conduct import Conduct
from behest_proxy.app.context import RequestContext
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.holder import Holder
from behest_proxy.app.leasing import Leasing
from behest_proxy.app.settings import Settings
from behest_proxy.app.telemetry import Telemetry
from behest_proxy.errors import ShownError
from behest_proxy.exchange import Exchange
from behest_proxy.holding import HoldPlan, limit_for, plan
from behest_proxy.terms import Terms
from behest_proxy.upstream import UpstreamRequest
from behest_proxy.upstream.moderation import Moderation
from ledger.books import TENANT
from simulation.client import Client
from simulation.database import Database, Pool
from simulation.plan import TTL_S
from simulation.provider import Upstream
from simulation.remembered import Disk, SimulatedMemory
from simulation.request import Asked
from simulation.world import Process

T = TypeVar("T")

EAGERNESS = 20
"""A grant counts as so many more."""

SETTINGS = Settings(
    database_url="",
    signing_key_file=Path(),
    keep_alive_s=15.0,
    client_stall_s=3.0,
    drain_s=1.0,
    name="pod",
    holder_ttl_s=TTL_S,
)


class Ordered(set[T], Generic[T]):
    """A set that is walked in the order in which things came into it: a run is the same each time."""

    def __init__(self) -> None:
        self._order: dict[T, None] = {}
        super().__init__()

    def add(self, element: T) -> None:
        super().add(element)
        self._order[element] = None

    def discard(self, element: object) -> None:
        super().discard(element)
        self._order.pop(cast(T, element), None)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._order))


class _Eager(LeasePolicy):
    """Finds windows busy in which little happens: here a world is small."""

    def granted(self, tenant_id: str, windows: Collection[tuple[int, int]], now_s: float) -> None:
        super().granted(tenant_id, windows, now_s)
        for _ in range(EAGERNESS):
            super().granted(tenant_id, [(window_id, 0) for window_id, _ in windows], now_s)


class EagerLeasing(Leasing):
    """The real one, with that policy."""

    def __init__(self) -> None:
        super().__init__()
        self._policy = _Eager()


class Parts:
    """The classes that a sidecar is made of: mutants replace one of them."""

    conduct: type[Conduct] = Conduct
    exchange: type[Exchange] = Exchange
    desk: type[CreditDesk] = CreditDesk
    writer: type[SettlementWriter] = SettlementWriter
    holder: type[Holder] = Holder
    memory: type[SimulatedMemory] = SimulatedMemory
    leasing: type[Leasing] = EagerLeasing


class SimulatedGateway(Gateway):
    """The real gateway, whose ledger, providers and configuration are the world's."""

    def __init__(self, process: Process, database: Database, disk: Disk, asked: dict[str, Asked], parts: Parts) -> None:
        self.process = process
        self.database = database
        self.parts = parts
        self.settings = SETTINGS
        self.leasing = parts.leasing()
        self.holder = parts.holder(
            name=process.name,
            on_lost=self.lose_all,
            checkpoints=self._checkpoints,
            on_busy=self._checkpoint_again,
            lease=self.leasing.renew,
            ttl_s=SETTINGS.holder_ttl_s,
            clock_s=process.boot_time_s,
            new_id=process.world.new_id,
        )
        self.moderation = Moderation()
        self.upstream: Any = Upstream(process, asked)
        self.configuration: Any = _Configuration()
        self.api_keys: Any = _Nothing()
        self.pool = None
        self.book = None
        self.admissions = AdmissionDesk(self._admit)
        self._prices_change = None
        self.desk = parts.desk(self._extend)
        self.writer = parts.writer(self._settle, on_settled=self._on_settled)
        self.live = Ordered()
        self.memory = parts.memory(disk, process)
        self.signing_keys: Any = None
        self.mounted: Any = _Nothing()
        self.issuer_keys: Any = _Nothing()
        self.draining = self.leaving = False
        self.is_serving = False
        self._poll_task = self._memory_task = self._holder_task = self._replies_task = None
        self.replies: Any = _Nothing()
        self.replies_pool = None
        self.telemetry = Telemetry(TelemetrySettings(), name=process.name)
        self._tasks = Ordered()
        self._clock_s = process.time
        self._ledger_heard_s = 0.0
        self.on_stopped: Callable[[], None] = lambda: None

    async def run(self) -> None:
        """Start, as the process does. Where the ledger is away it ends at once, and is started again."""
        try:
            await self.start()
        except LedgerError:
            self.process.exit()
            self.on_stopped()
            return
        self.is_serving = True

    async def stop(self) -> None:
        """SIGTERM."""
        self.is_serving = False
        await self.drain()
        await self.aclose()
        self.process.exit()
        self.on_stopped()

    async def _open(self) -> None:
        self.pool = Pool(self.database, self.process)
        await self._load()

    async def _load(self) -> None:
        version = self.database.version
        suspended = await holds.suspended_requests(self.pool, [conduct.admission for conduct in self.live])
        self.configuration.version = version
        self._heard()
        for conduct in list(self.live):
            self._stop_suspended(conduct, suspended.get(conduct.admission.request_id))
        self.desk.limits_changed()

    def serve(self, asked: Asked) -> None:
        """What the chat endpoint does with a request that it understood."""
        asked.begun = True
        hold = plan(asked.request, asked.facts, asked.rates, asked.input)
        admission = Admission(
            tenant_id=TENANT,
            request_id=asked.request_id,
            holder_id=self.holder.holder_id,
            attributes=asked.attributes(),
            price_key=asked.rates.price_key,
            input_tokens=hold.input_tokens,
            input_amount_pico=hold.input_amount_pico,
            output_rate_pico=hold.output_rate_pico,
            need_tokens=hold.need_tokens,
            want_tokens=hold.want_tokens,
            shares=hold.shares,
        )
        counts = TokenCounts(input=asked.input.best_tokens)
        try:
            trace = self.memory.begin(admission, input_counts=counts, rates=asked.rates)
        except ShownError:
            asked.ended = asked.refused_here = True
            return
        context = RequestContext(())
        context.request_id, context.trace_id = asked.request_id, b"0"
        client: Any = Client(self.process, asked, self._may_spend)
        conduct = self.parts.conduct(
            self,
            admission=admission,
            rates=asked.rates,
            trace=trace,
            exchange=lambda grant: self._exchange_of(asked, hold, counts, grant),
            upstream_request=lambda grant: _upstream_request(asked, hold, grant),
            client=client,
            context=context,
        )
        conduct.answered.add_done_callback(lambda _: setattr(asked, "ended", True))
        self.conduct(conduct)

    def _may_spend(self) -> bool:
        row = self.database.ledger.holders.get(self.holder.holder_id)
        return row is not None and row.fenced_at is None

    def _exchange_of(self, asked: Asked, hold: HoldPlan, counts: TokenCounts, grant: Granted | None) -> Exchange:
        granted = grant.output_tokens if grant is not None else hold.want_tokens
        limit = limit_for(hold, granted_tokens=granted, choices=1)
        return self.parts.exchange(
            Terms(
                streamed=asked.request.stream,
                include_usage=asked.request.include_usage,
                choices=1,
                input_bound_tokens=hold.input_tokens,
                input_counts=counts,
                count=len,
                ratio=asked.ratio,
                amount_pico=asked.rates.amount_pico,
                metered=hold.metered,
                clamp_tokens=limit.send_tokens if limit.lowered_by_budget else None,
                cap_tokens=limit.cap_tokens,
            )
        )


def _upstream_request(asked: Asked, hold: HoldPlan, grant: Granted) -> UpstreamRequest:
    limit = limit_for(hold, granted_tokens=grant.output_tokens, choices=1)
    told = limit.send_tokens if limit.send_tokens is not None else asked.request.output_limit_tokens
    body = msgspec.json.encode([str(asked.request_id), told, limit.cap_tokens])
    return UpstreamRequest(method="POST", url="http://provider/", headers=[], body=body)


class _Configuration:
    """One project, which is never suspended; what is, is a budget."""

    version = 0
    _project = SimpleNamespace(suspended=False)

    def project(self, _tenant: str, _project: str) -> Any:
        return self._project


class _Nothing:
    def clear(self) -> None: ...

    async def reread(self, *_: object) -> None: ...

    async def run(self, *_: object) -> None: ...

    async def flush(self, *_: object) -> None: ...

    async def aclose(self) -> None: ...
