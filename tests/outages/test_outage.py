"""The database goes away or stands still: streams live on what they hold, nobody is admitted, the books come right."""

import asyncio
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from behest_ledger.store.migrate import migrate
from behest_proxy.identity.keys import SigningKey
from conftest import Server, own_database
from outage import Away, away_stack
from readers import Reader
from stack import process, wait_until
from torture.cluster import Database


@pytest.fixture(scope="module")
def one(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Away]:
    with own_database(template, "outage") as dsn, away_stack(dsn, tmp_path_factory.mktemp("outage")) as away:
        yield away


@pytest.fixture
def away(one: Away) -> Iterator[Away]:
    """The sidecar with its ledger there, before and after."""
    one.until_ready()
    yield one
    one.wire.back()


@pytest.mark.parametrize("how", ["away", "stall"])
def test_streams_go_on_without_the_database_on_the_credit_they_hold(away: Away, how: str) -> None:
    project, token = away.project()
    stream = away.reader(token, output_tokens=400, chunk_interval_ms=5).begun()
    getattr(away.wire, how)()
    assert stream.ended().done
    assert (stream.chunks, stream.code) == (400, None)
    away.wire.back()
    (row,) = away.all_is_settled(project, requests=1)
    assert (row["outcome"], row["output_tokens"]) == ("completed", 400)


@pytest.mark.parametrize("how", ["away", "stall"])
def test_nobody_is_admitted_without_the_database_and_is_told_so_soon(away: Away, how: str) -> None:
    project, token = away.project()
    seen_before = len(away.stack.sim_requests())
    getattr(away.wire, how)()
    refused = [away.reader(token, output_tokens=5).asked() for _ in range(4)]
    assert {(one.status, one.code, one.headers["retry-after"]) for one in refused} == {(503, "ledger_unavailable", "1")}
    # The first finds out; afterwards it is known.
    assert max(one.took_s for one in refused) < 7
    assert min(one.took_s for one in refused) < 2
    assert len(away.stack.sim_requests()) == seen_before
    away.wire.back()
    away.until_ready()
    assert away.reader(token, output_tokens=5).asked().done
    away.all_is_settled(project, requests=1)


@pytest.mark.parametrize("how", ["away", "stall"])
def test_a_stream_that_needs_credit_while_the_database_is_away_ends_and_is_counted(away: Away, how: str) -> None:
    project, token = away.project()
    stream = away.reader(token, output_tokens=100_000, chunk_interval_ms=2).begun()
    getattr(away.wire, how)()
    began_s = time.monotonic()
    stream.ended()
    assert 4 < time.monotonic() - began_s < 15
    assert (stream.code, stream.done) == ("ledger_unavailable", True)
    away.wire.back()
    (row,) = away.all_is_settled(project, requests=1)
    assert (row["outcome"], row["output_tokens"]) == ("ledger_unavailable", stream.chunks)


@pytest.mark.parametrize("how", ["away", "stall"])
def test_a_stream_that_needs_credit_outlives_a_short_outage(away: Away, how: str) -> None:
    project, token = away.project()
    streams = [away.reader(token, output_tokens=2_000, chunk_interval_ms=1).begun() for _ in range(5)]
    getattr(away.wire, how)()
    time.sleep(2)
    away.wire.back()
    assert [(stream.ended().chunks, stream.code, stream.done) for stream in streams] == [(2_000, None, True)] * 5
    rows = away.all_is_settled(project, requests=5)
    assert [row["output_tokens"] for row in rows] == [2_000] * 5


def test_everything_drains_after_an_outage_with_many_streams_in_it(away: Away) -> None:
    project, token = away.project(limit_usd="0.01")
    streams = [
        away.reader(token, output_tokens=tokens, chunk_interval_ms=3).begun()
        for tokens in [20, 100, 300, 300, 300, 1_500, 1_500]
    ]
    for _ in range(3):
        away.wire.away()
        time.sleep(0.3)
        away.wire.back()
        time.sleep(0.2)
        away.wire.cut()
    for stream in streams:
        stream.ended()
    rows = {row["request_id"]: row for row in away.all_is_settled(project, requests=len(streams))}
    assert all(stream.done for stream in streams)
    assert [rows[stream.request_id]["output_tokens"] for stream in streams] == [stream.chunks for stream in streams]


def test_without_a_word_from_the_ledger_streams_end_at_the_deadline_of_their_holder(
    database: str, tmp_path: Path
) -> None:
    with away_stack(database, tmp_path, BEHEST_HOLDER_TTL_S="3") as away:
        project, token = away.project()
        # It needs no more credit: the answer's limit is held.
        stream = away.reader(token, output_tokens=500, chunk_interval_ms=50).begun()
        away.wire.away()
        began_s = time.monotonic()
        stream.ended()
        assert time.monotonic() - began_s < 8
        assert (stream.code, stream.done) == ("ledger_unavailable", True)
        away.wire.back()
        (row,) = away.all_is_settled(project, requests=1)
        assert (row["outcome"], row["output_tokens"]) == ("ledger_unavailable", stream.chunks)


@pytest.mark.parametrize("how", ["away", "stall"])
def test_a_sidecar_that_stops_while_the_database_is_away_settles_when_it_comes_back(
    database: str, tmp_path: Path, how: str
) -> None:
    with away_stack(database, tmp_path, BEHEST_DRAIN_S="0.3") as away:
        project, token = away.project()
        live = away.reader(token, output_tokens=400, chunk_interval_ms=20).begun()
        ended = away.reader(token, output_tokens=300, chunk_interval_ms=5).begun()
        getattr(away.wire, how)()
        ended.ended()
        away.stack.sidecar.send_signal(signal.SIGTERM)
        live.ended()
        assert (live.code, live.done) == ("draining", True)
        assert away.stack.sidecar.wait(60) == 0
        assert not away.stack.query("SELECT FROM ledger.request")
        away.wire.back()
        away.stack.start_sidecar()
        rows = {row["request_id"]: row for row in away.all_is_settled(project, requests=2)}
        assert rows[ended.request_id]["outcome"] == "completed"
        assert rows[ended.request_id]["output_tokens"] == 300
        assert rows[live.request_id]["outcome"] == "draining"
        assert rows[live.request_id]["output_tokens"] == live.chunks


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of another process can be set on Linux only")
def test_on_a_full_disk_nobody_is_admitted_and_streams_go_on_with_the_credit_they_hold(
    database: str, tmp_path: Path
) -> None:
    with away_stack(database, tmp_path) as away:
        project, token = away.project()
        stream = away.reader(token, output_tokens=400, chunk_interval_ms=5).begun()
        pid = away.stack.sidecar.pid
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        # No file of it may grow any more, also not the journal.
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, limits[1]))
        refused = away.reader(token, output_tokens=5).asked()
        assert (refused.status, refused.code) == (503, "ledger_unavailable")
        assert refused.headers["retry-after"] == "1"
        assert stream.ended().done
        assert stream.chunks == 400
        away.all_is_settled(project, requests=1)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

        def is_served() -> bool:
            return Reader(away.stack.base_url, token, output_tokens=5).asked().done

        wait_until(is_served, what="the end of the full disk")
        away.all_is_settled(project, requests=2)


@pytest.fixture(scope="module")
def server() -> Iterator[Database]:
    """A PostgreSQL that may be stopped."""
    # Not pytest's own folder: that is closed to others, and root's PostgreSQL runs as somebody else.
    with tempfile.TemporaryDirectory(prefix="behest-outage-") as name:
        Path(name).chmod(0o711)
        database = Database(Path(name) / "data")
        try:
            asyncio.run(migrate(database.dsn))
            yield database
        finally:
            database.stop()


@pytest.mark.parametrize("how", ["fast", "immediate", "kill"])
def test_streams_outlive_a_restart_of_postgresql(
    server: Database, tmp_path: Path, how: Literal["fast", "immediate", "kill"]
) -> None:
    with away_stack(server.dsn, tmp_path) as away:
        project, token = away.project(limit_usd="1")
        # What they hold lasts for ten seconds: a busy machine needs half of it to recover the database.
        streams = [away.reader(token, output_tokens=700, chunk_interval_ms=20).begun() for _ in range(6)]
        server.kill() if how == "kill" else server.shut_down(how)
        refused = away.reader(token, output_tokens=5).asked()
        assert (refused.status, refused.code) == (503, "ledger_unavailable")
        server.start()
        assert [(stream.ended().chunks, stream.code, stream.done) for stream in streams] == [(700, None, True)] * 6
        rows = away.all_is_settled(project, requests=6)
        assert [row["output_tokens"] for row in rows] == [700] * 6


def test_a_sidecar_that_starts_while_its_database_is_away_waits_for_it(database: str, tmp_path: Path) -> None:
    with away_stack(database, tmp_path) as away:
        project, token = away.project()
        stream = away.reader(token, output_tokens=5_000, chunk_interval_ms=5).begun()
        away.wire.away()
        away.stack.kill_sidecar()
        stream.ended()
        started = threading.Thread(target=away.stack.start_sidecar)
        started.start()
        wait_until(lambda: "trying again" in away.stack.log.read_text(), what="the first attempt")
        away.wire.back()
        started.join(30)
        away.until_ready()
        (row,) = away.all_is_settled(project, requests=1)
        assert row["outcome"] == "crashed"
        assert stream.chunks <= row["output_tokens"] <= stream.chunks + 64


def test_a_sidecar_that_waits_for_its_database_stops_when_it_is_told_to(tmp_path: Path) -> None:
    key, log = tmp_path / "signing.pem", tmp_path / "sidecar.log"
    key.write_bytes(SigningKey.generate().private_pem())
    environment = {"BEHEST_DATABASE_URL": "postgresql://x@127.0.0.1:1/x", "BEHEST_SIGNING_KEY_FILE": str(key)}
    arguments = [sys.executable, "-I", "-m", "behest_proxy.cli.main", "proxy"]
    with process(arguments, environment=environment, log=log) as waiting:
        wait_until(lambda: "trying again" in log.read_text(), what="the first attempt")
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(60) == 0
