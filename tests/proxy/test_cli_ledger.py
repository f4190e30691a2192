"""`behest ledger` from the command line, against a real PostgreSQL."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from behest_ledger.store.pool import connect
from behest_proxy.cli.main import main
from behest_proxy.cli.preflight import free_port
from ledger.books import Books, keep_books, settlement
from ledger.sealing import seal_all
from ledger.sidecars import Sidecar, state
from ledger.test_store_retention import OLD, OLDER, id_of, put_away, two_months
from stack import wait_until

UNSENT = id_of(OLD, 2)
KEEP = [sys.executable, "-I", "-m", "behest_proxy.cli.main", "ledger", "keep", "--interval", "0.2"]


def ledger(*argv: str) -> int:
    return main(["ledger", *argv])


def test_top_shows_what_running_requests_have_cost_so_far(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        await books.settle(settlement(await sidecar.admitted(), input=1, output=3))
        await sidecar.checkpoint(await sidecar.admitted(), input=2, output=5)

    keep_books(database, work)
    assert ledger("top", "--database-url", database) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[-8:] == ["REQUESTS", "LIVE", "INPUT", "OUTPUT", "COST", "(USD)", "LIVE", "(USD)"]
    assert row.split() == ["s1", "ann", "small", "demo/shop", "1", "1", "3", "8", "0.000000000089", "0.000000000056"]


def metrics_at(address: str) -> str:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://{address}/metrics").text
    return ""


def test_keep_ends_what_a_dead_sidecar_left_and_stops_when_told(database: str, tmp_path: Path) -> None:
    ids: list[Any] = []

    async def before(books: Books) -> None:
        sidecar = await Sidecar.start(books)
        ids.append(await sidecar.admitted(need=2))
        await sidecar.die()

    async def look() -> str:
        connection = await connect(database)
        try:
            return await state(Books(database, connection), ids[0])
        finally:
            await connection.close()

    keep_books(database, before)
    log = tmp_path / "log"
    address = f"127.0.0.1:{free_port(0)}"
    how = ["--grace-hours", "0", "--policy", "hold", "--metrics", address]
    with log.open("wb") as output:
        keeper = subprocess.Popen([*KEEP, *how, "--database-url", database], stderr=output, stdout=output)
    try:
        wait_until(lambda: asyncio.run(look()) == "charged_by_policy", what="the keeper's work")
        wait_until(lambda: "behest_keeper_policy_charges_total 1.0" in metrics_at(address), what="its metrics")
        wait_until(lambda: "behest_ledger_suspense 0.0" in metrics_at(address), what="its look at the books")
        page = metrics_at(address)
        assert "behest_keeper_reaped_total 1.0" in page
        assert (
            "behest_keeper_policy_cost_USD_total 2e-011" in page or "behest_keeper_policy_cost_USD_total 2e-11" in page
        )
        os.kill(keeper.pid, signal.SIGTERM)
        assert keeper.wait(60) == 0
    finally:
        keeper.kill()
        keeper.wait()
    lines = log.read_text().splitlines()
    assert [" ".join(line.split(" ")[2:4]) for line in lines] == [
        "INFO behest_ledger.store.keeper:",
        "WARNING behest_ledger.store.keeper:",
        "WARNING behest_ledger.store.keeper:",
        "WARNING behest_ledger.store.keeper:",
    ]
    assert lines[1].endswith("is dead: fenced")
    assert "1 requests of dead holders went to suspense" in lines[2]
    assert "charged by policy hold: 0.00000000002 USD" in lines[3]


def test_verify_prints_the_newest_seals_and_compares_what_was_printed_before(
    database: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def work(books: Books) -> None:
        for tenant in ("acme", "other tenant"):
            one, _ = await books.admit(tenant=tenant)
            await books.settle(settlement(one, output=1, tenant=tenant))
        await seal_all(books)

    async def forge() -> None:
        connection = await connect(database)
        async with connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute("DELETE FROM ledger.seal WHERE tenant_id = 'acme'")
            await connection.execute("UPDATE ledger.usage_line SET source = 'local'")
        await connection.close()

    keep_books(database, work)
    assert ledger("verify", "--database-url", database) == 0
    first = capsys.readouterr()
    lines = first.out.splitlines()
    assert first.err == ""
    assert [(line.split()[:2], line[7 + 65 :]) for line in lines[1:]] == [
        (["seal", "1"], "acme"), (["seal", "1"], "other tenant"),
    ]  # fmt: skip
    noted = tmp_path / "noted.txt"
    noted.write_text(first.out)
    keep_books(database, work)
    assert ledger("verify", "--against", str(noted), "--database-url", database) == 0
    capsys.readouterr()
    asyncio.run(forge())
    keep_books(database, work, clean=False)
    assert ledger("verify", "--against", str(noted), "--database-url", database) == 1
    shown = capsys.readouterr().out
    assert (
        f"a seal that was noted is still in its chain: seal 1 of acme: expected {lines[1].split()[2]}, found" in shown
    )
    assert "seal 1 of other tenant: " not in shown.partition("noted is still")[2]
    noted.write_text("nothing\n")
    for name in (noted, tmp_path / "none"):
        assert ledger("verify", "--against", str(name), "--database-url", database) == 2
        assert str(name) in capsys.readouterr().err


def test_verify_looks_at_detached_months_where_it_is_told_to(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(books: Books) -> None:
        await two_months(books)
        await seal_all(books)
        assert [await put_away(books, month) for month in (OLDER, OLD)] == ["detached", "detached"]
        await books.connection.execute("ALTER TABLE ledger.hold_2025_02_detached RENAME TO elsewhere")
        async with books.connection.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute("DELETE FROM ledger.request_2025_03_detached WHERE outcome = 'refused'")

    keep_books(database, work)
    assert ledger("verify", "--database-url", database) == 0
    assert capsys.readouterr().out.splitlines()[2] == (
        "2 months were put away: what they left behind was looked at, their rows were not (--detached)"
    )
    assert ledger("verify", "--detached", "--database-url", database) == 1
    *found, counted, _, older, old, _ = capsys.readouterr().out.splitlines()
    assert all(line.startswith("NOT TRUE: ") for line in found)
    assert [
        line for line in found if "every ended hold has its request" in line and f": 2025-03, request {UNSENT}" in line
    ]
    assert counted.endswith(f": {len(found)} findings")
    assert older.startswith(
        "month 2025-02 was put away, and some of its tables are not here (dropped, or moved away): hold_"
    )
    assert old == "month 2025-03 was put away, and its tables are here"


def test_keep_waits_for_a_database_that_is_away(tmp_path: Path) -> None:
    nobody = "postgresql://behest@127.0.0.1:1/behest?sslmode=disable"
    log = tmp_path / "log"
    with log.open("wb") as output:
        keeper = subprocess.Popen([*KEEP, "--database-url", nobody], stderr=output, stdout=output)
    try:
        wait_until(lambda: log.read_text().count("trying again") >= 2, what="the keeper's patience")
        os.kill(keeper.pid, signal.SIGINT)
        assert keeper.wait(60) == 0
    finally:
        keeper.kill()
        keeper.wait()
    assert "Traceback" not in log.read_text()


async def spoil(database: str, statement: str) -> None:
    connection = await connect(database)
    await connection.execute(statement)
    await connection.close()


def test_keep_says_at_once_what_the_schema_lacks_and_what_to_do(
    database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(spoil(database, "DELETE FROM ledger.schema_migration WHERE name LIKE '0002%'"))
    assert ledger("keep", "--database-url", database) == 2
    told = capsys.readouterr().err
    assert "the schema lacks 0002_books.sql" in told
    assert "behest ledger migrate" in told
    asyncio.run(spoil(database, "UPDATE ledger.schema_migration SET sha256 = 'other'"))
    assert ledger("keep", "--database-url", database) == 2
    told = capsys.readouterr().err
    assert "was changed after it was applied" in told
    assert "behest ledger migrate" not in told


def test_an_earlier_release_leaves_a_later_schema_alone_and_says_so(
    database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(spoil(database, "INSERT INTO ledger.schema_migration (name, sha256) VALUES ('9999_later.sql', 'x')"))
    assert ledger("migrate", "--database-url", database) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "the schema is a later release's, no migration is applied (it has 9999_later.sql)"
    assert ledger("top", "--database-url", database) == 0


@pytest.mark.parametrize(
    "wrong", ["--interval 0", "--interval x", "--grace-hours -1", "--grace-hours nan", "--policy all"]
)
def test_keep_refuses_what_makes_no_sense(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ledger("keep", *wrong.split()) == 2
    assert wrong.split(maxsplit=1)[0] in capsys.readouterr().err
