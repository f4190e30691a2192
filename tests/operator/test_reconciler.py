"""Resources carried into a real ledger, the operator killed at each of its calls; the API server is one in memory."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest

from behest_ledger.store import identity
from behest_ledger.store.pool import connect
from behest_ledger.store.roles import RoleError
from behest_operator import logins, namespace_secrets
from behest_operator.namespace_secrets import NamespaceSecrets
from behest_operator.reconciler import Applied, Reconciler
from fake_kubernetes import FakeKubernetes, FaultyConnection, Killed, Steps

MASTER_KEY = bytes(range(32))
PROJECT = {"defaultModel": "gpt-4o-mini", "apiKeySecretName": "shop-key"}
UPSTREAM = {
    "baseURL": "https://api.openai.com/v1",
    "credentials": {"secretKeyRef": {"name": "openai", "key": "api-key"}},
}
BUDGET = {"scope": {"project": "shop"}, "limit": {"amount": "1", "currency": "USD"}, "window": {"period": "Day"}}


def resource(kind: str, name: str, spec: dict[str, Any], namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "behest.ai/v1alpha1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace, "generation": 1, "uid": f"{namespace}-{name}"},
        "spec": spec,
    }


class World:
    """An operator's reconciler with its surroundings."""

    def __init__(self, dsn: str, connection: Any) -> None:
        self.dsn = dsn
        self.connection = connection
        self.steps = Steps()
        self.kubernetes = FakeKubernetes(self.steps)
        pool = FaultyConnection(connection, self.steps)
        self.secrets = NamespaceSecrets(kubernetes=self.kubernetes, pool=pool, master_key=MASTER_KEY, sidecar_dsn=dsn)
        self.reconciler = Reconciler(pool, self.secrets)

    async def apply(self, document: dict[str, Any], labels: dict[str, str] | None = None) -> Applied:
        return await self.reconciler.apply(document, labels or {})

    async def remove(self, document: dict[str, Any]) -> None:
        metadata = document["metadata"]
        await self.reconciler.remove(document["kind"], metadata["namespace"], metadata["name"], document["spec"])

    def secret(self, namespace: str, name: str) -> dict[str, str] | None:
        found = self.kubernetes.objects.get(f"/api/v1/namespaces/{namespace}/secrets/{name}")
        if found is None:
            return None
        return {key: base64.b64decode(value).decode() for key, value in found["data"].items()}

    def put_secret(self, namespace: str, name: str, **data: str) -> None:
        path = f"/api/v1/namespaces/{namespace}/secrets/{name}"
        encoded = {key.replace("_", "-"): base64.b64encode(value.encode()).decode() for key, value in data.items()}
        self.kubernetes.objects[path] = {"metadata": {"name": name, "resourceVersion": "0"}, "data": encoded}

    async def logins(self, namespace: str) -> list[str]:
        rows = await self.connection.fetch(
            "SELECT role_name::text FROM ledger.tenant_role WHERE role_name LIKE $1", f"behest-{namespace}-%"
        )
        return [row["role_name"] for row in rows]

    async def keys(self, namespace: str) -> list[Any]:
        return list(
            await self.connection.fetch(
                "SELECT * FROM ledger.api_key WHERE project_id = $1 AND revoked_at IS NULL", f"{namespace}/shop"
            )
        )

    async def killed_at_each_step(
        self, work: Callable[[int], Awaitable[object]], check: Callable[[int], Awaitable[None]]
    ) -> int:
        """Kill the work at each of its steps and do it again; the number of steps."""
        for number in range(1, 200):
            self.steps.begin(number)
            try:
                await work(number)
            except Killed:
                self.steps.begin(None)
                await work(number)
                await check(number)
            else:
                self.steps.begin(None)
                return number
        raise AssertionError("the work never ends")


def world(dsn: str, work: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        connection = await connect(dsn)
        try:
            await work(World(dsn, connection))
        finally:
            await connection.close()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def keys_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """RSA keys and argon2 take a tenth of a second and more, and these tests make hundreds."""
    numbers = count(1)

    def hashed(key: str) -> str:
        return f"$argon2id$ of {key[-4:]}"

    monkeypatch.setattr(identity, "hash_api_key", hashed)
    monkeypatch.setattr(namespace_secrets, "_signing_key", lambda: f"signing key {next(numbers)}")


async def may_act_for(dsn: str) -> list[str]:
    connection = await connect(dsn)
    try:
        tenants: list[str] = await connection.fetchval("SELECT ledger.session_tenants_v1()")
        return tenants
    finally:
        await connection.close()


def found(applied: Applied, type_: str) -> tuple[str, str, str]:
    (finding,) = (item for item in applied.findings if item.type == type_)
    return finding.status, finding.reason, finding.message


def test_a_project_is_the_same_whenever_its_operator_was_killed(database: str) -> None:
    async def work(world: World) -> None:
        async def apply(number: int) -> None:
            await world.apply(resource("Project", "shop", PROJECT, f"n{number}"))

        async def check(number: int) -> None:
            namespace = f"n{number}"
            secret = world.secret(namespace, "behest-sidecar")
            assert secret is not None
            assert await may_act_for(secret["database-url"]) == [namespace]
            assert len(await world.logins(namespace)) == 1, f"killed at step {number}"
            (key,) = await world.keys(namespace)
            api_key = world.secret(namespace, "shop-key")
            assert api_key is not None
            assert api_key["api-key"].endswith(key["last_four"])
            assert (
                await world.connection.fetchval("SELECT count(*) FROM ledger.project WHERE namespace = $1", namespace)
                == 1
            )

        assert await world.killed_at_each_step(apply, check) > 20

    world(database, work)


def test_a_rotation_is_the_same_whenever_its_operator_was_killed(database: str) -> None:
    async def work(world: World) -> None:
        later = datetime.now(UTC) + timedelta(days=31)
        before: dict[int, str] = {}

        async def rotate(number: int) -> None:
            if number not in before:
                step, world.steps.kill_at = world.steps.done, None
                await world.secrets.ensure_for_sidecars(f"r{number}", "acme", now=datetime.now(UTC))
                world.steps.begin(number)
                assert step == 0
                before[number] = (world.secret(f"r{number}", "behest-sidecar") or {})["database-url"]
            await world.secrets.ensure_for_sidecars(f"r{number}", "acme", now=later)

        async def check(number: int) -> None:
            secret = world.secret(f"r{number}", "behest-sidecar")
            assert secret is not None
            assert secret["database-url"] != before[number]
            for dsn in (secret["database-url"], before[number]):
                assert await may_act_for(dsn) == ["acme"], f"killed at step {number}"
            assert len(await world.logins(f"r{number}")) == 2

        assert await world.killed_at_each_step(rotate, check) > 10

    world(database, work)


def test_the_end_of_a_namespace_is_the_same_whenever_its_operator_was_killed(database: str) -> None:
    async def work(world: World) -> None:
        made: set[int] = set()

        async def remove(number: int) -> None:
            document = resource("Project", "shop", PROJECT, f"e{number}")
            if number not in made:
                world.steps.begin(None)
                await world.apply(document)
                made.add(number)
                world.steps.begin(number)
            await world.remove(document)

        async def check(number: int) -> None:
            assert world.secret(f"e{number}", "behest-sidecar") is None, f"killed at step {number}"
            assert world.secret(f"e{number}", "shop-key") is None
            assert await world.logins(f"e{number}") == []
            assert await world.keys(f"e{number}") == []
            assert (
                await world.connection.fetchval(
                    "SELECT count(*) FROM ledger.project WHERE namespace = $1", f"e{number}"
                )
                == 0
            )

        assert await world.killed_at_each_step(remove, check) > 10

    world(database, work)


def test_the_secret_of_sidecars_stays_until_the_last_project_of_the_namespace_goes(database: str) -> None:
    async def work(world: World) -> None:
        shop = resource("Project", "shop", PROJECT, "two")
        other = resource("Project", "other", {"defaultModel": "gpt-4o-mini"}, "two")
        await world.apply(shop)
        await world.apply(other)
        secret = world.secret("two", "behest-sidecar")
        await world.remove(shop)
        assert world.secret("two", "shop-key") is None
        assert world.secret("two", "behest-sidecar") == secret
        assert len(await world.logins("two")) == 1
        await world.remove(other)
        assert world.secret("two", "behest-sidecar") is None
        assert await world.logins("two") == []

    world(database, work)


def test_projects_that_come_at_once_share_one_login_that_works(database: str) -> None:
    async def work(world: World) -> None:
        now = datetime.now(UTC)
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(world.secrets.ensure_for_sidecars("busy", "acme", now=now))
        secret = world.secret("busy", "behest-sidecar")
        assert secret is not None
        assert await may_act_for(secret["database-url"]) == ["acme"]
        assert len(await world.logins("busy")) == 1
        await world.secrets.forget_project("busy", "none", None)

    world(database, work)


def test_a_namespace_that_gets_another_tenant_keeps_what_it_has_and_says_so(database: str) -> None:
    async def work(world: World) -> None:
        document = resource("Project", "shop", PROJECT, "moved")
        await world.apply(document)
        secret = world.secret("moved", "behest-sidecar")
        moved = {"behest.ai/tenant": "acme"}
        for other in (document, resource("Budget", "b", BUDGET, "moved")):
            applied = await world.apply(other, moved)
            status, reason, message = found(applied, "Accepted")
            assert (status, reason) == ("False", "TenantNotAllowed")
            assert 'namespace moved belongs to moved, got "acme"' in message
        assert world.secret("moved", "behest-sidecar") == secret
        await world.remove(document)
        applied = await world.apply(document, moved)
        assert found(applied, "Accepted")[0] == "True"
        after = world.secret("moved", "behest-sidecar")
        assert after is not None
        assert secret is not None
        assert await may_act_for(after["database-url"]) == ["acme"]
        assert after["signing-key.pem"] != secret["signing-key.pem"]
        await world.remove(document)

    world(database, work)


def test_a_secret_that_names_another_tenant_is_made_anew_and_its_logins_are_dropped(database: str) -> None:
    async def work(world: World) -> None:
        now = datetime.now(UTC)
        await world.secrets.ensure_for_sidecars("swap", "one", now=now)
        first = world.secret("swap", "behest-sidecar")
        await world.secrets.ensure_for_sidecars("swap", "two", now=now)
        second = world.secret("swap", "behest-sidecar")
        assert first is not None
        assert second is not None
        assert second["tenant"] == "two"
        assert all(first[name] != second[name] for name in ("data-key", "signing-key.pem", "database-url"))
        assert len(await world.logins("swap")) == 1
        await world.secrets.forget_project("swap", "none", None)

    world(database, work)


@pytest.mark.parametrize("label", ["", "Not A Name", "a" * 300, "../x"])
def test_a_label_that_is_no_name_of_a_tenant_is_no_tenant(database: str, label: str) -> None:
    async def work(world: World) -> None:
        applied = await world.apply(resource("Project", "shop", PROJECT, "odd"), {"behest.ai/tenant": label})
        assert found(applied, "Accepted")[:2] == ("False", "NoTenant")
        assert found(applied, "Programmed")[:2] == ("False", "NotAccepted")
        assert world.kubernetes.objects == {}

    world(database, work)


def test_secrets_of_others_are_never_touched(database: str) -> None:
    async def work(world: World) -> None:
        world.put_secret("mine", "behest-sidecar", password="x")
        world.put_secret("mine", "shop-key", password="x")
        document = resource("Project", "shop", PROJECT, "mine")
        applied = await world.apply(document)
        assert found(applied, "Accepted")[0] == "True"
        for type_ in ("SidecarReady", "ApiKeyReady"):
            assert found(applied, type_)[:2] == ("False", "SecretTaken")
        await world.remove(document)
        assert world.secret("mine", "behest-sidecar") == {"password": "x"}
        assert world.secret("mine", "shop-key") == {"password": "x"}
        assert await world.logins("mine") == []

    world(database, work)


def test_two_projects_cannot_share_the_secret_of_an_api_key(database: str) -> None:
    async def work(world: World) -> None:
        await world.apply(resource("Project", "shop", PROJECT, "pair"))
        applied = await world.apply(resource("Project", "other", PROJECT, "pair"))
        status, reason, message = found(applied, "ApiKeyReady")
        assert (status, reason) == ("False", "SecretTaken")
        assert message == "the Secret shop-key holds the key of project pair/shop: name another one"

    world(database, work)


def test_a_lost_login_and_a_revoked_key_are_made_anew(database: str) -> None:
    async def work(world: World) -> None:
        document = resource("Project", "shop", PROJECT, "lost")
        await world.apply(document)
        (login,) = await world.logins("lost")
        before = world.secret("lost", "shop-key")
        await world.connection.execute("DELETE FROM ledger.tenant_role WHERE role_name = $1", login)
        await world.connection.execute("UPDATE ledger.api_key SET revoked_at = now() WHERE project_id = 'lost/shop'")
        await world.apply(document)
        secret = world.secret("lost", "behest-sidecar")
        assert secret is not None
        assert await may_act_for(secret["database-url"]) == ["lost"]
        assert world.secret("lost", "shop-key") != before
        assert len(await world.keys("lost")) == 1
        await world.remove(document)

    world(database, work)


def test_the_key_of_a_provider_comes_with_its_secret_and_goes_with_its_upstream(database: str) -> None:
    async def work(world: World) -> None:
        document = resource("Upstream", "openai", UPSTREAM, "prov")

        async def last_fours() -> list[str]:
            rows = await world.connection.fetch("SELECT last_four FROM ledger.provider_key WHERE tenant_id = 'prov'")
            return [row["last_four"] for row in rows]

        applied = await world.apply(document)
        assert found(applied, "CredentialsReady") == (
            "False", "SecretMissing", "there is no key api-key of Secret openai: create it",
        )  # fmt: skip
        world.put_secret("prov", "openai", other="x")
        assert found(await world.apply(document), "CredentialsReady")[1] == "KeyMissing"
        world.put_secret("prov", "openai", api_key="sk-\u00e9")
        assert found(await world.apply(document), "CredentialsReady")[1] == "Unusable"
        world.put_secret("prov", "openai", api_key="sk-0123456789abcdef\n")
        for _ in range(2):
            assert found(await world.apply(document), "CredentialsReady")[:2] == ("True", "Sealed")
        assert await last_fours() == ["cdef"]
        world.put_secret("prov", "openai", api_key="sk-0123456789aaaaaa")
        await world.apply(document)
        assert await last_fours() == ["aaaa"]
        await world.remove(document)
        await world.remove(document)
        assert await last_fours() == []

    world(database, work)


def test_what_is_not_accepted_leaves_what_was_there_as_it_was(database: str) -> None:
    async def work(world: World) -> None:
        assert (await world.apply(resource("Budget", "b", BUDGET, "keep"))).changed
        assert not (await world.apply(resource("Budget", "b", BUDGET, "keep"))).changed
        bad = {**BUDGET, "limit": {"amount": "-1", "currency": "USD"}}
        applied = await world.apply(resource("Budget", "b", bad, "keep"))
        assert found(applied, "Accepted")[:2] == ("False", "Invalid")
        limit = await world.connection.fetchval("SELECT limit_amount FROM ledger.budget WHERE namespace = 'keep'")
        assert limit == 10**12

    world(database, work)


def test_where_no_login_can_be_made_the_project_says_why_and_is_in_the_ledger(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise RoleError("role ledger may not make roles: give it CREATEROLE")

    monkeypatch.setattr(logins, "create_role", refuse)

    async def work(world: World) -> None:
        applied = await world.apply(resource("Project", "shop", {"defaultModel": "m"}, "poor"))
        assert found(applied, "Programmed")[0] == "True"
        assert found(applied, "SidecarReady") == (
            "False", "NoLogin", "role ledger may not make roles: give it CREATEROLE",
        )  # fmt: skip
        assert world.secret("poor", "behest-sidecar") is None

    world(database, work)
