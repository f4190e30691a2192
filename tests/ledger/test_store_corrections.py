"""Corrections on a real PostgreSQL: new entries on the original windows, once, all or none."""

import asyncio
import random
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest

from behest_ledger.corrections import Correction, CorrectionsRefusedError
from behest_ledger.store import corrections
from behest_ledger.store.corrections import Corrected, correct
from behest_ledger.store.pool import connect
from behest_ledger.store.reports import top
from behest_ledger.store.usage import usage_totals
from ledger.books import TENANT, Books, granted, keep_books, new_id, settlement
from ledger.sealing import seal_all
from ledger.sidecars import Sidecar, charge, reap, state

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2100, 1, 1, tzinfo=UTC)


async def settled(books: Books, *, output: int = 3, need: int = 3, sent: bool = True, **what: Any) -> UUID:
    one, answer = await books.admit(input=2, need=need, **what)
    granted(answer)
    await books.settle(settlement(one, input=2, output=output, sent=sent))
    return one


def correction(one: UUID, name: str = "invoice 1", **quantities: int) -> Correction:
    return Correction(
        place="line 1", request_id=one, correction_id=name, reason="the invoice", quantities=quantities,
        rates_pico={"output": 10, "input": 3},
    )  # fmt: skip


async def apply(books: Books, *wanted: Correction, dry_run: bool = False) -> list[Corrected]:
    connection = await connect(books.dsn)
    try:
        return await correct(connection, wanted, dry_run=dry_run)
    finally:
        await connection.close()


async def budgets(books: Books, *, money: int = 1000) -> None:
    await books.budget("calls", 9, unit="requests")
    await books.budget("money", money)
    await books.budget("tokens", 90, unit="tokens")


async def spent(books: Books) -> dict[str, tuple[int, int]]:
    return {window.budget.removeprefix("demo/"): (window.spent, window.overrun) for window in await books.windows()}


def test_more_than_was_charged_is_spent_and_less_is_available_again(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        one = await settled(books)
        assert await spent(books) == {"calls": (1, 0), "money": (36, 0), "tokens": (5, 0)}
        (done,) = await apply(books, correction(one, output=5))
        assert done == Corrected(
            request_id=one, result="corrected", number=1, old_pico=36, new_pico=56, overrun=False
        )  # fmt: skip
        assert await spent(books) == {"calls": (1, 0), "money": (56, 0), "tokens": (7, 0)}
        (done,) = await apply(books, correction(one, "credit note", output=1, input=1))
        assert (done.number, done.old_pico, done.new_pico) == (2, 56, 13)
        assert await spent(books) == {"calls": (1, 0), "money": (13, 0), "tokens": (2, 0)}
        assert await state(books, one) == "corrected"
        rows = await books.connection.fetch(
            "SELECT entry, class, quantity FROM ledger.usage_line WHERE request_id = $1 ORDER BY 1, 2", one
        )
        assert [tuple(row) for row in rows] == [
            (0, "input", 2), (0, "output", 3),
            (1, "input", -2), (1, "output", -3), (2, "input", 2), (2, "output", 5),
            (3, "input", -2), (3, "output", -5), (4, "input", 1), (4, "output", 1),
        ]  # fmt: skip

    keep_books(dsn, work)


def test_the_request_keeps_its_row_and_shows_the_correction(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        one = await settled(books)
        before = dict(await books.connection.fetchrow("SELECT * FROM ledger.request"))
        await seal_all(books)
        await apply(books, correction(one, output=5))
        await seal_all(books)
        assert dict(await books.connection.fetchrow("SELECT * FROM ledger.request")) == before
        now = await books.connection.fetchrow(
            "SELECT outcome, source, output_tokens, amount_pico::bigint AS amount_pico, corrections,"
            " facts -> 'corrected' ->> 'id' AS id, facts -> 'corrected' ->> 'amount_pico' AS old"
            " FROM ledger.request_now"
        )
        assert dict(now) == {
            "outcome": "completed", "source": "provider", "output_tokens": 5, "amount_pico": 56, "corrections": 1,
            "id": "invoice 1", "old": "36",
        }  # fmt: skip
        (row,) = await top(books.connection, since=LONG_AGO)
        assert (row.requests, row.output_tokens, row.amount_pico) == (1, 5, 56)
        totals = await usage_totals(
            books.connection, tenant_id=TENANT, project_id="demo/shop", begin=LONG_AGO, end=FAR_AHEAD, user_id=None
        )
        (usage,) = totals.models
        assert (usage.requests, usage.output_tokens, usage.amount_pico) == (1, 5, 56)

    keep_books(dsn, work)


def test_beyond_the_room_is_overrun_and_less_reduces_the_overrun_first(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books, money=100)
        await books.budget("soft", 1, enforcement="soft")
        one = await settled(books)
        (done,) = await apply(books, correction(one, output=11))
        assert done.overrun
        assert await spent(books) == {"calls": (1, 0), "money": (100, 16), "soft": (116, 0), "tokens": (13, 0)}
        (done,) = await apply(books, correction(one, "second", output=10))
        assert not done.overrun
        assert (await spent(books))["money"] == (100, 6)
        await apply(books, correction(one, "third", output=9))
        assert (await spent(books))["money"] == (96, 0)

    keep_books(dsn, work)


def test_nothing_is_an_overrun_that_money_in_leases_could_pay(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        await books.budget("soft", 1000, enforcement="soft")
        one = await settled(books)
        sidecar = await Sidecar.start(books)
        wanted = {window.window_id: 200 for window in await books.windows()}
        assert set((await sidecar.lease(wanted)).values()) == {200}
        await apply(books, correction(one, output=79))  # 796: what is left beside the lease still pays it
        assert await free_in_leases(books) == [200, 200]
        (done,) = await apply(books, correction(one, "second", output=90))
        assert not done.overrun
        assert await spent(books) == {"money": (906, 0), "soft": (906, 0)}
        assert await free_in_leases(books) == [0, 200], "a soft window lacks nothing, so its leases stay"
        (done,) = await apply(books, correction(one, "third", output=100))
        assert done.overrun
        assert (await spent(books))["money"] == (1000, 6)

    keep_books(dsn, work)


async def free_in_leases(books: Books) -> list[int]:
    rows = await books.connection.fetch("SELECT free::bigint AS free FROM ledger.lease ORDER BY window_id")
    return [row["free"] for row in rows]


def test_a_closed_window_pays_and_is_paid_and_never_the_current_one(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("day", 40, period="day")
        one = await settled(books)
        await books.age("day", "1 day")
        await settled(books, output=1, need=1)
        await apply(books, correction(one, output=9))
        old, current = await books.windows("day")
        assert (old.spent, old.overrun, current.spent, current.overrun) == (40, 56, 16, 0)
        await apply(books, correction(one, "second", output=0, input=0))
        old, current = await books.windows("day")
        assert (old.spent, old.overrun, current.spent, current.overrun) == (0, 0, 16, 0)

    keep_books(dsn, work)


def test_the_same_correction_is_applied_once_and_what_is_so_already_not_at_all(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        one = await settled(books)
        assert [done.result for done in await apply(books, correction(one, output=3, input=2))] == ["unchanged"]
        assert [done.result for done in await apply(books, correction(one, output=5))] == ["corrected"]
        assert [done.result for done in await apply(books, correction(one, output=5))] == ["already"]
        assert [done.result for done in await apply(books, correction(one, output=7))] == ["already"]
        (done,) = await apply(books, correction(one, "other", output=5))
        assert (done.result, done.old_pico, done.new_pico) == ("unchanged", 56, 56)
        assert await spent(books) == {"calls": (1, 0), "money": (56, 0), "tokens": (7, 0)}

    keep_books(dsn, work)


def test_a_request_that_was_believed_unsent_and_is_billed_has_its_call_spent_too(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        one = await settled(books, sent=False)
        assert await spent(books) == {"calls": (0, 0), "money": (0, 0), "tokens": (0, 0)}
        await apply(books, correction(one, output=1))
        assert await spent(books) == {"calls": (1, 0), "money": (10, 0), "tokens": (1, 0)}

    keep_books(dsn, work)


def test_an_invoice_after_a_charge_by_policy_wins_over_a_journal_that_comes_still_later(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        ids = []
        for _ in range(2):
            sidecar = await Sidecar.start(books)
            ids.append(await sidecar.admitted(input=2, need=3))
            await sidecar.die()
        await reap(books)
        await charge(books, "hold")
        assert [done.result for done in await apply(books, correction(ids[0], output=2))] == ["corrected"]
        assert await books.settle(*[settlement(one, input=2, output=1) for one in ids]) == ["already", "corrected"]
        assert [done.number for done in await apply(books, correction(ids[1], output=2))] == [2]
        assert await spent(books) == {"calls": (2, 0), "money": (52, 0), "tokens": (8, 0)}

    keep_books(dsn, work)


def test_what_cannot_be_corrected_is_told_and_nothing_is_done(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        good = await settled(books)
        live, _ = await books.admit(input=1)
        nobody = new_id()
        await books.settle(settlement(tombstone := new_id(), sent=False))
        wrong = [
            (
                correction(live, output=1),
                f"line 1: request_id: request {live} has not ended yet; correct it when it has",
            ),
            (correction(nobody, output=1), f"line 1: request_id: no request {nobody} was ever admitted"),
            (correction(tombstone, output=1), f"line 1: request_id: no request {tombstone} was ever admitted"),
            (
                correction(good, audio_input=1, output=1),
                f"line 1: rate_pico: request {good} has no known rate for audio_input; give one",
            ),
        ]
        before = await spent(books)
        for one, message in wrong:
            others = [] if one.request_id == good else [correction(good, output=50)]
            with pytest.raises(CorrectionsRefusedError) as refused:
                await apply(books, *others, one)
            assert [str(error) for error in refused.value.errors] == [message]
        with pytest.raises(CorrectionsRefusedError) as refused:
            await apply(books, *(one for one, _ in wrong[:3]))
        assert len(refused.value.errors) == 3
        monkeypatch.setattr(corrections, "REQUESTS_MAX", 1)
        with pytest.raises(CorrectionsRefusedError, match="more than 1 requests"):
            await apply(books, correction(good, output=4), wrong[0][0])
        assert await spent(books) == before
        assert await books.count("correction") == 0

    keep_books(dsn, work)


def test_a_dry_run_tells_the_same_and_changes_nothing(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        one = await settled(books)
        before = await spent(books)
        tried = await apply(books, correction(one, output=5), dry_run=True)
        assert await spent(books) == before
        assert await books.count("correction") == 0
        assert await apply(books, correction(one, output=5)) == tried

    keep_books(dsn, work)


def test_the_tenant_is_looked_up_or_named_and_must_be_unambiguous(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        one = await settled(books)
        other, _ = await books.admit(id=one, tenant="other")
        await books.settle(settlement(other, output=1, tenant="other"))
        with pytest.raises(CorrectionsRefusedError, match="several tenants"):
            await apply(books, correction(one, output=5))
        await apply(books, msgspec.structs.replace(correction(one, output=5), tenant_id="other"))
        rows = await books.connection.fetch("SELECT tenant_id, corrections FROM ledger.request_now ORDER BY 1")
        assert [tuple(row) for row in rows] == [("acme", 0), ("other", 1)]

    keep_books(dsn, work)


def test_corrections_and_traffic_at_the_same_time_come_to_the_right_sum(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 10**6)
        await books.budget("users", 10**6, per=["user"])
        choose = random.Random(3)
        ids = [await settled(books, user=choose.choice("abc")) for _ in range(12)]

        async def invoices(number: int) -> None:
            await apply(books, *[correction(one, f"{number}", output=number) for one in choose.sample(ids, 9)])

        async def traffic() -> None:
            for _ in range(5):
                await settled(books, user=choose.choice("abc"))

        await asyncio.gather(*(invoices(number) for number in (4, 5, 6)), *(traffic() for _ in range(3)))
        await apply(books, *[correction(one, "last", output=9) for one in ids])
        assert (await books.window("money")).spent == 12 * 96 + 15 * 36

    keep_books(dsn, work, connections=6)
