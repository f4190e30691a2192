"""Making, listing and dropping the roles of sidecars."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from behest_ledger.store.errors import LedgerError, LedgerForbiddenError
from behest_ledger.store.pool import connect
from behest_ledger.store.roles import RoleError, create_role, drop_role, list_roles, scram_verifier, session_tenants
from behest_proxy.cli.roles import dsn_of_role
from ledger.tenant_roles import logged_in, tenant_role

NAME = f"test_role_{os.getpid()}"
PASSWORD = "correct horse"


def as_owner(dsn: str, work: Callable[[Any], Awaitable[None]]) -> None:
    """Run `work` as the owner; roles of this file are gone afterwards."""

    async def main() -> None:
        async with logged_in(dsn) as owner:
            try:
                await work(owner)
            finally:
                await owner.execute(f"DROP OWNED BY {NAME}") if await exists(owner) else None
                await owner.execute(f"DROP ROLE IF EXISTS {NAME}")

    asyncio.run(main())


async def exists(owner: Any) -> bool:
    found: bool = await owner.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", NAME)
    return found


def test_a_role_logs_in_with_its_password_and_knows_its_tenants(dsn: str) -> None:
    async def work(owner: Any) -> None:
        await create_role(owner, NAME, tenants=["acme", "initech", "acme"], password=PASSWORD)
        async with logged_in(dsn_of_role(dsn, NAME, "correct%20horse")) as role:
            assert await session_tenants(role) == ("acme", "initech")
            assert await role.fetchval("SHOW search_path") == "pg_catalog"
        assert await session_tenants(owner) is None
        (listed,) = await list_roles(owner)
        assert (listed.name, listed.tenants, listed.exists) == (NAME, ("acme", "initech"), True)
        assert listed.too_mighty is None

    as_owner(dsn, work)


def test_the_server_never_hears_the_password() -> None:
    verifier = scram_verifier(PASSWORD, bytes.fromhex("5b6d99689d12358eec1d1d1e4c1f4c6f"))
    assert verifier.startswith("SCRAM-SHA-256$4096:W22ZaJ0SNY7sHR0eTB9Mbw==$")
    assert "horse" not in verifier


@pytest.mark.parametrize("password", ["short", "x" * 257, "pass word\n", "Käsekuchen"])
def test_a_password_that_clients_would_not_agree_on_is_refused(dsn: str, password: str) -> None:
    async def work(owner: Any) -> None:
        with pytest.raises(RoleError, match="8-256 printable ASCII"):
            await create_role(owner, NAME, tenants=["acme"], password=password)
        assert not await exists(owner)

    as_owner(dsn, work)


@pytest.mark.parametrize("name", ["", "1st", "pg_mine", 'a"b', "Upper", "x" * 64, "a b"])
def test_a_name_that_needs_care_is_refused(dsn: str, name: str) -> None:
    async def work(owner: Any) -> None:
        with pytest.raises(RoleError, match="is no name for a role"):
            await create_role(owner, name, tenants=["acme"], password=PASSWORD)

    as_owner(dsn, work)


@pytest.mark.parametrize("tenants", [[], [""], ["acme", ""]])
def test_a_role_for_nobody_is_refused(dsn: str, tenants: list[str]) -> None:
    async def work(owner: Any) -> None:
        with pytest.raises(RoleError, match="one or more tenants, or for all"):
            await create_role(owner, NAME, tenants=tenants, password=PASSWORD)

    as_owner(dsn, work)


def test_a_role_that_is_there_is_not_taken_over_by_mistake(dsn: str) -> None:
    async def work(owner: Any) -> None:
        await owner.execute(f"CREATE ROLE {NAME} LOGIN")
        with pytest.raises(RoleError, match="add --existing"):
            await create_role(owner, NAME, tenants=["acme"], password=PASSWORD)
        assert await list_roles(owner) == []
        await create_role(owner, NAME, tenants=["acme"], password=None)
        await create_role(owner, NAME, tenants=None, password=None)
        (listed,) = await list_roles(owner)
        assert listed.tenants == ()

    as_owner(dsn, work)


def test_existing_means_existing(dsn: str) -> None:
    async def work(owner: Any) -> None:
        with pytest.raises(RoleError, match="there is no role"):
            await create_role(owner, NAME, tenants=["acme"], password=None)

    as_owner(dsn, work)


MIGHTY = {
    "SUPERUSER": "is a superuser",
    "BYPASSRLS": "bypasses row-level security",
    "CREATEROLE": "may make roles",
    "IN ROLE pg_write_all_data": "may write all data",
}


@pytest.mark.parametrize("option", MIGHTY)
def test_a_role_that_no_rule_would_bind_is_refused_and_told_of_later(dsn: str, option: str) -> None:
    async def work(owner: Any) -> None:
        await owner.execute(f"CREATE ROLE {NAME} LOGIN {option}")
        with pytest.raises(RoleError, match=f"{MIGHTY[option]}: no rule"):
            await create_role(owner, NAME, tenants=["acme"], password=None)
        await owner.execute("INSERT INTO ledger.tenant_role VALUES ($1, 'acme')", NAME)
        (listed,) = await list_roles(owner)
        assert listed.too_mighty == MIGHTY[option]

    as_owner(dsn, work)


def test_whoever_may_not_make_roles_is_told_what_to_do(dsn: str) -> None:
    async def work(owner: Any) -> None:
        await owner.execute(f"CREATE ROLE {NAME} LOGIN PASSWORD 'secret'; GRANT ALL ON SCHEMA ledger TO {NAME}")
        await owner.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA ledger TO {NAME}")
        async with logged_in(dsn_of_role(dsn, NAME, "secret")) as other:
            with pytest.raises(RoleError, match=r"may not make roles: give it CREATEROLE, or .* add --existing"):
                await create_role(other, "test_never_made", tenants=["acme"], password=PASSWORD)

    as_owner(dsn, work)


def test_a_dropped_role_is_gone_and_its_open_session_can_do_nothing(dsn: str) -> None:
    async def work(owner: Any) -> None:
        await create_role(owner, NAME, tenants=["acme"], password=PASSWORD)
        async with logged_in(dsn_of_role(dsn, NAME, "correct%20horse")) as role:
            await role.fetch("SELECT * FROM ledger.project")
            await drop_role(owner, NAME)
            with pytest.raises(asyncpg.PostgresError):
                await role.fetch("SELECT * FROM ledger.project")
        assert not await exists(owner)
        assert await list_roles(owner) == []
        with pytest.raises(RoleError, match="is no role of this ledger"):
            await drop_role(owner, NAME)

    as_owner(dsn, work)


def test_a_kept_role_has_no_rights_any_more(dsn: str) -> None:
    async def work(owner: Any) -> None:
        await create_role(owner, NAME, tenants=["acme"], password=PASSWORD)
        await drop_role(owner, NAME, keep=True)
        assert await exists(owner)
        async with logged_in(dsn_of_role(dsn, NAME, "correct%20horse")) as role:
            with pytest.raises(LedgerForbiddenError, match="permission denied for schema ledger"):
                await session_tenants(role)

    as_owner(dsn, work)


def test_a_role_that_is_used_elsewhere_is_not_dropped(dsn: str) -> None:
    async def work(owner: Any) -> None:
        await create_role(owner, NAME, tenants=["acme"], password=PASSWORD)
        await owner.execute(f"CREATE TABLE public.elsewhere (); ALTER TABLE public.elsewhere OWNER TO {NAME}")
        with pytest.raises(RoleError, match=r"is used elsewhere too .*elsewhere.*: add --keep"):
            await drop_role(owner, NAME)
        assert len(await list_roles(owner)) == 1

    as_owner(dsn, work)


def test_a_role_that_acts_for_nobody_is_told_so(dsn: str) -> None:
    async def main() -> None:
        async with tenant_role(dsn, "acme") as login, logged_in(login) as role, logged_in(dsn) as owner:
            await owner.execute("DELETE FROM ledger.tenant_role")
            with pytest.raises(RoleError, match="may act for no tenant"):
                await session_tenants(role)
            await owner.execute("INSERT INTO ledger.tenant_role SELECT session_user, 'acme'")
            await owner.execute("UPDATE ledger.tenant_role SET role_name = $1", login.split("//")[1].split(":")[0])

    asyncio.run(main())


def test_a_wrong_password_is_an_error_of_ours(dsn: str) -> None:
    async def main() -> None:
        async with tenant_role(dsn, "acme") as login:
            with pytest.raises(LedgerError, match="password authentication failed"):
                await connect(login.replace("password", "passw0rd"))

    asyncio.run(main())
