"""The fast `settle_batch_v1` against the first one, which is plainer: the same answers, the same rows everywhere."""

import asyncio
from importlib.resources import files
from typing import Any, Literal
from uuid import UUID

import msgspec
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from behest_ledger.holds import Granted, Settlement
from behest_ledger.store import holds
from behest_ledger.store.pool import connect
from ledger.books import Books, new_id, settlement
from ledger.sidecars import Sidecar, charge, reap

FIRST = files("behest_ledger").joinpath("sql/migrations/0005_settle.sql").read_text("utf-8")
TENANTS = ("acme", "bolt")
BUDGETS: dict[str, dict[str, Any]] = {
    "money": {"limit": 2000},
    "each": {"limit": 1000, "per": ["user"]},
    "soft": {"limit": 100, "enforcement": "soft"},
    "tokens": {"limit": 300, "unit": "tokens"},
    "input": {"limit": 200, "unit": "tokens", "kind": "input"},
    "calls": {"limit": 6, "unit": "requests"},
}
BOOKS = {
    "budget_window": "window_id",
    "hold": "tenant_id, request_id",
    "hold_line": "request_id, window_id",
    "posting": "source_id, window_id, seq, debit, credit",
    "request": "request_id",
    "usage_line": "request_id, entry, class",
}
TIMES = {"hold": ["ended_at", "admitted_at"], "request": ["ended_at"], "posting": ["posted_at"]}

Fate = Literal["open", "settled", "suspense", "charged"]


class Request(msgspec.Struct, frozen=True):
    """One that was admitted, if there was money, and what has become of it before the batch comes."""

    tenant: str
    user: str
    input: int
    need: int
    fate: Fate


class Item(msgspec.Struct, frozen=True):
    """One settlement of the batch: of the request with this number, or of one that nobody knows."""

    number: int
    input: int
    output: int
    sent: bool


TOKENS = st.integers(0, 40)
REQUESTS = st.lists(
    st.builds(
        Request,
        st.sampled_from(TENANTS),
        st.sampled_from(["ann", "bob"]),
        TOKENS,
        TOKENS,
        st.sampled_from(["open", "open", "open", "settled", "suspense", "charged"]),
    ),
    max_size=8,
)
ITEMS = st.lists(st.builds(Item, st.integers(0, 9), TOKENS, st.integers(0, 120), st.booleans()), max_size=12)


async def _fill(books: Books, requests: list[Request], limits: dict[str, int]) -> list[tuple[str, UUID]]:
    for name, what in BUDGETS.items():
        for tenant in TENANTS:
            await books.budget(name, tenant=tenant, **what)
    holders = {fate: await Sidecar.start(books) for fate in ("open", "settled", "suspense", "charged")}
    made: list[tuple[str, UUID]] = []
    for one in requests:
        found, answer = await holders[one.fate].admit(tenant=one.tenant, user=one.user, input=one.input, need=one.need)
        made.append((one.tenant, found))
        if one.fate == "settled" and isinstance(answer, Granted):
            await books.settle(settlement(found, input=one.input, output=one.need + 9, tenant=one.tenant))
    await holders["charged"].die()
    await reap(books)
    await charge(books, "hold")
    await holders["suspense"].die()
    await reap(books)
    for name, limit in limits.items():
        changed: dict[str, Any] = {**BUDGETS[name], "limit": limit}
        await books.budget(name, tenant=TENANTS[0], **changed)
    return made


async def _settle(connection: Any, function: str, batch: list[Settlement]) -> tuple[list[Any], dict[str, list[str]]]:
    """What a function answers, and the books after it. Nothing stays."""
    change = connection.transaction()
    await change.start()
    try:
        answers = await connection.fetch(
            f"SELECT * FROM ledger.{function}($1::text::jsonb) ORDER BY request_id", msgspec.json.encode(batch).decode()
        )
        books = {
            table: [
                row["line"]
                for row in await connection.fetch(
                    f"SELECT (to_jsonb(t) - $1::text[])::text AS line FROM ledger.{table} t ORDER BY {order}",
                    TIMES.get(table, []),
                )
            ]
            for table, order in BOOKS.items()
        }
    finally:
        await change.rollback()
    return [tuple(answer) for answer in answers], books


def test_any_batch_moves_what_the_first_settle_moved(dsn: str) -> None:
    async def compare(requests: list[Request], items: list[Item], limits: dict[str, int]) -> None:
        connection: Any = await connect(dsn)
        change = connection.transaction()
        await change.start()
        try:
            _, _, function = FIRST.partition("CREATE FUNCTION ledger.settle_batch_v1")
            await connection.execute("CREATE FUNCTION ledger.settle_batch_first" + function)
            made = await _fill(Books(dsn, connection), requests, limits)
            made += [(TENANTS[number % 2], new_id()) for number in range(10 - len(made))]
            batch = [
                settlement(
                    made[item.number][1],
                    input=item.input,
                    output=item.output,
                    sent=item.sent,
                    tenant=made[item.number][0],
                )
                for item in items
            ]
            expected = await _settle(connection, "settle_batch_first", batch)
            assert await _settle(connection, "settle_batch_v1", batch) == expected
            await holds.settle(connection, batch)
        finally:
            await change.rollback()
            await connection.close()

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @example(  # two that cost more than they hold, and room for less than both
        [Request("acme", "ann", 0, 10, "open")] * 2, [Item(0, 0, 60, True), Item(1, 0, 60, True)], {}
    )
    @given(REQUESTS, ITEMS, st.dictionaries(st.sampled_from(["money", "tokens", "calls"]), st.integers(0, 500)))
    def same(requests: list[Request], items: list[Item], limits: dict[str, int]) -> None:
        asyncio.run(compare(requests, items, limits))

    same()
