"""Which window a request falls into: only the database says so, by its own clock."""

import asyncio
import random
from calendar import monthrange
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import pytest

from behest_ledger.configuration.rules import is_zone
from behest_ledger.holds import Granted
from behest_ledger.request_id import request_id
from ledger.books import Books, granted, keep_books, refused, settlement, total

Bounds = tuple[datetime, datetime | None]


async def bounds(connection: Any, period: str, alignment: str, zone: str, at: str) -> Bounds:
    row = await connection.fetchrow(
        "SELECT * FROM ledger.window_bounds_v1($1, $2, $3, $4::text::timestamptz)", period, alignment, zone, at
    )
    return row["starts_at"], row["ends_at"]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


# period, alignment, zone, at, starts, ends
BOUNDS = [
    ("minute", "calendar", "UTC", "2026-03-04T05:06:07.8Z", "2026-03-04T05:06:00Z", "2026-03-04T05:07:00Z"),
    ("hour", "calendar", "UTC", "2026-03-04T05:06:07Z", "2026-03-04T05:00:00Z", "2026-03-04T06:00:00Z"),
    # Half an hour beside UTC, the hour is that of the zone.
    ("hour", "calendar", "Asia/Kolkata", "2026-03-04T05:06:07Z", "2026-03-04T04:30:00Z", "2026-03-04T05:30:00Z"),
    ("day", "calendar", "Europe/Berlin", "2026-01-10T22:59:59Z", "2026-01-09T23:00:00Z", "2026-01-10T23:00:00Z"),
    ("day", "calendar", "Europe/Berlin", "2026-01-10T23:00:00Z", "2026-01-10T23:00:00Z", "2026-01-11T23:00:00Z"),
    # The clock goes forward: 23 hours; it goes back: 25 hours.
    ("day", "calendar", "Europe/Berlin", "2026-03-29T12:00:00Z", "2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z"),
    ("day", "calendar", "Europe/Berlin", "2026-10-25T12:00:00Z", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"),
    # The hour that comes twice is two windows.
    ("hour", "calendar", "Europe/Berlin", "2026-10-25T00:30:00Z", "2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z"),
    ("hour", "calendar", "Europe/Berlin", "2026-10-25T01:30:00Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z"),
    # A clock that changes at midnight: the day has no 00:00, and still ends at the next one.
    ("day", "calendar", "Africa/Cairo", "2024-04-26T10:00:00Z", "2024-04-25T22:00:00Z", "2024-04-26T21:00:00Z"),
    ("hour", "calendar", "Asia/Kathmandu", "2026-03-04T05:06:07Z", "2026-03-04T04:15:00Z", "2026-03-04T05:15:00Z"),
    ("day", "calendar", "Asia/Kathmandu", "2026-03-04T18:14:59Z", "2026-03-03T18:15:00Z", "2026-03-04T18:15:00Z"),
    # A midnight that comes twice: the day begins with the second one, and the hour before is the end of the day before.
    ("day", "calendar", "America/Havana", "2025-11-02T04:30:00Z", "2025-11-01T04:00:00Z", "2025-11-02T05:00:00Z"),
    ("day", "calendar", "America/Havana", "2025-11-02T05:30:00Z", "2025-11-02T05:00:00Z", "2025-11-03T05:00:00Z"),
    # A midnight that never comes.
    ("day", "calendar", "America/Havana", "2025-03-09T05:30:00Z", "2025-03-09T05:00:00Z", "2025-03-10T04:00:00Z"),
    # A day that never came: west of the date line one evening, east of it the next morning.
    ("day", "calendar", "Pacific/Apia", "2011-12-30T09:59:59Z", "2011-12-29T10:00:00Z", "2011-12-30T10:00:00Z"),
    ("day", "calendar", "Pacific/Apia", "2011-12-30T10:00:00Z", "2011-12-30T10:00:00Z", "2011-12-31T10:00:00Z"),
    ("month", "calendar", "UTC", "2028-02-29T12:00:00Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"),
    ("month", "rolling", "UTC", "2028-01-31T05:06:07Z", "2028-01-31T05:06:07Z", "2028-02-29T05:06:07Z"),
    ("day", "rolling", "UTC", "2028-02-28T12:00:00Z", "2028-02-28T12:00:00Z", "2028-02-29T12:00:00Z"),
    # The week between two years belongs to the year of its Thursday, and is one week all the same.
    ("week", "calendar", "UTC", "2027-01-01T12:00:00Z", "2026-12-28T00:00:00Z", "2027-01-04T00:00:00Z"),
    # Weeks begin on Monday.
    ("week", "calendar", "UTC", "2026-03-01T23:59:59Z", "2026-02-23T00:00:00Z", "2026-03-02T00:00:00Z"),
    ("week", "calendar", "UTC", "2026-03-02T00:00:00Z", "2026-03-02T00:00:00Z", "2026-03-09T00:00:00Z"),
    ("week", "calendar", "Europe/Berlin", "2026-03-25T00:00:00Z", "2026-03-22T23:00:00Z", "2026-03-29T22:00:00Z"),
    ("month", "calendar", "America/New_York", "2026-03-01T04:59:59Z", "2026-02-01T05:00:00Z", "2026-03-01T05:00:00Z"),
    ("month", "calendar", "America/New_York", "2026-03-15T00:00:00Z", "2026-03-01T05:00:00Z", "2026-04-01T04:00:00Z"),
    ("minute", "rolling", "UTC", "2026-03-04T05:06:07.8Z", "2026-03-04T05:06:07.8Z", "2026-03-04T05:07:07.8Z"),
    ("day", "rolling", "UTC", "2026-03-04T05:06:07Z", "2026-03-04T05:06:07Z", "2026-03-05T05:06:07Z"),
    # The same time of day in the budget's zone, not in that of the session.
    ("day", "rolling", "Europe/Berlin", "2026-03-28T12:00:00Z", "2026-03-28T12:00:00Z", "2026-03-29T11:00:00Z"),
    ("week", "rolling", "UTC", "2026-03-04T05:06:07Z", "2026-03-04T05:06:07Z", "2026-03-11T05:06:07Z"),
    ("month", "rolling", "UTC", "2026-01-31T05:06:07Z", "2026-01-31T05:06:07Z", "2026-02-28T05:06:07Z"),
]


def test_the_bounds_of_windows(dsn: str) -> None:
    async def work(books: Books) -> None:
        async with books.connection.acquire() as connection:
            # Whatever zone the session happens to have.
            await connection.execute("SET TIME ZONE 'America/Los_Angeles'")
            for period, alignment, zone, at, starts, ends in BOUNDS:
                found = await bounds(connection, period, alignment, zone, at)
                assert found == (moment(starts), moment(ends)), (period, alignment, zone, at)
            lifetime = await bounds(connection, "lifetime", "calendar", "UTC", BOUNDS[0][3])
            assert lifetime == (moment(BOUNDS[0][3]), None)

    keep_books(dsn, work)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Africa/Cairo", "Australia/Lord_Howe", "America/Havana"])
def test_windows_follow_each_other_without_gap_or_overlap(dsn: str, zone: str) -> None:
    async def work(books: Books) -> None:
        for period in ("hour", "day", "week", "month"):
            begin = datetime(2024, 1, 1, tzinfo=UTC)
            end = begin + timedelta(days=14 if period == "hour" else 800)
            wrong = await books.connection.fetch(
                """
                SELECT at, w.starts_at, w.ends_at, n.starts_at AS next_at FROM generate_series($3::timestamptz,
                    $4::timestamptz, $5::interval) AS at
                CROSS JOIN LATERAL ledger.window_bounds_v1($1, 'calendar', $2, at) AS w
                CROSS JOIN LATERAL ledger.window_bounds_v1($1, 'calendar', $2, w.ends_at) AS n
                WHERE at < w.starts_at OR at >= w.ends_at OR n.starts_at <> w.ends_at OR w.starts_at >= w.ends_at""",
                period, zone, begin, end, timedelta(minutes=61) if period == "hour" else timedelta(hours=7),
            )  # fmt: skip
            assert wrong == []

    keep_books(dsn, work)


def in_zone(local: datetime, zone: ZoneInfo) -> datetime:
    """A local time as PostgreSQL reads it: of a time that comes twice the second, of one that never comes the later."""
    early, late = (local.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    comes_twice = early < late
    return late if comes_twice else early


def next_local(period: str, local: datetime) -> datetime:
    """A local time one period later; the last day of a month that is too short."""
    if period == "month":
        year, month = divmod(local.year * 12 + local.month, 12)
        return local.replace(year=year, month=month + 1, day=min(local.day, monthrange(year, month + 1)[1]))
    return local + timedelta(days={"day": 1, "week": 7}[period])


def expected_bounds(period: str, alignment: str, zone: ZoneInfo, at: datetime) -> Bounds:
    """The rule of windows, once more and from the other end: the last boundary that has come, and the one after it."""
    local = at.astimezone(zone).replace(tzinfo=None)
    if period in ("minute", "hour"):
        back = timedelta(seconds=local.second, microseconds=local.microsecond)
        back += timedelta(minutes=local.minute) if period == "hour" else timedelta()
        starts = at if alignment == "rolling" else at - back
        return starts, starts + timedelta(**{f"{period}s": 1})
    if alignment == "rolling":
        return at, in_zone(next_local(period, local), zone)
    boundary = local.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=40)
    while (period == "week" and boundary.weekday()) or (period == "month" and boundary.day != 1):
        boundary += timedelta(days=1)
    while in_zone(next_local(period, boundary), zone) <= at:
        boundary = next_local(period, boundary)
    return in_zone(boundary, zone), in_zone(next_local(period, boundary), zone)


@pytest.mark.parametrize("seed", range(3))
def test_windows_are_those_of_another_library_at_any_time_in_any_zone(dsn: str, seed: int) -> None:
    chance = random.Random(seed)
    begin = datetime(2000, 1, 1, tzinfo=UTC)

    async def work(books: Books) -> None:
        known = {row["name"] for row in await books.connection.fetch("SELECT name FROM pg_timezone_names")}
        zones = sorted(name for name in known & available_timezones() if is_zone(name))
        assert len(zones) > 400
        cases = list[tuple[str, str, str, datetime]]()
        for _ in range(1500):
            zone = chance.choice(zones)
            at = begin + timedelta(microseconds=chance.randrange(23 * 365 * 86_400 * 10**6))
            if chance.random() < 0.5:  # near the clock's changes, which are at night
                month, day = chance.choice([3, 4, 9, 10, 11]), chance.randrange(1, 29)
                at = (
                    at.astimezone(ZoneInfo(zone))
                    .replace(month=month, day=day, hour=chance.randrange(4))
                    .astimezone(UTC)
                )
            alignment = chance.choice(["calendar", "calendar", "rolling"])
            cases.append((chance.choice(["minute", "hour", "day", "week", "month"]), alignment, zone, at))
        rows = await books.connection.fetch(
            "SELECT w.starts_at, w.ends_at FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[])"
            " WITH ORDINALITY AS c (period, alignment, zone, at, place),"
            " LATERAL ledger.window_bounds_v1(c.period, c.alignment, c.zone, c.at) AS w ORDER BY c.place",
            *(list(column) for column in zip(*cases, strict=True)),
        )
        for case, row in zip(cases, rows, strict=True):
            period, alignment, zone, at = case
            assert tuple(row) == expected_bounds(period, alignment, ZoneInfo(zone), at), case
            assert row["starts_at"] <= at < row["ends_at"], case

    keep_books(dsn, work)


@pytest.mark.parametrize(("period", "alignment"), [("day", "calendar"), ("hour", "rolling")])
def test_a_new_window_opens_when_the_last_has_ended(dsn: str, period: str, alignment: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("b", 100, period=period, alignment=alignment)
        for periods in (2, 1):
            granted((await books.admit(need=10))[1])
            refused((await books.admit(need=1))[1])
            await books.age("b", f"{periods} {period}")
        assert [window.held for window in await books.windows("b")] == [100, 100]
        granted((await books.admit(need=1))[1])

    keep_books(dsn, work)


def test_the_first_requests_of_a_new_subject_all_get_the_same_window_and_all_that_it_can_pay(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("first", 1500, per=["user"], period="hour", alignment="rolling")
        await books.budget("second", 10**6, per=["session"], period="minute", alignment="rolling")
        answers = await asyncio.gather(*(books.admit(need=1) for _ in range(200)))
        assert sum(isinstance(answer, Granted) for _, answer in answers) == 150
        window = await books.window("first")
        assert (window.held, window.live) == (1500, 150)
        assert len(await books.windows("second")) == 1

    keep_books(dsn, work, connections=8)


@pytest.mark.parametrize("alignment", ["rolling", "calendar"])
def test_the_first_requests_after_the_end_of_a_window_all_get_the_same_new_one(dsn: str, alignment: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("hours", 200, period="hour", alignment=alignment)
        for again in (3, 2, 1):
            answers = await asyncio.gather(*(books.admit(need=1) for _ in range(40)))
            assert sum(isinstance(answer, Granted) for _, answer in answers) == 20
            await books.age("hours", f"{again} hour")
        assert [window.held for window in await books.windows("hours")] == [200] * 3

    keep_books(dsn, work, connections=8)


def test_many_new_subjects_at_once_get_one_window_each(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("a", 20, per=["user"], period="hour", alignment="rolling")
        await books.budget("b", 10**6, per=["session"], period="hour", alignment="rolling")
        answers = await asyncio.gather(
            *(books.admit(need=1, user=f"u{n % 25}", session=f"s{n % 3}") for n in range(100))
        )
        assert sum(isinstance(answer, Granted) for _, answer in answers) == 50
        assert [window.held for window in await books.windows("a")] == [20] * 25
        assert total(await books.windows("b")) == 500

    keep_books(dsn, work, connections=8)


def test_a_month_that_nobody_made_a_partition_for_is_kept_and_blocks_no_later_one(database: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("money", 1000)
        late = request_id(int(datetime(2001, 5, 6, tzinfo=UTC).timestamp() * 1000), 1)
        granted((await books.admit(id=late, need=1))[1])
        made = "SELECT ledger.make_partitions_v1('2001-04-01', 3)"
        tables = await books.connection.fetchval(
            "SELECT count(*) FROM pg_class WHERE relnamespace = 'ledger'::regnamespace AND relkind = 'p'"
        )
        # Three months of every table, without May, which has rows in the default partitions of three tables.
        assert await books.connection.fetchval(made) == 3 * tables - 3
        assert await books.connection.fetchval(made) == 0
        assert await books.settle(settlement(late, output=1)) == ["settled"]
        assert await books.balances("money") == (10, 0, 0, 0)

    keep_books(database, work)
