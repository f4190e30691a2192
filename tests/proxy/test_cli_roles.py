"""`behest ledger role` and the role of `behest up`, against a real PostgreSQL."""

import asyncio
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from behest_ledger.store.pool import connect
from behest_ledger.store.roles import create_role, session_tenants
from behest_proxy.cli import demo
from behest_proxy.cli.main import main
from behest_proxy.cli.roles import dsn_of_role

NAME = f"test_cli_{os.getpid()}"


@pytest.fixture
def gone(database: str) -> Iterator[str]:
    """A database; the roles named in this file are dropped after the test."""
    yield database

    async def drop() -> None:
        owner = await connect(database)
        for name in (NAME, NAME + "_poor"):
            if await owner.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", name):
                await owner.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
        await owner.close()

    asyncio.run(drop())


def role(database: str, *argv: str) -> int:
    return main(["ledger", "role", *argv, "--database-url", database])


def tenants_of(dsn: str) -> tuple[str, ...] | None:
    async def ask() -> tuple[str, ...] | None:
        connection = await connect(dsn)
        try:
            return await session_tenants(connection)
        finally:
            await connection.close()

    return asyncio.run(ask())


def test_a_role_is_made_with_a_password_in_a_file_of_its_own(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert role(gone, "create", NAME, "--tenant", "acme", "--tenant", "globex") == 0
    out = capsys.readouterr().out
    file = tmp_path / f"{NAME}.password"
    password = file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600
    assert password not in out
    assert f"role {NAME} acts for acme, globex" in out
    (line,) = (line for line in out.splitlines() if "BEHEST_DATABASE_URL" in line)
    dsn = line.split('"')[1].replace(f"$(cat {NAME}.password)", password)
    assert tenants_of(dsn) == ("acme", "globex")

    assert role(gone, "list") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [NAME, "acme,", "globex"]
    assert role(gone, "create", NAME, "--tenant", "acme") == 2
    assert f"{NAME}.password exists already" in capsys.readouterr().err
    assert role(gone, "create", NAME, "--tenant", "acme", "--password-file", "other") == 2
    assert "to give it rights here, add --existing" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert role(gone, "create", NAME, "--all-tenants", "--existing") == 0
    assert tenants_of(dsn) is None
    assert role(gone, "drop", NAME) == 0
    assert role(gone, "drop", NAME) == 2
    assert "is no role of this ledger" in capsys.readouterr().err
    assert role(gone, "list") == 0
    assert "there are no roles for sidecars" in capsys.readouterr().out


def test_a_password_may_come_from_standard_input(
    gone: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("correct horse\n"))
    assert role(gone, "create", NAME, "--tenant", "acme", "--password-stdin") == 0
    assert "horse" not in capsys.readouterr().out
    assert tenants_of(dsn_of_role(gone, NAME, "correct%20horse")) == ("acme",)


def test_a_role_acts_for_somebody(gone: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert role(gone, "create", NAME) == 2
    assert "one of the arguments --tenant --all-tenants is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        ("postgresql://me:secret@db:5432/ledger?sslmode=require", "postgresql://r:p@db:5432/ledger?sslmode=require"),
        ("postgres://db/ledger?user=me&password=secret", "postgres://r:p@db/ledger"),
        ("postgresql://me@[::1]:5433/x", "postgresql://r:p@[::1]:5433/x"),
    ],
)
def test_another_login_at_the_same_database(dsn: str, expected: str) -> None:
    assert dsn_of_role(dsn, "r", "p") == expected


def a_demo(dsn: str) -> demo.Demo:
    return demo.Demo(dsn, "http://127.0.0.1:1/v1", None, "", NAME, "a password")


def test_the_sidecar_of_up_is_no_owner(gone: str) -> None:
    made = a_demo(gone)
    for _ in range(2):  # every start makes it anew
        asyncio.run(demo.give_role(made))
        assert made.note is None
        assert made.sidecar_dsn is not None
        assert tenants_of(made.sidecar_dsn.replace("a password", "a%20password")) is None


def test_up_takes_the_given_role_where_it_may_make_none(gone: str) -> None:
    """The owner of a database who may not make roles: everything but a role of the sidecar's own."""
    poor = NAME + "_poor"

    async def hand_over() -> None:
        owner = await connect(gone)
        await owner.execute(f"CREATE ROLE {poor} LOGIN PASSWORD 'a password'; GRANT ALL ON SCHEMA ledger TO {poor}")
        for what in ("TABLES", "SEQUENCES", "ROUTINES"):
            await owner.execute(f"GRANT ALL ON ALL {what} IN SCHEMA ledger TO {poor}")
        await owner.close()

    asyncio.run(hand_over())
    made = a_demo(dsn_of_role(gone, poor, "a%20password"))
    asyncio.run(demo.give_role(made))
    assert made.sidecar_dsn is None
    assert made.note is not None
    assert f"role {poor} may not make roles: give it CREATEROLE" in made.note


def test_a_role_that_somebody_else_made_mighty_is_not_used(gone: str) -> None:
    async def make() -> None:
        owner = await connect(gone)
        await create_role(owner, NAME, tenants=None, password="a password")
        await owner.execute(f"ALTER ROLE {NAME} SUPERUSER")
        await owner.close()

    asyncio.run(make())
    made = a_demo(gone)
    asyncio.run(demo.give_role(made))
    assert made.note is not None
    assert "is a superuser" in made.note
