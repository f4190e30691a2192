from datetime import UTC, datetime
from uuid import RFC_4122

from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.request_id import request_id
from ledger.books import Books, keep_books

TIMES = st.integers(0, 2**48 - 1)
BITS = st.integers(0, 2**80)


@given(TIMES, BITS)
def test_an_id_is_a_uuid_of_version_7_with_its_time_in_front(unix_ms: int, bits: int) -> None:
    made = request_id(unix_ms, bits)
    assert (made.version, made.variant) == (7, RFC_4122)
    assert made.int >> 80 == unix_ms


@given(TIMES, TIMES, BITS, BITS)
def test_ids_are_in_the_order_of_their_times(one: int, other: int, bits: int, more_bits: int) -> None:
    if one < other:
        assert request_id(one, bits) < request_id(other, more_bits)


@given(TIMES, st.integers(0, 2**74 - 1), st.integers(0, 2**74 - 1))
def test_all_74_random_bits_count(unix_ms: int, bits: int, others: int) -> None:
    assert (request_id(unix_ms, bits) == request_id(unix_ms, others)) == (bits == others)


def test_the_database_reads_the_month_of_an_id_as_we_wrote_it(dsn: str) -> None:
    months = {
        datetime(2026, 1, 1, tzinfo=UTC): "2026-01-01",
        datetime(2026, 1, 31, 23, 59, 59, 999000, tzinfo=UTC): "2026-01-01",
        datetime(2026, 2, 1, tzinfo=UTC): "2026-02-01",
        datetime(1970, 1, 1, tzinfo=UTC): "1970-01-01",
    }

    async def work(books: Books) -> None:
        async with books.connection.acquire() as connection:
            # The month is that of UTC, whatever zone the session has.
            await connection.execute("SET TIME ZONE 'Pacific/Kiritimati'")
            for moment, month in months.items():
                made = request_id(round(moment.timestamp() * 1000), 5)
                assert await connection.fetchval("SELECT ledger.month_of_v1($1)::text", made) == month

    keep_books(dsn, work)
