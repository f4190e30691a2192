"""The overview equals the books, is bounded, and reads by indexes what has one."""

from datetime import UTC, datetime, timedelta
from typing import Any

from behest_ledger.corrections import Correction
from behest_ledger.store.corrections import correct
from behest_ledger.store.overview import (
    MODELS_MAX,
    REQUESTS_MAX,
    REQUESTS_QUERY,
    SESSIONS_MAX,
    find_sessions,
    read_overview,
)
from behest_ledger.store.pool import connect
from ledger.books import Books, granted, keep_books, settlement
from ledger.sidecars import Sidecar

MINUTE = timedelta(minutes=1)


async def spend(books: Books, output: int, **who: Any) -> Any:
    one, answer = await books.admit(need=output, **who)
    granted(answer)
    await books.settle(settlement(one, input=1, output=output))
    return one


def test_it_adds_up_corrections_and_what_runs_included(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        await books.budget("calls", 2, unit="requests", enforcement="soft")
        first = await spend(books, 5)
        await spend(books, 6, model="large", session="s2")
        sidecar = await Sidecar.start(books)
        await sidecar.checkpoint(await sidecar.admitted(session="s2"), output=7)
        connection = await connect(books.dsn)
        try:
            wanted = Correction(
                place="line 1", request_id=first, correction_id="i", reason="invoice", quantities={"output": 2},
                rates_pico={"output": 10},
            )  # fmt: skip
            await correct(connection, [wanted])
            found = await read_overview(connection, since=datetime.now(UTC) - timedelta(hours=1), piece=MINUTE)
            assert {(one.model, one.amount_pico, one.requests) for one in found.bins} == {
                ("small", 23, 1), ("large", 63, 1),
            }  # fmt: skip
            assert [(row.session_id, row.amount_pico, row.requests, row.live) for row in found.sessions] == [
                ("s2", 63 + 70, 1, 1), ("s1", 23, 1, 0),
            ]  # fmt: skip
            assert (found.live, found.live_pico) == (1, 70)
            assert [row.session_id for row in found.requests] == []  # of tenants without a project nothing is shown
            assert [one.record.name for one in found.budgets] == ["calls", "money"]
            assert [row.session_id for row in await find_sessions(connection, since=_long_ago(), prefix="s")] == [
                "s2", "s1",
            ]  # fmt: skip
            assert await find_sessions(connection, since=_long_ago(), prefix="%") == []
        finally:
            await connection.close()

    keep_books(dsn, work)


def _long_ago() -> datetime:
    return datetime(2020, 1, 1, tzinfo=UTC)


def test_every_list_is_short_whatever_there_is(dsn: str) -> None:
    async def work(books: Books) -> None:
        for number in range(REQUESTS_MAX + 3):
            await spend(books, number + 1, model=f"m{number}", session=f"s{number}")
        connection = await connect(books.dsn)
        try:
            await connection.execute(
                "INSERT INTO ledger.project (tenant_id, project_id, namespace, name, spec)"
                " VALUES ('acme', 'demo/shop', 'demo', 'shop', '{}')"
            )
            found = await read_overview(connection, since=_long_ago(), piece=timedelta(days=365))
            assert len(found.requests) == REQUESTS_MAX
            assert [one.session_id for one in found.requests[:2]] == [
                f"s{REQUESTS_MAX + 2}", f"s{REQUESTS_MAX + 1}",
            ]  # fmt: skip
            assert len(found.sessions) == SESSIONS_MAX
            models = {(one.model, one.is_others) for one in found.bins}
            assert len(models) == MODELS_MAX + 1
            assert ("others", True) in models
            total = await connection.fetchval("SELECT sum(amount_pico)::text FROM ledger.request")
            assert sum(one.amount_pico for one in found.bins) == int(total)
            await connection.execute("SET enable_seqscan = off")
            plan = "\n".join(
                row[0] for row in await connection.fetch(f"EXPLAIN {REQUESTS_QUERY}", _long_ago(), REQUESTS_MAX)
            )
            assert "request_default_pkey" in plan
            assert "Seq Scan on request" not in plan
        finally:
            await connection.close()

    keep_books(dsn, work)
