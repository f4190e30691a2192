import asyncio
from typing import Any

import pytest

from behest_ledger.api_key_hash import api_key_digest, api_key_matches, new_api_key
from behest_ledger.store import identity
from behest_ledger.store.errors import LedgerUnavailableError
from behest_ledger.store.identity import (
    KeyConflictError,
    find_api_key,
    list_api_keys,
    load_signing_keys,
    put_signing_key,
    register_api_key,
    revoke_api_key,
    set_signing_key_state,
    tenants_of_project,
)
from ledger.books import Books, keep_books

OWN: dict[str, Any] = {"kid": "k1", "tenant_id": None, "kind": "own", "algorithm": "ES256", "public_pem": "PEM 1"}
ACMES: dict[str, Any] = {**OWN, "kid": "k2", "tenant_id": "acme", "kind": "tenant"}


@pytest.fixture
def fast_argon2(monkeypatch: pytest.MonkeyPatch) -> None:
    """What argon2 costs is proved elsewhere."""

    def hash_api_key(key: str) -> str:
        return f"hash of {key[-4:]}"

    monkeypatch.setattr(identity, "hash_api_key", hash_api_key)


async def version(books: Books) -> int:
    found: int = await books.connection.fetchval("SELECT version FROM ledger.configuration_version")
    return found


async def register(books: Books, key: str, **changes: str) -> identity.ApiKeyRecord:
    fields = {"tenant_id": "acme", "project_id": "demo/shop", "role": "user", "name": "ci", **changes}
    return await register_api_key(books.connection, key=key, **fields)


def test_a_registered_key_is_found_by_its_digest_and_proved_by_its_hash(dsn: str) -> None:
    async def work(books: Books) -> None:
        key = new_api_key()
        record = await register(books, key)
        assert await find_api_key(books.connection, api_key_digest(key)) == record
        assert api_key_matches(key, argon2_hash=record.argon2)
        assert (record.last_four, record.role, record.name, record.revoked_at) == (key[-4:], "user", "ci", None)
        assert await find_api_key(books.connection, api_key_digest(new_api_key())) is None
        # The key itself is nowhere.
        assert key not in str(await books.connection.fetch("SELECT * FROM ledger.api_key"))

    keep_books(dsn, work)


@pytest.mark.usefixtures("fast_argon2")
def test_registering_a_key_again_changes_nothing_and_tells_nobody(dsn: str) -> None:
    async def work(books: Books) -> None:
        key = new_api_key()
        before = await version(books)
        record = await register(books, key)
        assert await version(books) == before + 1
        assert await register(books, key, role="admin", name="other") == record
        assert await version(books) == before + 1

    keep_books(dsn, work)


@pytest.mark.usefixtures("fast_argon2")
def test_a_key_registered_by_many_at_once_is_one_key(dsn: str) -> None:
    async def work(books: Books) -> None:
        key = new_api_key()
        records = await asyncio.gather(*(register(books, key) for _ in range(16)))
        assert len({record.key_id for record in records}) == 1
        assert await books.count("api_key") == 1

    keep_books(dsn, work, connections=8)


@pytest.mark.usefixtures("fast_argon2")
@pytest.mark.parametrize("changes", [{"tenant_id": "other"}, {"project_id": "demo/other"}])
def test_a_key_belongs_to_one_tenant_and_project(dsn: str, changes: dict[str, str]) -> None:
    async def work(books: Books) -> None:
        key = new_api_key()
        await register(books, key)
        with pytest.raises(KeyConflictError):
            await register(books, key, **changes)

    keep_books(dsn, work)


def test_what_has_not_the_form_of_a_key_is_not_registered(dsn: str) -> None:
    async def work(books: Books) -> None:
        with pytest.raises(ValueError, match="behest_sk_live_"):
            await register(books, "behest_sk_live_short")

    keep_books(dsn, work)


@pytest.mark.usefixtures("fast_argon2")
def test_a_revoked_key_stays_revoked_and_everybody_hears_of_it_once(dsn: str) -> None:
    async def work(books: Books) -> None:
        key = new_api_key()
        record = await register(books, key)
        before = await version(books)
        assert not await revoke_api_key(books.connection, key_id=record.key_id, tenant_id="other")
        assert not await revoke_api_key(books.connection, key_id="key_none")
        assert await version(books) == before
        assert await revoke_api_key(books.connection, key_id=record.key_id, tenant_id="acme")
        assert not await revoke_api_key(books.connection, key_id=record.key_id)
        assert await version(books) == before + 1
        assert (await register(books, key)).revoked_at is not None

    keep_books(dsn, work)


@pytest.mark.usefixtures("fast_argon2")
def test_keys_are_listed_by_tenant_and_project_the_oldest_first(dsn: str) -> None:
    async def work(books: Books) -> None:
        for tenant, project, name in [("acme", "demo/shop", "1"), ("acme", "demo/b", "2"), ("other", "demo/shop", "3")]:
            await register(books, new_api_key(), tenant_id=tenant, project_id=project, name=name)

        async def names(**of: Any) -> list[str]:
            return [record.name for record in await list_api_keys(books.connection, **of)]

        assert await names() == ["1", "2", "3"]
        assert await names(tenant_id="acme") == ["1", "2"]
        assert await names(project_id="demo/shop") == ["1", "3"]
        assert await names(tenant_id="other", project_id="demo/b") == []

    keep_books(dsn, work)


def test_signing_keys_are_kept_with_their_states_and_every_change_is_told(dsn: str) -> None:
    async def work(books: Books) -> None:
        before = await version(books)
        await put_signing_key(books.connection, **OWN)
        await put_signing_key(books.connection, **ACMES, state="previous")
        await put_signing_key(books.connection, **OWN)
        assert await version(books) == before + 2
        assert [(key.kid, key.tenant_id, key.state) for key in await load_signing_keys(books.connection)] == [
            ("k1", None, "current"), ("k2", "acme", "previous"),
        ]  # fmt: skip
        await put_signing_key(books.connection, **OWN, state="previous")
        await set_signing_key_state(books.connection, kid="k2", state="revoked", tenant_id="acme")
        assert [key.state for key in await load_signing_keys(books.connection)] == ["previous", "revoked"]
        assert await version(books) == before + 4

    keep_books(dsn, work)


@pytest.mark.parametrize(
    "changes", [{"tenant_id": "other"}, {"algorithm": "RS256"}, {"public_pem": "PEM 2"}, {"kind": "own"}]
)
def test_a_kid_cannot_be_taken_over(dsn: str, changes: dict[str, str]) -> None:
    async def work(books: Books) -> None:
        await put_signing_key(books.connection, **ACMES)
        with pytest.raises(KeyConflictError, match="registered already"):
            await put_signing_key(books.connection, **{**ACMES, **changes})
        (key,) = await load_signing_keys(books.connection)
        assert (key.tenant_id, key.public_pem) == ("acme", "PEM 1")

    keep_books(dsn, work)


def test_a_revoked_signing_key_never_comes_back(dsn: str) -> None:
    async def work(books: Books) -> None:
        await put_signing_key(books.connection, **ACMES)
        await set_signing_key_state(books.connection, kid="k2", state="revoked")
        with pytest.raises(KeyConflictError, match="stays revoked"):
            await put_signing_key(books.connection, **ACMES)
        with pytest.raises(KeyConflictError, match="stays revoked"):
            await set_signing_key_state(books.connection, kid="k2", state="current")

    keep_books(dsn, work)


def test_a_tenant_changes_no_signing_key_but_its_own(dsn: str) -> None:
    async def work(books: Books) -> None:
        await put_signing_key(books.connection, **OWN)
        for kid in ("k1", "none"):
            with pytest.raises(KeyConflictError, match="there is no signing key"):
                await set_signing_key_state(books.connection, kid=kid, state="revoked", tenant_id="acme")
        assert [key.state for key in await load_signing_keys(books.connection)] == ["current"]

    keep_books(dsn, work)


@pytest.mark.parametrize("wrong", [{"kind": "nobody's"}, {"state": "lost"}, {"kind": "tenant"}])
def test_a_signing_key_has_a_known_kind_and_state_and_a_tenants_key_its_tenant(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="signing key"):
        asyncio.run(put_signing_key("unused", **{**OWN, **wrong}))


def test_the_tenants_of_a_project_are_found_by_its_id(dsn: str) -> None:
    async def work(books: Books) -> None:
        for tenant in ("zoo", "acme"):
            await books.connection.execute(
                "INSERT INTO ledger.project (tenant_id, project_id, namespace, name, spec)"
                " VALUES ($1, 'demo/shop', 'demo', 'shop', '{}')",
                tenant,
            )
        assert await tenants_of_project(books.connection, "demo/shop") == ["acme", "zoo"]
        assert await tenants_of_project(books.connection, "demo/none") == []

    keep_books(dsn, work)


def test_a_dsn_does_as_well_as_a_connection(dsn: str) -> None:
    async def main() -> None:
        await put_signing_key(dsn, **OWN)
        assert [key.kid for key in await load_signing_keys(dsn)] == ["k1"]
        with pytest.raises(LedgerUnavailableError):
            await load_signing_keys("postgresql://nobody@127.0.0.1:1/none")

    asyncio.run(main())
