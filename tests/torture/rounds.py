"""One round of torture after the other: let everything happen, wait until all is settled, and look."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

import asyncpg
import msgspec

from behest_ledger.charging import Outcome
from behest_ledger.holds import Settlement, UsageLine
from behest_ledger.request_id import request_id
from behest_ledger.store.configuration import apply_text
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.holds import settle
from behest_ledger.store.pool import connect
from behest_ledger.store.verify import verify
from torture.client import StreamEnd, run_client
from torture.cluster import TENANT, Cluster
from torture.judge import Ceilings, Charged, Figures, judge_streams, judge_windows
from torture.plan import Fault, LimitChange, RoundPlan, Scale, Stop, StreamPlan, Suspension
from torture.wires import Http2Pool

DRAIN_S = 60.0
SAMPLE_S = 0.05
AGAIN_MAX = 50
"""Settlements that are sent once more after a round."""
_DOWN = (
    LedgerError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

_WINDOWS = """
SELECT split_part(budget_id, '/', 2) AS budget, coalesce(subject #>> '{0,2}', '') AS subject, window_id,
       limit_amount::text, ceiling::text, spent::text, held::text, suspense::text, overrun::text
FROM ledger.budget_window WHERE tenant_id = $1 AND ceiling IS NOT NULL
"""
# What is free in a lease is held by nobody.
# What the keeper charged by policy is corrected by the journal of the sidecar, which came back.
_UNSETTLED = """
SELECT (SELECT count(*) FROM ledger.hold WHERE state IN ('open', 'suspense', 'charged_by_policy'))
     + (SELECT count(*) FROM ledger.budget_window w,
            LATERAL (SELECT coalesce(sum(l.free), 0) AS free, coalesce(sum(l.new_live), 0) AS live FROM ledger.lease l
                     WHERE l.tenant_id = w.tenant_id AND l.window_id = w.window_id) AS leased
        WHERE w.held - leased.free + w.suspense > 0 OR w.live + leased.live > 0) AS number
"""
# Without what is held: a lease may end at any moment.
_SPENT = """
SELECT window_id, spent::text, overrun::text FROM ledger.budget_window WHERE tenant_id = $1 ORDER BY window_id
"""
_ROWS = """
SELECT request_id::text, session_id, outcome, source, output_tokens, amount_pico::text
FROM ledger.request_now WHERE tenant_id = $1 AND request_id >= $2::text::uuid
"""
_SUMS = """
SELECT session_id, count(*) AS rows, count(DISTINCT request_id) AS requests, sum(amount_pico)::text AS amount_pico
FROM ledger.request_now WHERE tenant_id = $1 GROUP BY session_id
"""
_CHARGES = """
SELECT r.request_id, r.outcome, r.source, r.input_tokens, r.output_tokens, r.amount_pico::text,
       (SELECT jsonb_agg(jsonb_build_object('class', u.class, 'quantity', u.quantity, 'rate_pico', u.rate_pico,
                                            'amount_pico', u.amount_pico, 'source', u.source))::text
        FROM ledger.usage_line u
        WHERE u.tenant_id = r.tenant_id AND u.month = r.month AND u.request_id = r.request_id AND u.entry = 0) AS lines
FROM ledger.request r WHERE r.tenant_id = $1 AND r.request_id >= $2::text::uuid AND r.amount_pico > 0
"""
_BUDGETS = f"""
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: sessions, namespace: {TENANT}}}
spec:
  scope: {{project: app}}
  per: [session]
  limit: {{amount: "%s", currency: USD}}
  window: {{period: Lifetime}}
  suspended: %s
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: project, namespace: {TENANT}}}
spec:
  scope: {{project: app}}
  limit: {{amount: "%s", currency: USD}}
  window: {{period: Lifetime}}
  suspended: %s
"""


@dataclass(kw_only=True)
class RoundEnd:
    """What came out of one round."""

    findings: list[str]
    figures: Figures
    events: list[str]
    """What was done to the system, in its order."""
    took_s: float


@dataclass(kw_only=True)
class Torture:
    """The rounds of one run, on one ledger."""

    cluster: Cluster
    scale: Scale
    ceilings: Ceilings = field(default_factory=Ceilings)
    _sessions: int = 0
    _limits: dict[str, str] = field(default_factory=dict[str, str])
    _suspended: dict[str, bool] = field(default_factory=lambda: {"sessions": False, "project": False})
    _pool: Http2Pool = field(default_factory=Http2Pool)
    spent_usd: float = 0.0
    """What the project has spent so far."""
    _session_usd: float = 0.0
    """What its latest session has spent so far: one that is used up makes a dull round."""

    async def round(self, plan: RoundPlan) -> RoundEnd:
        """Run it, wait, and look. Raises `AssertionError` where something does not come back at all."""
        began_s = time.monotonic()
        end = RoundEnd(findings=[], figures=Figures(), events=[], took_s=0.0)
        # The least request id of this millisecond: all of this round are greater.
        first_id = str(request_id(time.time_ns() // 1_000_000, 0))
        session, token = await self._begin(plan)
        watch = asyncio.create_task(self._watch(end))
        ends: list[StreamEnd] = []
        try:
            async with asyncio.TaskGroup() as group:
                zero_s = time.monotonic()
                clients = [group.create_task(self._client(stream, zero_s, token)) for stream in plan.streams]
                for stop in plan.stops:
                    group.create_task(self._stop(stop, zero_s, end))
                for fault in plan.faults:
                    group.create_task(self._fault(fault, zero_s, end))
                for change in plan.limits:
                    group.create_task(self._change(change, zero_s, end))
                for suspension in plan.suspensions:
                    group.create_task(self._suspend(suspension, zero_s, end))
            ends = [client.result() for client in clients]
            await self._drained(end, ends, first_id)
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError, *_DOWN):
                await watch
        await self._look(end, ends, session, first_id)
        await self._settle_again(end, first_id)
        end.took_s = time.monotonic() - began_s
        return end

    def close(self) -> None:
        """Break what clients still have open."""
        self._pool.close()

    # --- what happens ------------------------------------------------------------------------------------------

    async def _begin(self, plan: RoundPlan) -> tuple[str, str]:
        usd = self.scale.session_limit_usd
        self._suspended = dict.fromkeys(self._suspended, False)
        await self._set_limits(sessions=f"{usd:.6f}", project=f"{self.spent_usd + plan.project_usd:.6f}")
        self.ceilings.begin("project", "")
        if plan.new_session or not self._sessions or self._session_usd > usd / 2:
            self._sessions += 1
        session = f"s{self._sessions}"
        self.ceilings.begin("sessions", session)
        return session, await self.cluster.mint(session)

    async def _set_limits(self, **limits: str) -> None:
        for budget, limit in limits.items():
            self._limits[budget] = limit
            self.ceilings.set_limit(budget, int(limit.replace(".", "")) * 10**6)
        await self._apply()

    async def _apply(self) -> None:
        told = [
            (self._limits[budget], "true" if self._suspended[budget] else "false") for budget in ("sessions", "project")
        ]
        text = _BUDGETS % (*told[0], *told[1])
        await apply_text(self.cluster.database.dsn, text, default_namespace=TENANT)

    async def _client(self, plan: StreamPlan, zero_s: float, token: str) -> StreamEnd:
        await asyncio.sleep(max(0.0, zero_s + plan.at_s - time.monotonic()))
        port = self.cluster.sidecars[plan.sidecar].port
        return await run_client(plan, port=port, token=token, pool=self._pool)

    async def _stop(self, stop: Stop, zero_s: float, end: RoundEnd) -> None:
        await asyncio.sleep(max(0.0, zero_s + stop.at_s - time.monotonic()))

        def told(whom: str) -> None:
            end.events.append(f"{stop.how} {whom} at {time.monotonic() - zero_s:.2f} s for {stop.down_s:.1f} s")

        if stop.whom == "postgres":
            database = self.cluster.database
            async with database.lock:
                told("PostgreSQL")
                if stop.how in ("fast", "immediate"):
                    await asyncio.to_thread(database.shut_down, stop.how)
                else:
                    await asyncio.to_thread(database.kill)
                await asyncio.sleep(stop.down_s)
                await asyncio.to_thread(database.start)
            return
        if stop.whom == "keeper":
            told("keeper")
            self.cluster.keeper.kill()
            await asyncio.sleep(stop.down_s)
            self.cluster.keeper.start()
            return
        sidecar = self.cluster.sidecars[stop.whom]
        async with sidecar.lock:
            told(f"sidecar {sidecar.number}")
            if stop.how == "term":
                await sidecar.drain()
            else:
                sidecar.kill()
            await asyncio.sleep(stop.down_s)
            await sidecar.start()

    async def _fault(self, fault: Fault, zero_s: float, end: RoundEnd) -> None:
        await asyncio.sleep(max(0.0, zero_s + fault.at_s - time.monotonic()))
        what = f"{fault.what} {fault.statement}" if fault.what in ("lost", "late") else fault.what
        end.events.append(f"wire of {fault.sidecar}: {what} at {time.monotonic() - zero_s:.2f} s")
        wire = self.cluster.sidecars[fault.sidecar].wire
        if fault.what == "cut":
            wire.cut()
        elif fault.what == "stall":
            wire.stall()
            await asyncio.sleep(fault.for_s)
            wire.back()
        else:
            wire.spoil(fault.statement, fault.what)
            await asyncio.sleep(fault.for_s)
            wire.let_late_ones_through()

    async def _suspend(self, suspension: Suspension, zero_s: float, end: RoundEnd) -> None:
        await asyncio.sleep(max(0.0, zero_s + suspension.at_s - time.monotonic()))
        end.events.append(f"{suspension.budget} suspended at {time.monotonic() - zero_s:.2f} s")
        with contextlib.suppress(*_DOWN):
            self._suspended[suspension.budget] = True
            await self._apply()
            await asyncio.sleep(suspension.for_s)
        self._suspended[suspension.budget] = False
        with contextlib.suppress(*_DOWN):
            await self._apply()

    async def _change(self, change: LimitChange, zero_s: float, end: RoundEnd) -> None:
        await asyncio.sleep(max(0.0, zero_s + change.at_s - time.monotonic()))
        usd = change.limit_usd + (self.spent_usd if change.budget == "project" else 0.0)
        end.events.append(f"limit of {change.budget} {usd:.4f} at {time.monotonic() - zero_s:.2f} s")
        with contextlib.suppress(*_DOWN):
            await self._set_limits(**{change.budget: f"{usd:.6f}"})

    async def _watch(self, end: RoundEnd) -> None:
        """Look at the windows all the time: a ceiling that is passed for a moment is passed."""
        while True:
            with contextlib.suppress(*_DOWN):
                connection = await connect(self.cluster.database.dsn)
                try:
                    while True:
                        windows = await connection.fetch(_WINDOWS, TENANT, timeout=5)
                        end.findings += judge_windows(windows, self.ceilings, end.figures)
                        end.figures.samples += 1
                        await asyncio.sleep(SAMPLE_S)
                finally:
                    connection.terminate()
            await asyncio.sleep(SAMPLE_S)

    # --- what must be true afterwards --------------------------------------------------------------------------

    async def _drained(self, end: RoundEnd, ends: list[StreamEnd], first_id: str) -> None:
        begun = {one.request_id for one in ends if one.status == 200}
        deadline_s = time.monotonic() + DRAIN_S
        number, missing = -1, begun
        while time.monotonic() < deadline_s:
            with contextlib.suppress(*_DOWN):
                (row,) = await self.cluster.query(_UNSETTLED)
                number = row["number"]
                missing = begun - {row["request_id"] for row in await self.cluster.query(_ROWS, TENANT, first_id)}
                if not number and not missing:
                    return
            await asyncio.sleep(0.1)
        end.findings.append(f"after {DRAIN_S:.0f} s {number} are still held, {sorted(missing)} are not in the books")

    async def _look(self, end: RoundEnd, ends: list[StreamEnd], session: str, first_id: str) -> None:
        cluster = self.cluster
        found = await cluster.query(_ROWS, TENANT, first_id)
        rows = {row["request_id"]: Charged.of(row) for row in found}
        killed = {
            one.plan.number: cluster.sidecars[one.plan.sidecar].was_killed(one.began_s, one.ended_s) for one in ends
        }
        sim = [seen for seen in await cluster.sim_requests() if seen["path"].endswith("/chat/completions")]
        end.findings += judge_streams(ends, rows=rows, sim=sim, killed=killed, figures=end.figures)
        await self._add_up(end, session)
        connection = await connect(cluster.database.dsn)
        try:
            verdict = await verify(connection)
        finally:
            await connection.close()
        end.findings += [f"verify: {finding}" for finding in verdict.findings]
        for error, times in cluster.database.errors().items():
            if "check constraint" in error or "deadlock" in error:
                end.findings.append(f"PostgreSQL said {times} times: {error}")
        end.findings += [f"{line} ({times} times)" for line, times in cluster.sidecar_faults().items()]

    async def _add_up(self, end: RoundEnd, session: str) -> None:
        """Each window has spent what its requests cost, of all rounds."""
        sums = await self.cluster.query(_SUMS, TENANT)
        for row in sums:
            if row["rows"] != row["requests"]:
                end.findings.append(f"session {row['session_id']}: {row['rows']} rows of {row['requests']} requests")
        cost = {row["session_id"]: int(row["amount_pico"]) for row in sums}
        windows = await self.cluster.query(_WINDOWS, TENANT)
        end.findings += judge_windows(windows, self.ceilings, end.figures)
        for window in windows:
            charged = sum(cost.values()) if window["budget"] == "project" else cost.get(window["subject"], 0)
            if charged != int(window["spent"]):
                end.findings.append(f"the requests of {window} cost {charged}")
        self.spent_usd, self._session_usd = sum(cost.values()) / 10**12, cost.get(session, 0) / 10**12

    async def _settle_again(self, end: RoundEnd, first_id: str) -> None:
        """Settlements that come once more, in another order and with another amount, move nothing."""
        before = await self.cluster.query(_SPENT, TENANT)
        rows = await self.cluster.query(_CHARGES, TENANT, first_id)
        settlements = [
            Settlement(
                tenant_id=TENANT,
                request_id=row["request_id"],
                state="settled",
                outcome=Outcome(row["outcome"]),
                source=row["source"],
                requests=1,
                input_tokens=row["input_tokens"],
                output_tokens=row["output_tokens"] + 1,
                amount_pico=int(row["amount_pico"]) + 1,
                lines=msgspec.json.decode(row["lines"], type=list[UsageLine]),
                facts={},
            )
            for row in rows[-AGAIN_MAX:]
        ]
        connection = await connect(self.cluster.database.dsn)
        try:
            settled = await settle(connection, [*reversed(settlements), *settlements])
        finally:
            await connection.close()
        end.figures.settled_again += len(settled)
        if wrong := {one.result for one in settled} - {"already"}:
            end.findings.append(f"settlements that came again: {wrong}")
        if await self.cluster.query(_SPENT, TENANT) != before:
            end.findings.append("settlements that came again moved something")
