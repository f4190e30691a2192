"""The keeper on a real PostgreSQL: policy after the grace, corrections after that, and one at work."""

import asyncio
import random
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
import pytest

from behest_ledger.store import holders, holds, keeper
from behest_ledger.store.errors import LedgerRefusedError, LedgerUnavailableError, SchemaError
from behest_ledger.store.keeper import Keeper, KeeperReport
from behest_ledger.store.pool import connect
from behest_ledger.store.seals import Sealed, Sealer
from ledger.books import Books, admission, granted, keep_books, settlement
from ledger.sidecars import Sidecar, charge, checkpoint, reap, state

IDLE = KeeperReport(working=True)


@pytest.fixture(autouse=True)
def without_seals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seals have tests of their own, in test_store_seals.py."""

    async def nothing(_sealer: Sealer, _connection: Any, **_how: Any) -> Sealed:
        return Sealed(0, 0, more=False)

    monkeypatch.setattr(Sealer, "seal", nothing)


async def budgets(books: Books) -> None:
    await books.budget("calls", 9, unit="requests")
    await books.budget("money", 1000)
    await books.budget("tokens", 90, unit="tokens")


async def in_suspense(books: Books, *, seen: tuple[int, int] | None = None, **what: Any) -> UUID:
    """A request whose sidecar is gone, at its last checkpoint of (input, output) tokens."""
    sidecar = await Sidecar.start(books)
    one = await sidecar.admitted(**what)
    if seen is not None:
        await sidecar.checkpoint(one, input=seen[0], output=seen[1])
    await sidecar.die()
    assert await reap(books) == 1
    return one


async def balances(books: Books) -> dict[str, tuple[int, int, int]]:
    """(spent, held, overrun) by budget, where nothing is in suspense."""
    windows = await books.windows()
    assert [window.suspense for window in windows] == [0] * len(windows)
    return {window.budget.removeprefix("demo/"): (window.spent, window.held, window.overrun) for window in windows}


async def told(books: Books, one: UUID) -> tuple[str, str, int, int, int]:
    """(outcome, source, input, output, pico-USD) of a request."""
    row = await books.connection.fetchrow(
        "SELECT outcome, source, input_tokens, output_tokens, amount_pico::bigint FROM ledger.request_now"
        " WHERE request_id = $1",
        one,
    )
    return tuple(row)


async def lines(books: Books, one: UUID) -> list[tuple[int, str, int, int]]:
    """(entry, class, quantity, rate) of a request."""
    rows = await books.connection.fetch(
        "SELECT entry, class, quantity, rate_pico::bigint FROM ledger.usage_line WHERE request_id = $1 ORDER BY 1, 2",
        one,
    )
    return [tuple(row) for row in rows]


# Policy


def test_after_the_grace_the_last_checkpoint_is_charged_and_the_rest_is_free_again(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        one = await in_suspense(books, input=5, need=9, seen=(4, 2))
        assert await charge(books, "checkpoint", grace="1 hour") == {}
        assert await charge(books, "checkpoint") == {one: 32}
        assert await charge(books, "checkpoint") == {}
        assert await state(books, one) == "charged_by_policy"
        assert await balances(books) == {"calls": (1, 0, 0), "money": (32, 0, 0), "tokens": (6, 0, 0)}
        assert await told(books, one) == ("crashed", "local", 4, 2, 32)
        assert await lines(books, one) == [(0, "input", 4, 3), (0, "output", 2, 10)]

    keep_books(dsn, work)


def test_without_a_checkpoint_nothing_but_the_request_is_charged(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        one = await in_suspense(books, input=5, need=9)
        assert await charge(books, "checkpoint") == {one: 0}
        assert await balances(books) == {"calls": (1, 0, 0), "money": (0, 0, 0), "tokens": (0, 0, 0)}
        assert await told(books, one) == ("crashed", "none", 0, 0, 0)

    keep_books(dsn, work)


def test_the_other_policy_charges_all_that_was_held(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        sidecar = await Sidecar.start(books)
        one = await sidecar.admitted(input=5, need=9)
        granted(await books.extend(one, 1, need=4))
        await sidecar.checkpoint(one, input=1, output=1)
        await sidecar.die()
        await reap(books)
        assert await charge(books, "hold") == {one: 145}
        assert await balances(books) == {"calls": (1, 0, 0), "money": (145, 0, 0), "tokens": (18, 0, 0)}
        assert await told(books, one) == ("crashed", "estimate", 5, 13, 145)

    keep_books(dsn, work)


@pytest.mark.parametrize(
    ("input_tokens", "amount", "expected"),
    [
        (5, 17, [(0, "input", 5, 3), (0, "output", 1, 10), (0, "request", 1, 2)]),
        (0, 7, [(0, "output", 1, 10), (0, "request", 1, 7)]),
    ],
)
def test_a_fee_inside_the_input_amount_is_a_line_of_its_own(
    dsn: str, input_tokens: int, amount: int, expected: list[tuple[int, str, int, int]]
) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        sidecar = await Sidecar.start(books)
        asked = msgspec.structs.replace(
            admission(input=input_tokens, need=1), input_amount_pico=amount, holder_id=sidecar.holder_id
        )
        granted(await holds.admit(books.connection, asked))
        await sidecar.die()
        await reap(books)
        assert await charge(books, "hold") == {asked.request_id: amount + 10}
        assert await lines(books, asked.request_id) == expected

    keep_books(dsn, work)


@pytest.mark.parametrize("seen", [(9, 99), (99, 1), (0, 99)])
def test_a_checkpoint_beyond_the_hold_is_charged_as_far_as_the_hold_goes(dsn: str, seen: tuple[int, int]) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        await books.budget("input", 90, unit="tokens", kind="input")
        await books.budget("output", 90, unit="tokens", kind="output")
        one = await in_suspense(books, input=5, need=3, seen=seen)
        await charge(books, "checkpoint")
        found = await balances(books)
        assert found["money"][0] <= 45
        assert found["tokens"][0] <= 8
        assert found["input"][0] == min(seen[0], 5)
        assert found["output"][0] <= 3
        assert found["input"][0] + found["output"][0] == found["tokens"][0]
        assert (await told(books, one))[0] == "crashed"

    keep_books(dsn, work)


def test_money_alone_bounds_a_checkpoint_too(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        one = await in_suspense(books, input=5, need=3, seen=(5, 99))
        assert await charge(books, "checkpoint") == {one: 45}
        assert await lines(books, one) == [(0, "input", 5, 3), (0, "output", 3, 10)]

    keep_books(dsn, work)


def test_a_broken_checkpoint_cannot_stop_the_policy(dsn: str) -> None:
    async def work(books: Books) -> None:
        one = await in_suspense(books, need=3, seen=(0, 2))
        await books.connection.execute(
            "UPDATE ledger.hold SET checkpoint_output_tokens = 2, checkpoint_amount_pico = 20,"
            """ checkpoint_lines = '[{"class": "output", "quantity": 1, "rate_pico": 10},"""
            """ {"class": "output", "quantity": 1, "rate_pico": 10},"""
            """ {"class": "input", "quantity": -1, "rate_pico": 1},"""
            """ {"class": "input", "quantity": 1, "rate_pico": 0}]'"""
        )
        assert await charge(books, "checkpoint") == {one: 10}

    keep_books(dsn, work, clean=False)


def test_what_cannot_be_charged_stops_nobody_else(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """Holds of an older version, whose checkpoints and attributes nobody had looked at when they were written."""

    async def work(books: Books) -> None:
        await budgets(books)
        good, text, huge, scalar = [await in_suspense(books, need=9, seen=(0, 2)) for _ in range(4)]
        for one, quantity in ((text, '"x"'), (huge, "1e30")):
            await books.connection.execute(
                "UPDATE ledger.hold SET checkpoint_lines = $2::text::jsonb WHERE request_id = $1",
                one,
                f'[{{"class": "request", "quantity": {quantity}, "rate_pico": 0}}]',
            )
        await books.connection.execute("UPDATE ledger.hold SET attributes = '5' WHERE request_id = $1", scalar)
        keeping = Keeper(dsn, grace_s=0.1)
        await asyncio.sleep(0.11)
        report = await keeping.run_once()
        assert (report.charged_requests, report.charged_pico, report.failed) == (3, 20, ())
        assert [await state(books, ended) for ended in (good, text, huge)] == ["charged_by_policy"] * 3
        assert await told(books, text) == await told(books, huge) == ("crashed", "none", 0, 0, 0)
        # Its row cannot be written: what it held stays where nobody can spend it, and is looked at after another grace.
        assert await state(books, scalar) == "suspense"
        assert (await books.window("money")).suspense == 90
        told_of = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert [("charged nothing" in line, "another grace" in line) for line in told_of] == [
            (True, False),
            (True, False),
            (False, True),
        ]
        await books.connection.execute("UPDATE ledger.hold SET attributes = '{}' WHERE request_id = $1", scalar)
        assert await charge(books, "checkpoint") == {scalar: 20}
        await keeping.aclose()

    keep_books(dsn, work)


def test_there_are_two_policies(dsn: str) -> None:
    async def work(books: Books) -> None:
        with pytest.raises(asyncpg.PostgresError, match="no policy all"):
            await charge(books, "all")  # type: ignore[arg-type]  # what is to be refused

    keep_books(dsn, work)


# Corrections


@pytest.mark.parametrize("output", [0, 1, 2, 5, 9])
def test_a_journal_that_comes_after_the_policy_corrects_the_charge_to_its_own_number(dsn: str, output: int) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        one = await in_suspense(books, input=5, need=9, seen=(5, 2))
        await charge(books, "checkpoint")
        assert await books.settle(settlement(one, input=4, output=output)) == ["corrected"]
        assert await books.settle(settlement(one, input=5, output=9)) == ["already"]
        assert await state(books, one) == "corrected"
        amount = 12 + 10 * output
        assert await balances(books) == {"calls": (1, 0, 0), "money": (amount, 0, 0), "tokens": (4 + output, 0, 0)}
        assert await told(books, one) == ("completed", "provider", 4, output, amount)
        assert await lines(books, one) == sorted(
            [(0, "input", 5, 3), (0, "output", 2, 10), (1, "input", -5, 3), (1, "output", -2, 10), (2, "input", 4, 3)]
            + ([(2, "output", output, 10)] if output else [])
        )
        facts = await books.connection.fetchval("SELECT facts FROM ledger.request_now")
        assert msgspec.json.decode(facts)["corrected"] == {
            "id": "late settlement", "policy": "checkpoint", "amount_pico": "35",
        }  # fmt: skip

    keep_books(dsn, work)


def test_a_request_that_was_never_sent_gets_everything_back(dsn: str) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        one = await in_suspense(books, input=5, need=9)
        await charge(books, "hold")
        assert await books.settle(settlement(one, sent=False)) == ["corrected"]
        assert await balances(books) == {"calls": (0, 0, 0), "money": (0, 0, 0), "tokens": (0, 0, 0)}

    keep_books(dsn, work)


def test_a_correction_beyond_the_room_is_overrun_and_one_below_reduces_the_overrun_first(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100)
        await books.budget("soft", 1, enforcement="soft")
        late = await in_suspense(books, need=4, seen=(0, 4))
        later = await in_suspense(books, need=5, seen=(0, 5))
        await charge(books, "checkpoint")
        assert await balances(books) == {"money": (90, 0, 0), "soft": (90, 0, 0)}
        assert await books.settle(settlement(late, output=7)) == ["corrected!"]
        assert await balances(books) == {"money": (100, 0, 20), "soft": (120, 0, 0)}
        assert await books.settle(settlement(later, output=2)) == ["corrected"]
        assert await balances(books) == {"money": (90, 0, 0), "soft": (90, 0, 0)}

    keep_books(dsn, work)


def test_a_correction_lowers_a_ceiling_above_a_lowered_limit(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 100)
        one = await in_suspense(books, need=9)
        await charge(books, "hold")
        await books.budget("money", 20)
        assert await books.settle(settlement(one, output=3)) == ["corrected"]
        window = await books.window("money")
        assert (window.spent, window.ceiling) == (30, 30)

    keep_books(dsn, work)


def test_one_batch_settles_corrects_and_leaves_a_tombstone(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        late = [await in_suspense(books, need=4, seen=(0, 1)) for _ in range(2)]
        await charge(books, "checkpoint")
        waiting = await in_suspense(books, need=4)
        live = await (await Sidecar.start(books)).admitted(need=2)
        batch = [settlement(one, output=2) for one in (*late, waiting, live, late[0])]
        unknown = settlement(UUID(int=late[0].int ^ 1), sent=False)
        found = await books.settle(unknown, *batch)
        assert found == ["unknown", "corrected", "corrected", "settled", "settled", "corrected"]
        assert await balances(books) == {"money": (80, 0, 0)}

    keep_books(dsn, work)


def test_journals_and_policies_at_the_same_time_come_to_the_journals_number(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 3000)
        await books.budget("users", 1000, per=["user"])
        choose = random.Random(5)
        results: set[str] = set()
        spent = 0
        for _ in range(15):
            sidecar = await Sidecar.start(books)
            ids = [await sidecar.admitted(need=4, user=choose.choice("abc")) for _ in range(4)]
            await holders.checkpoint(books.connection, [checkpoint(one, output=choose.randrange(4)) for one in ids])
            await sidecar.die()
            acts: list[Any] = [reap(books), charge(books, "checkpoint"), charge(books, "hold")]
            acts += [books.settle(*[settlement(one, output=2) for one in choose.sample(ids, 3)]) for _ in range(2)]
            choose.shuffle(acts)
            for outcome in await asyncio.gather(*acts):
                results |= set(outcome) if isinstance(outcome, list) else set()
            for window in await books.windows():
                assert window.spent + window.held + window.suspense <= window.limit
            results |= set(await books.settle(*[settlement(one, output=2) for one in ids]))
            spent += 80
            window = await books.window("money")
            assert (window.spent, window.held, window.suspense, window.live) == (spent, 0, 0, 0)
        assert results >= {"settled", "already"}

    keep_books(dsn, work, connections=6)


# The keeper itself


def test_a_round_does_everything_and_tells_it(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def work(books: Books) -> None:
        caplog.set_level("INFO", "behest_ledger")
        await books.budget("money", 1000)
        sidecar = await Sidecar.start(books)
        await Sidecar.start(books)
        one = await sidecar.admitted(need=3)
        await sidecar.checkpoint(one, output=2)
        one_keeper = Keeper(dsn, grace_s=0, policy="checkpoint")
        assert await one_keeper.run_once() == IDLE
        await sidecar.die()
        report = await one_keeper.run_once()
        assert report == KeeperReport(
            working=True,
            fenced=(f"pod-1 {sidecar.holder_id}",),
            holds_to_suspense=1,
            charged_requests=1,
            charged_pico=20,
        )
        assert await one_keeper.run_once() == IDLE
        await one_keeper.aclose()
        assert [record.getMessage() for record in caplog.records] == [
            "keeping the ledger: every 5.0 s",
            f"holder pod-1 {sidecar.holder_id} is dead: fenced",
            "1 requests of dead holders went to suspense",
            "1 requests that no journal settled were charged by policy checkpoint: 0.00000000002 USD",
        ]
        assert await balances(books) == {"money": (20, 0, 0)}

    keep_books(dsn, work)


def test_a_step_that_is_refused_keeps_none_of_the_others(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def work(books: Books) -> None:
        await budgets(books)
        keeping = Keeper(dsn, grace_s=0.0)
        assert await keeping.run_once() == IDLE
        one = await in_suspense(books, need=9, seen=(0, 2))
        dead = await Sidecar.start(books)
        await dead.admitted(need=1)
        await dead.die()
        # As a window would that says something else than its holds.
        await books.connection.execute("ALTER TABLE ledger.budget_window ADD CONSTRAINT broken CHECK (suspense <= 90)")
        report = await keeping.run_once()
        await books.connection.execute("ALTER TABLE ledger.budget_window DROP CONSTRAINT broken")
        assert report.failed == ("reap",)
        assert (report.fenced, report.charged_requests) == ((), 1)
        assert await state(books, one) == "charged_by_policy"
        assert "the keeper could not reap: " in caplog.text
        assert (await keeping.run_once()).failed == ()
        await keeping.aclose()

    keep_books(dsn, work)


def test_a_keeper_leaves_suspense_alone_for_the_period_of_grace(dsn: str) -> None:
    async def work(books: Books) -> None:
        one = await in_suspense(books)
        keepers = Keeper(dsn), Keeper(dsn, grace_s=3600)
        for each in keepers:
            assert await each.run_once() == IDLE
            await each.aclose()
        await books.connection.execute("UPDATE ledger.hold SET suspense_at = suspense_at - interval '2 hours'")
        for each, charged in zip(keepers, (0, 1), strict=True):
            assert (await each.run_once()).charged_requests == charged
            await each.aclose()
        assert await state(books, one) == "charged_by_policy"

    keep_books(dsn, work)


def test_a_keeper_waits_one_ttl_before_it_reaps(dsn: str) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        ttl = "UPDATE ledger.holder SET ttl = interval '{} s' WHERE holder_id = $1"
        await sidecar.execute(ttl.format(5))
        await sidecar.die()
        # The server has been up for longer, but this session has not seen it.
        up = "SELECT clock_timestamp() - pg_postmaster_start_time() > interval '5 s'"
        while not await books.connection.fetchval(up):
            await asyncio.sleep(0.1)
        one = Keeper(dsn)
        assert (await one.run_once()).fenced == ()
        await sidecar.execute(ttl.format(0.001))
        assert len((await one.run_once()).fenced) == 1
        await one.aclose()

    keep_books(dsn, work)


def test_a_round_is_bounded_and_the_next_one_goes_on(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "BATCH_HOLDS_MAX", 2)
    monkeypatch.setattr(keeper, "BATCHES_MAX", 2)

    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        for _ in range(6):
            await sidecar.admitted()
        one = Keeper(dsn, grace_s=0, policy="hold")
        await one.run_once()
        await sidecar.die()
        reports = [await one.run_once() for _ in range(3)]
        assert [(report.holds_to_suspense, report.charged_requests, report.more) for report in reports] == [
            (4, 4, True), (2, 2, False), (0, 0, False),
        ]  # fmt: skip
        await one.aclose()

    keep_books(dsn, work)


def test_of_two_keepers_one_works_and_the_other_takes_over(dsn: str) -> None:
    async def work(books: Books) -> None:
        first, second = Keeper(dsn), Keeper(dsn)
        assert (await first.run_once()).working
        assert not (await second.run_once()).working
        assert (await first.run_once()).working
        await first.aclose()
        assert (await second.run_once()).working
        assert not (await first.run_once()).working
        await second.aclose()
        assert (await first.run_once()).working
        await first.aclose()

    keep_books(dsn, work)


def test_two_keepers_that_both_believe_to_work_do_no_harm(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        for _ in range(10):
            sidecar = await Sidecar.start(books)
            for _ in range(3):
                await sidecar.admitted(need=2)
            await sidecar.die()
            await asyncio.gather(*[reap(books) for _ in range(3)], *[charge(books, "hold") for _ in range(3)])
        await reap(books)
        await charge(books, "hold")
        assert await balances(books) == {"money": (600, 0, 0)}

    keep_books(dsn, work, connections=6)


def test_a_keeper_whose_session_ended_says_so_and_works_again(dsn: str) -> None:
    async def work(books: Books) -> None:
        one = Keeper(dsn)
        await one.run_once()
        await books.connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'behest keeper' AND datname = current_database()"
        )
        with pytest.raises(LedgerUnavailableError):
            await one.run_once()
        assert (await one.run_once()).working
        await one.aclose()

    keep_books(dsn, work)


def test_the_loop_goes_on_whatever_the_database_does(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "RETRY_FIRST_S", 0.01)

    async def work(books: Books) -> None:
        one = Keeper(dsn, interval_s=0.01)
        answers = iter([LedgerUnavailableError("away"), LedgerRefusedError("no"), SchemaError("old")])
        really = one.run_once
        rounds: list[KeeperReport] = []

        async def sometimes() -> KeeperReport:
            for error in answers:
                raise error
            rounds.append(await really())
            return rounds[-1]

        monkeypatch.setattr(one, "run_once", sometimes)
        task = asyncio.create_task(one.run())
        async with asyncio.timeout(20):
            while len(rounds) < 3:
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        # The lock was given back.
        other = Keeper(dsn)
        assert (await other.run_once()).working
        await other.aclose()

    keep_books(dsn, work)


def test_a_database_that_is_not_there_or_has_another_schema_is_no_ground_to_work(database: str) -> None:
    async def main() -> None:
        with pytest.raises(LedgerUnavailableError):
            await Keeper("postgresql://behest@127.0.0.1:1/behest?sslmode=disable").run_once()
        connection = await connect(database)
        await connection.execute("UPDATE ledger.schema_migration SET sha256 = 'x'")
        await connection.close()
        with pytest.raises(SchemaError):
            await Keeper(database).run_once()

    asyncio.run(main())


def test_partitions_are_made_ahead_but_nobody_is_kept_waiting_for_them(database: str) -> None:
    async def main() -> None:
        connection = await connect(database)
        last = await connection.fetchval(
            "SELECT max(relname) FROM pg_class WHERE relname ~ '^hold_[0-9]' AND relkind = 'r'"
        )
        await connection.execute(f"DROP TABLE ledger.{last}; DROP TABLE ledger.{last.replace('hold', 'posting')}")
        one = Keeper(database)
        async with connection.transaction():
            await connection.execute("LOCK TABLE ledger.hold IN ROW EXCLUSIVE MODE")
            assert await one.run_once() == IDLE
        assert (await one.run_once()).partitions_made == 2
        assert await one.run_once() == IDLE
        assert await connection.fetchval(f"SELECT to_regclass('ledger.{last}') IS NOT NULL")
        await one.aclose()
        await connection.close()

    asyncio.run(main())


def test_holders_of_long_ago_are_forgotten(dsn: str) -> None:
    async def work(books: Books) -> None:
        old, _ = await Sidecar.start(books), await Sidecar.start(books)
        await old.execute("UPDATE ledger.holder SET fenced_at = now() - interval '8 days' WHERE holder_id = $1")
        one = Keeper(dsn)
        assert (await one.run_once()).holders_pruned == 1
        await one.aclose()

    keep_books(dsn, work)
