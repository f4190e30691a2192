"""What the ledger did and nobody heard of, and what it could not do at once: nothing moves twice, nothing is lost."""

import asyncio
import contextlib
import time
from collections.abc import Generator, Iterator

import pytest

from behest_ledger.store.pool import connect
from conftest import Server, own_database
from faulty_wire import Way
from outage import Away, away_stack
from stack import wait_until


@pytest.fixture(scope="module")
def one(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Away]:
    with own_database(template, "lost_answers") as dsn, away_stack(dsn, tmp_path_factory.mktemp("outage")) as away:
        yield away


@pytest.fixture
def away(one: Away) -> Iterator[Away]:
    """The sidecar with its ledger there, before and after."""
    one.until_ready()
    yield one
    one.wire.back()


def _let_late_ones_through(away: Away, way: Way) -> None:
    if way == "late":
        wait_until(lambda: away.wire.wire.hits, what="the fault")
        time.sleep(0.5)  # what was lost is asked again before
        away.wire.let_late_ones_through()


@pytest.mark.parametrize("way", ["lost", "silent", "late"])
def test_an_admission_whose_answer_was_lost_is_voided_and_holds_nothing(away: Away, way: Way) -> None:
    project, token = away.project()
    seen_before = len(away.stack.sim_requests())
    away.wire.spoil("ledger.admit_", way)
    refused = away.reader(token, output_tokens=5).asked()
    assert (refused.status, refused.code) == (503, "ledger_unavailable")
    assert refused.took_s < 8
    assert len(away.stack.sim_requests()) == seen_before
    _let_late_ones_through(away, way)

    def is_void() -> bool:
        rows = away.stack.query("SELECT state FROM ledger.hold WHERE request_id::text = $1", refused.request_id)
        return [row["state"] for row in rows] in (["void"], ["settled"])

    wait_until(is_void, what="the void")
    served = away.reader(token, output_tokens=5).asked()
    assert served.done
    (row,) = away.all_is_settled(project, requests=1)
    assert row["request_id"] == served.request_id


@pytest.mark.parametrize("way", ["lost", "silent", "late"])
def test_an_extension_whose_answer_was_lost_is_asked_again_and_granted_once(away: Away, way: Way) -> None:
    project, token = away.project()
    away.wire.spoil("ledger.extend_", way)
    stream = away.reader(token, output_tokens=700, chunk_interval_ms=1).asked()
    assert (stream.chunks, stream.code, stream.done) == (700, None, True)
    _let_late_ones_through(away, way)
    (row,) = away.all_is_settled(project, requests=1)
    assert (row["outcome"], row["output_tokens"]) == ("completed", 700)


@pytest.mark.parametrize("way", ["lost", "silent", "late"])
def test_settlements_whose_answer_was_lost_are_sent_again_and_charged_once(away: Away, way: Way) -> None:
    project, token = away.project()
    away.wire.spoil("ledger.settle_", way)
    streams = [away.reader(token, output_tokens=20, chunk_interval_ms=1) for _ in range(5)]
    for stream in streams:
        stream.start()
    assert all(stream.ended().done for stream in streams)
    if way == "late":
        # Others settle what it carries, and then it comes.
        rows = project.settled(number=5)
        away.wire.let_late_ones_through()
        time.sleep(0.5)
    rows = away.all_is_settled(project, requests=5)
    assert [row["output_tokens"] for row in rows] == [20] * 5


@contextlib.contextmanager
def _conflicts(away: Away, *, when: str, state: str, times: int) -> Generator[None]:
    """The next statements of that kind fail with this SQLSTATE, as often as said."""

    async def execute(text: str) -> None:
        connection = await connect(away.stack.dsn)
        try:
            await connection.execute(text)
        finally:
            await connection.close()

    asyncio.run(
        execute(f"""
            CREATE SEQUENCE public.faults;
            GRANT ALL ON SEQUENCE public.faults TO PUBLIC;
            CREATE FUNCTION public.fault() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF nextval('public.faults') <= {times} THEN
                    RAISE EXCEPTION 'a conflict' USING ERRCODE = '{state}';
                END IF;
                RETURN NEW;
            END
            $$;
            CREATE TRIGGER fault BEFORE {when} FOR EACH ROW EXECUTE FUNCTION public.fault();
        """)
    )
    try:
        yield
        (row,) = away.stack.query("SELECT last_value FROM public.faults")
        assert row["last_value"] > times, "it was not asked again"
    finally:
        asyncio.run(execute("DROP FUNCTION public.fault() CASCADE; DROP SEQUENCE public.faults"))


@pytest.mark.parametrize("state", ["40P01", "40001"])
@pytest.mark.parametrize(
    ("when", "times"),
    [
        ("INSERT ON ledger.hold", 2),
        ("UPDATE ON ledger.hold", 7),
        ("INSERT ON ledger.request", 7),
        ("INSERT ON ledger.posting", 2),
    ],
)
def test_deadlocks_and_serialisation_failures_are_asked_again(away: Away, when: str, times: int, state: str) -> None:
    project, token = away.project()
    with _conflicts(away, when=when, state=state, times=times):
        stream = away.reader(token, output_tokens=700, chunk_interval_ms=1).asked()
        assert (stream.chunks, stream.code, stream.done) == (700, None, True)
        (row,) = away.all_is_settled(project, requests=1)
    assert (row["outcome"], row["output_tokens"]) == ("completed", 700)


def test_a_window_that_another_session_locks_fails_closed_and_soon(away: Away) -> None:
    project, token = away.project()
    stream = away.reader(token, output_tokens=100_000, chunk_interval_ms=2).begun()

    async def locked() -> None:
        connection = await connect(away.stack.dsn)
        try:
            async with connection.transaction():
                await connection.execute(
                    "SELECT FROM ledger.budget_window WHERE tenant_id = $1 FOR UPDATE", project.namespace
                )
                refused = await asyncio.to_thread(away.reader(token, output_tokens=5).asked)
                assert (refused.status, refused.code) == (503, "ledger_unavailable")
                assert refused.took_s < 6
                await asyncio.to_thread(stream.ended)
        finally:
            await connection.close()

    asyncio.run(locked())
    assert (stream.code, stream.done) == ("ledger_unavailable", True)
    assert away.reader(token, output_tokens=5).asked().done
    rows = {row["request_id"]: row for row in away.all_is_settled(project, requests=2)}
    assert rows[stream.request_id]["output_tokens"] == stream.chunks
