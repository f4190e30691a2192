"""A ledger to measure: a PostgreSQL of its own with the settings of `behest up`, budgets, admissions, settlements."""

import asyncio
import contextlib
import random
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

from behest_ledger.charging import Outcome
from behest_ledger.holds import Admission, Settlement, UsageLine
from behest_ledger.request_id import request_id
from behest_ledger.store import holders, holds
from behest_ledger.store.admissions import AdmissionDesk
from behest_ledger.store.configuration import apply_text
from behest_ledger.store.migrate import migrate
from behest_ledger.store.pool import Connection, connect, open_pool
from behest_proxy.app.leasing import Leasing
from behest_proxy.cli.folder import DataFolder
from behest_proxy.cli.postgres import launch

TENANT = "bench"
SESSIONS = 50
SETTINGS = ("fsync", "synchronous_commit", "full_page_writes", "wal_sync_method", "shared_buffers", "max_wal_size")
_CLASSES = (("input", 900, 150_000), ("cache_read", 300, 75_000), ("output", 200, 600_000))
_PROJECT_BUDGET = """\
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: project, namespace: shop}
spec:
  scope: {project: web}
  limit: {amount: "1000000.00", currency: USD}
  window: {period: Month, timeZone: UTC}
---
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {name: web, namespace: shop}
spec: {tenant: bench}
"""
_SESSION_BUDGET = """\
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: sessions, namespace: shop}
spec:
  scope: {project: web}
  per: [session]
  limit: {amount: "100000.00", currency: USD}
  window: {period: Day, timeZone: UTC}
"""
_random = random.Random(1)


@contextlib.contextmanager
def server(folder: Path) -> Generator[str]:
    """PostgreSQL as `behest up` runs it, with pg_stat_statements: its DSN."""
    place = DataFolder(folder / "ledger")
    place.create()
    with launch(place) as first:
        asyncio.run(_execute(first.dsn, "ALTER SYSTEM SET shared_preload_libraries = 'pg_stat_statements'"))
    with launch(place) as running:
        yield running.dsn


async def database(dsn: str, name: str) -> str:
    """A new, migrated database of this server: its DSN."""
    await _execute(dsn, f"CREATE DATABASE {name}")
    made = urlunsplit(urlsplit(dsn)._replace(path="/" + name))
    await migrate(made)
    return made


async def budgets(dsn: str, *, sessions: bool) -> None:
    """A project's monthly budget, and one a day for each of its sessions."""
    await apply_text(dsn, _PROJECT_BUDGET + (_SESSION_BUDGET if sessions else ""), default_tenant=TENANT)


async def settings_line(dsn: str) -> str:
    """What a commit of this server means, and what one takes with nothing in it but a row."""
    connection: Connection = await connect(dsn)
    try:
        values = [f"{name} {await connection.fetchval('SHOW ' + name)}" for name in SETTINGS]
        version = str(await connection.fetchval("SHOW server_version"))
        await connection.execute("CREATE TABLE public.one (n integer); INSERT INTO public.one VALUES (0)")
        times_s: list[float] = []
        for _ in range(100):
            started_s = time.perf_counter()
            await connection.execute("UPDATE public.one SET n = n + 1")
            times_s.append(time.perf_counter() - started_s)
        await connection.execute("DROP TABLE public.one")
    finally:
        await connection.close()
    return f"PostgreSQL {version}, {', '.join(values)}; a commit of one row takes {Spread(times_s)}"


class Spread:
    """Some durations."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self._sorted_s = sorted(seconds)

    def ms(self, share: float) -> float:
        """What this share of them does not exceed, in milliseconds."""
        return self._sorted_s[min(len(self._sorted_s) - 1, int(share * len(self._sorted_s)))] * 1e3

    def __str__(self) -> str:
        return f"p50 {self.ms(0.5):.2f} ms, p99 {self.ms(0.99):.2f} ms"


class Sidecar:
    """What a sidecar has of the ledger: a pool of two connections, a desk, leases, and a registered holder."""

    def __init__(self, pool: Connection) -> None:
        self.pool = pool
        self.holder_id = uuid4()
        self.leasing = Leasing()
        self.desk = AdmissionDesk(lambda asked: holds.admit_batch(self.pool, asked))

    @classmethod
    async def start(cls, dsn: str) -> "Sidecar":
        """Connect and register."""
        sidecar = cls(await open_pool(dsn))
        await holders.register(sidecar.pool, sidecar.holder_id, "bench", 3600.0)
        return sidecar

    async def aclose(self) -> None:
        """Disconnect."""
        await self.desk.aclose()
        await self.pool.close()

    def admission(self) -> Admission:
        """A request of 1,200 input tokens that wants a first tranche."""
        session = _random.randrange(SESSIONS)
        return Admission(
            tenant_id=TENANT,
            request_id=new_id(),
            holder_id=self.holder_id,
            attributes={
                "namespace": "shop",
                "project": "shop/web",
                "user": f"user-{session}",
                "session": f"session-{session}",
                "model": "gpt-4o-mini",
                "upstream": "openai",
                "provider": "openai",
                "workload": "web",
                "team": "checkout",
            },
            price_key="openai/gpt-4o-mini",
            input_tokens=1200,
            input_amount_pico=1200 * 150_000,
            output_rate_pico=600_000,
            need_tokens=16,
            want_tokens=512,
            shares=4,
        )


def settlement(request: UUID) -> Settlement:
    """The end of a request whose usage has three classes, with the facts that a stream leaves."""
    lines = [
        UsageLine(class_=name, quantity=quantity, rate_pico=rate, amount_pico=quantity * rate, source="provider")
        for name, quantity, rate in _CLASSES
    ]
    facts: dict[str, Any] = {
        "chunks": 200,
        "finish_reasons": ["stop"],
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "duration_ms": 3120,
        "first_byte_ms": 230,
    }
    return Settlement(
        tenant_id=TENANT,
        request_id=request,
        state="settled",
        outcome=Outcome.COMPLETED,
        source="provider",
        requests=1,
        input_tokens=1200,
        output_tokens=200,
        amount_pico=sum(line.amount_pico for line in lines),
        lines=lines,
        facts=facts,
    )


def new_id() -> UUID:
    """A request id of now."""
    return request_id(int(time.time() * 1000), _random.getrandbits(74))


async def _execute(dsn: str, statement: str) -> None:
    connection: Connection = await connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
