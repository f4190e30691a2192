"""One round of torture after the other: let everything happen, wait until all is settled, and look."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from behest_ledger.store.configuration import apply_text
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.pool import connect
from behest_ledger.store.verify import verify
from torture.client import StreamEnd, run_client
from torture.cluster import TENANT, Cluster
from torture.judge import Ceilings, Charged, Figures, judge_streams, judge_windows
from torture.plan import Kill, LimitChange, RoundPlan, Scale

DRAIN_S = 60.0
SAMPLE_S = 0.05
_DOWN = (LedgerError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)

_WINDOWS = """
SELECT split_part(budget_id, '/', 2) AS budget, coalesce(subject #>> '{0,2}', '') AS subject, window_id,
       limit_amount::text, ceiling::text, spent::text, held::text, suspense::text, overrun::text
FROM ledger.budget_window WHERE tenant_id = $1 AND ceiling IS NOT NULL
"""
_UNSETTLED = """
SELECT (SELECT count(*) FROM ledger.hold WHERE state IN ('open', 'suspense'))
     + (SELECT count(*) FROM ledger.budget_window WHERE held + suspense > 0 OR live > 0) AS number
"""
_ROWS = """
SELECT request_id::text, session_id, outcome, source, output_tokens, amount_pico::text
FROM ledger.request_now WHERE tenant_id = $1
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
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: project, namespace: {TENANT}}}
spec:
  scope: {{project: app}}
  limit: {{amount: "%s", currency: USD}}
  window: {{period: Lifetime}}
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
    _known: set[str] = field(default_factory=set[str])
    """Requests of earlier rounds."""
    _spent_usd: float = 0.0
    """What the project has spent so far."""
    _session_usd: float = 0.0
    """What its latest session has spent so far: one that is used up makes a dull round."""

    async def round(self, plan: RoundPlan) -> RoundEnd:
        """Run it, wait, and look. Raises `AssertionError` where something does not come back at all."""
        began_s = time.monotonic()
        end = RoundEnd(findings=[], figures=Figures(), events=[], took_s=0.0)
        session, token = await self._begin(plan)
        watch = asyncio.create_task(self._watch(end))
        ends: list[StreamEnd] = []
        try:
            async with asyncio.TaskGroup() as group:
                zero_s = time.monotonic()
                clients = [group.create_task(self._client(stream, zero_s, token)) for stream in plan.streams]
                for kill in plan.kills:
                    group.create_task(self._kill(kill, zero_s, end))
                for change in plan.limits:
                    group.create_task(self._change(change, zero_s, end))
            ends = [client.result() for client in clients]
            await self._drained(end, ends)
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        await self._look(end, ends, session)
        end.took_s = time.monotonic() - began_s
        return end

    # --- what happens ------------------------------------------------------------------------------------------

    async def _begin(self, plan: RoundPlan) -> tuple[str, str]:
        usd = self.scale.session_limit_usd
        await self._set_limits(sessions=f"{usd:.6f}", project=f"{self._spent_usd + plan.project_usd:.6f}")
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
        text = _BUDGETS % (self._limits["sessions"], self._limits["project"])
        await apply_text(self.cluster.database.dsn, text, default_namespace=TENANT)

    async def _client(self, plan: Any, zero_s: float, token: str) -> StreamEnd:
        await asyncio.sleep(max(0.0, zero_s + plan.at_s - time.monotonic()))
        return await run_client(plan, port=self.cluster.sidecars[plan.sidecar].port, token=token)

    async def _kill(self, kill: Kill, zero_s: float, end: RoundEnd) -> None:
        await asyncio.sleep(max(0.0, zero_s + kill.at_s - time.monotonic()))
        if kill.sidecar is None:
            database = self.cluster.database
            async with database.lock:
                end.events.append(f"PostgreSQL at {time.monotonic() - zero_s:.2f} s for {kill.down_s:.1f} s")
                await asyncio.to_thread(database.kill)
                await asyncio.sleep(kill.down_s)
                await asyncio.to_thread(database.start)
            return
        sidecar = self.cluster.sidecars[kill.sidecar]
        async with sidecar.lock:
            end.events.append(f"sidecar {sidecar.number} at {time.monotonic() - zero_s:.2f} s")
            sidecar.kill()
            await asyncio.sleep(kill.down_s)
            await sidecar.start()

    async def _change(self, change: LimitChange, zero_s: float, end: RoundEnd) -> None:
        await asyncio.sleep(max(0.0, zero_s + change.at_s - time.monotonic()))
        usd = change.limit_usd + (self._spent_usd if change.budget == "project" else 0.0)
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

    async def _drained(self, end: RoundEnd, ends: list[StreamEnd]) -> None:
        begun = {one.request_id for one in ends if one.status == 200}
        deadline_s = time.monotonic() + DRAIN_S
        number, missing = -1, begun
        while time.monotonic() < deadline_s:
            with contextlib.suppress(*_DOWN):
                (row,) = await self.cluster.query(_UNSETTLED)
                number = row["number"]
                missing = begun - {row["request_id"] for row in await self.cluster.query(_ROWS, TENANT)}
                if not number and not missing:
                    return
            await asyncio.sleep(0.1)
        end.findings.append(f"after {DRAIN_S:.0f} s {number} are still held, {sorted(missing)} are not in the books")

    async def _look(self, end: RoundEnd, ends: list[StreamEnd], session: str) -> None:
        cluster = self.cluster
        found = await cluster.query(_ROWS, TENANT)
        ids = {row["request_id"] for row in found}
        if len(ids) != len(found):
            end.findings.append(f"{len(found)} rows of {len(ids)} requests")
        rows = {row["request_id"]: Charged.of(row) for row in found if row["request_id"] not in self._known}
        self._known = ids
        killed = {
            one.plan.number: cluster.sidecars[one.plan.sidecar].was_killed(one.began_s, one.ended_s) for one in ends
        }
        sim = [seen for seen in await cluster.sim_requests() if seen["path"].endswith("/chat/completions")]
        end.findings += judge_streams(ends, rows=rows, sim=sim, killed=killed, figures=end.figures)
        windows = await cluster.query(_WINDOWS, TENANT)
        end.findings += judge_windows(windows, self.ceilings, end.figures)
        for window in windows:
            of = [row for row in found if window["budget"] == "project" or row["session_id"] == window["subject"]]
            charged = sum(int(row["amount_pico"]) for row in of)
            if charged != int(window["spent"]):
                end.findings.append(f"the requests of {window} cost {charged}")
        self._spent_usd = sum(int(row["amount_pico"]) for row in found) / 10**12
        of_session = [int(row["amount_pico"]) for row in found if row["session_id"] == session]
        self._session_usd = sum(of_session) / 10**12
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
