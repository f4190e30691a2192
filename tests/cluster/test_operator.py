"""Resources on a real API server, carried into a real ledger by the operator process."""

import asyncio
import base64
import copy
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest

from behest_ledger.configuration.manifests import InvalidManifestsError, from_object
from behest_ledger.store import holds
from behest_ledger.store.errors import LedgerForbiddenError
from behest_ledger.store.pool import connect
from behest_proxy.cli.preflight import free_port
from cluster.control_plane import CommandFailed, ControlPlane
from cluster.operator_process import OperatorProcess, condition, eventually
from cluster.resources import forget_resources, install_crds
from cluster.sql import rows
from cluster.test_verdicts import LEFT_TO_THE_OPERATOR
from conftest import Server, execute
from ledger.books import admission, new_id, settlement
from ledger.houses import ALL_TABLES
from ledger.sample_manifests import INVALID

ROLE = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRole",
    "metadata": {"name": "behest-operator"},
    "rules": [
        {
            "apiGroups": ["apiextensions.k8s.io"],
            "resources": ["customresourcedefinitions"],
            "verbs": ["list", "watch"],
        },
        {
            "apiGroups": ["behest.ai"],
            "resources": ["projects", "upstreams", "tiers", "budgets"],
            "verbs": ["list", "watch", "patch"],
        },
        {
            "apiGroups": ["behest.ai"],
            "resources": ["projects/status", "upstreams/status", "tiers/status", "budgets/status"],
            "verbs": ["patch"],
        },
        {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "create", "update", "delete"]},
    ],
}


@pytest.fixture(scope="module")
def crds(control_plane: ControlPlane) -> None:
    install_crds(control_plane)


@pytest.fixture
def operator(
    control_plane: ControlPlane, crds: None, database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    namespace = control_plane.namespace("operator")
    control_plane.apply(
        ROLE,
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "operator", "namespace": namespace}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": namespace},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "behest-operator"},
            "subjects": [{"kind": "ServiceAccount", "name": "operator", "namespace": namespace}],
        },
    )
    folder = tmp_path_factory.mktemp("operator")
    (folder / "master-key").write_text(base64.b64encode(bytes(range(32))).decode())
    process = OperatorProcess(
        plane=control_plane,
        dsn=database,
        kubeconfig=control_plane.kubeconfig_of("operator", namespace),
        log=folder / "operator.log",
        environment={
            "BEHEST_MASTER_KEY_FILE": str(folder / "master-key"),
            "BEHEST_METRICS_BIND": f"127.0.0.1:{free_port(0)}",
        },
    )
    process.start()
    yield process
    process.stop()
    forget_resources(control_plane)
    assert "Traceback" not in process.log.read_text(), process.log.read_text()


def budget(namespace: str, name: str = "sessions", **changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "scope": {"project": "shop"},
        "per": ["session"],
        "limit": {"amount": "0.50", "currency": "USD"},
        "window": {"period": "Day"},
    }
    spec.update(changes)
    return {
        "apiVersion": "behest.ai/v1alpha1",
        "kind": "Budget",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def project(namespace: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "behest.ai/v1alpha1",
        "kind": "Project",
        "metadata": {"name": "shop", "namespace": namespace},
        "spec": {"defaultModel": "gpt-4o-mini", **spec},
    }


def test_what_is_applied_is_in_the_ledger_and_its_status_says_so(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    namespace = control_plane.namespace()
    control_plane.apply(project(namespace), budget(namespace))
    eventually(lambda: condition(control_plane, "budget", "sessions", namespace, "Programmed", "True"))
    found = rows(
        operator.dsn, "SELECT tenant_id, limit_amount::text FROM ledger.budget WHERE namespace = $1", namespace
    )
    assert found == [{"tenant_id": namespace, "limit_amount": "500000000000"}]
    table = eventually(
        lambda: (
            (text := control_plane.kubectl("get", "budgets", "--namespace", namespace)) and "Active" in text and text
        )
    )
    assert table.split()[:8] == ["NAME", "SCOPE", "LIMIT", "SPENT", "HELD", "REMAINING", "WINDOW", "PHASE"]
    assert "project=shop per session" in table
    assert "0.5 USD" in table


def test_it_tells_how_every_budget_does_and_what_it_has_carried_into_the_ledger(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    namespace = control_plane.namespace()
    control_plane.apply(project(namespace), budget(namespace))
    labels = f'behest_budget="{namespace}/sessions",behest_tenant="{namespace}",behest_unit="usd"'
    url = f"http://{operator.environment['BEHEST_METRICS_BIND']}/metrics"
    # The keeper looks every fifteen seconds, and as often the operator looks at projects again.
    reconciled = r'behest_operator_reconciles_total{behest_kind="%s",behest_result="accepted"}'
    told = {
        f"behest_budget_limit{{{labels}}}": "0.5",
        f"behest_budget_remaining{{{labels}}}": "0.5",
        reconciled % "Project": None,
        reconciled % "Budget": "1.0",
        'behest_keeper_rounds_total{behest_result="worked"}': None,
    }

    def missing() -> list[str]:
        """What the page does not say yet; None is any value."""
        lines = (line.rpartition(" ") for line in httpx.get(url).text.splitlines())
        page = {name: value for name, _, value in lines}
        return [name for name, value in told.items() if name not in page or value not in (None, page[name])]

    eventually(lambda: not missing(), what="the page with all of it")


def test_a_changed_limit_reaches_the_ledger_and_a_changed_unit_is_refused(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    namespace = control_plane.namespace()
    control_plane.apply(budget(namespace))
    eventually(lambda: rows(operator.dsn, "SELECT 1 FROM ledger.budget WHERE namespace = $1", namespace))
    control_plane.apply(budget(namespace, limit={"amount": "2", "currency": "USD"}))
    eventually(
        lambda: rows(
            operator.dsn, "SELECT 1 FROM ledger.budget WHERE namespace = $1 AND limit_amount = 2e12", namespace
        )
    )
    with pytest.raises(CommandFailed, match="the unit is immutable: make a new Budget"):
        control_plane.kubectl(
            "patch", "budget", "sessions", "--namespace", namespace, "--type=merge",
            "--patch", '{"spec":{"limit":{"amount":null,"currency":null,"tokens":5}}}',
        )  # fmt: skip


def test_a_deleted_budget_leaves_the_ledger_but_not_its_history(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    namespace = control_plane.namespace()
    control_plane.apply(budget(namespace))
    eventually(lambda: rows(operator.dsn, "SELECT 1 FROM ledger.budget WHERE namespace = $1", namespace))
    control_plane.kubectl("delete", "budget", "sessions", "--namespace", namespace, "--timeout=90s")
    found = rows(
        operator.dsn, "SELECT deleted_at IS NOT NULL AS deleted FROM ledger.budget WHERE namespace = $1", namespace
    )
    assert found == [{"deleted": True}]


def test_a_namespace_may_not_claim_the_tenant_of_another(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    namespace = control_plane.namespace()
    control_plane.apply(project(namespace, tenant="acme"))
    found = eventually(lambda: condition(control_plane, "project", "shop", namespace, "Accepted"))
    assert (found["status"], found["reason"]) == ("False", "TenantNotAllowed")
    assert "belongs to" in found["message"]
    assert rows(operator.dsn, "SELECT 1 FROM ledger.project WHERE namespace = $1", namespace) == []


def test_a_label_of_the_namespace_names_its_tenant(control_plane: ControlPlane, operator: OperatorProcess) -> None:
    namespace = control_plane.namespace(labels={"behest.ai/tenant": "acme"})
    control_plane.apply(project(namespace, tenant="acme"))
    eventually(lambda: rows(operator.dsn, "SELECT 1 FROM ledger.project WHERE tenant_id = 'acme'"))


def test_what_only_the_operator_can_see_is_wrong_is_told_in_a_condition(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    namespace = control_plane.namespace()
    control_plane.apply(budget(namespace, window={"period": "Day", "timeZone": "Mars/Olympus"}))
    found = eventually(lambda: condition(control_plane, "budget", "sessions", namespace, "Accepted"))
    assert (found["status"], found["reason"]) == ("False", "Invalid")
    assert found["message"].startswith("spec.window.timeZone: must be an IANA time zone")
    assert rows(operator.dsn, "SELECT 1 FROM ledger.budget WHERE namespace = $1", namespace) == []


def secret(plane: ControlPlane, name: str, namespace: str) -> dict[str, str] | None:
    try:
        found = plane.get("secret", name, namespace)
    except CommandFailed:
        return None
    return {key: base64.b64decode(value).decode() for key, value in found["data"].items()}


def test_a_project_brings_its_namespace_what_sidecars_need(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    namespace = control_plane.namespace(labels={"behest.ai/tenant": "acme"})
    control_plane.apply(project(namespace, apiKeySecretName="shop-key"))
    found = eventually(lambda: secret(control_plane, "behest-sidecar", namespace))
    assert found["tenant"] == "acme"
    assert len(base64.b64decode(found["data-key"])) == 32
    assert rows(found["database-url"], "SELECT ledger.session_tenants_v1() AS tenants") == [{"tenants": ["acme"]}]
    key = eventually(lambda: secret(control_plane, "shop-key", namespace))
    assert key["api-key"].startswith("behest_sk_live_")
    operator.stop(kill=True)
    operator.start()
    eventually(lambda: condition(control_plane, "project", "shop", namespace, "ApiKeyReady"))
    assert secret(control_plane, "behest-sidecar", namespace) == found
    assert secret(control_plane, "shop-key", namespace) == key
    assert len(rows(operator.dsn, "SELECT 1 FROM ledger.api_key WHERE project_id = $1", f"{namespace}/shop")) == 1


def test_a_missing_secret_of_an_upstream_is_named_and_taken_once_it_is_there(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    namespace = control_plane.namespace()
    control_plane.apply(
        {
            "apiVersion": "behest.ai/v1alpha1",
            "kind": "Upstream",
            "metadata": {"name": "openai", "namespace": namespace},
            "spec": {
                "baseURL": "https://api.openai.com/v1",
                "credentials": {"secretKeyRef": {"name": "openai", "key": "api-key"}},
            },
        }
    )
    found = eventually(lambda: condition(control_plane, "upstream", "openai", namespace, "CredentialsReady"))
    assert found["message"] == "there is no key api-key of Secret openai: create it"
    control_plane.kubectl(
        "create", "secret", "generic", "openai", "--namespace", namespace, "--from-literal=api-key=sk-0123456789abcdef"
    )

    def taken() -> list[dict[str, Any]]:
        return rows(operator.dsn, "SELECT last_four, sealed FROM ledger.provider_key WHERE tenant_id = $1", namespace)

    (row,) = eventually(taken)
    assert row["last_four"] == "cdef"
    assert b"sk-0123" not in row["sealed"]


def test_an_operator_that_was_killed_comes_to_the_same_end(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    namespace = control_plane.namespace()
    for number in range(6):
        control_plane.apply(budget(namespace, f"b{number}"))
        operator.stop(kill=True)
        operator.start()
    control_plane.kubectl("delete", "budget", "b0", "--namespace", namespace, "--wait=false")
    operator.stop(kill=True)
    operator.start()

    def gone() -> bool:
        return "b0" not in control_plane.kubectl("get", "budgets", "--namespace", namespace, "--output=name")

    eventually(gone, what="the end of the finalizer")
    sql = "SELECT name FROM ledger.budget WHERE namespace = $1 AND deleted_at IS NULL ORDER BY 1"

    def the_others() -> bool:
        return [row["name"] for row in rows(operator.dsn, sql, namespace)] == ["b1", "b2", "b3", "b4", "b5"]

    eventually(the_others, what="the reading of the other budgets")


def test_a_stolen_login_of_one_namespace_is_of_no_use_against_another(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    mine, theirs = control_plane.namespace("mine"), control_plane.namespace("theirs")
    secrets: dict[str, dict[str, str]] = {}
    for namespace in (mine, theirs):
        control_plane.kubectl(
            "create", "secret", "generic", "openai", "--namespace", namespace, "--from-literal=api-key=sk-0123456789ab"
        )
        upstream = {
            "baseURL": "https://api.openai.com/v1",
            "credentials": {"secretKeyRef": {"name": "openai", "key": "api-key"}},
        }
        about = {"name": "openai", "namespace": namespace}
        control_plane.apply(
            project(namespace, apiKeySecretName="shop-key"),
            budget(namespace),
            {"apiVersion": "behest.ai/v1alpha1", "kind": "Upstream", "metadata": about, "spec": upstream},
        )
        secrets[namespace] = eventually(partial(secret, control_plane, "behest-sidecar", namespace))
        for kind, name, told in (
            ("budget", "sessions", "Programmed"),
            ("upstream", "openai", "Programmed"),
            ("project", "shop", "ApiKeyReady"),
        ):
            eventually(partial(condition, control_plane, kind, name, namespace, told), what=f"{told} of {kind}")
    assert secrets[mine]["data-key"] != secrets[theirs]["data-key"]
    asyncio.run(attack(secrets[mine]["database-url"], operator.dsn, theirs))


async def attack(stolen: str, owner_dsn: str, theirs: str) -> None:
    thief, owner = await connect(stolen), await connect(owner_dsn)
    try:
        tables = [row for row in await owner.fetch(ALL_TABLES) if row["of_tenants"]]
        before = {row["name"]: await count(owner, row["name"], theirs) for row in tables}
        assert before["budget"] == before["project"] == before["upstream"] == before["provider_key"] == 1
        for row in tables:
            try:
                assert await count(thief, row["name"], theirs) == 0, row["name"]
            except asyncpg.InsufficientPrivilegeError:
                continue
        for row in tables:
            if row["kind"] == "v":
                continue
            for statement in ("INSERT INTO {} DEFAULT VALUES", "UPDATE {} SET tenant_id = tenant_id", "DELETE FROM {}"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await thief.execute(statement.format(f"ledger.{row['name']}"))
        with pytest.raises(LedgerForbiddenError, match=f"may not act for tenant {theirs}"):
            await holds.admit(thief, admission(tenant=theirs, need=1))
        with pytest.raises(LedgerForbiddenError, match=f"may not act for tenant {theirs}"):
            await holds.settle(thief, [settlement(new_id(), output=1, tenant=theirs)])
        assert {row["name"]: await count(owner, row["name"], theirs) for row in tables} == before
    finally:
        await thief.close()
        await owner.close()


async def count(connection: Any, table: str, tenant: str) -> int:
    found: int = await connection.fetchval(f"SELECT count(*) FROM ledger.{table} WHERE tenant_id = $1", tenant)
    return found


def test_what_the_api_server_takes_and_behest_apply_refuses_is_refused_in_the_same_words(
    control_plane: ControlPlane, operator: OperatorProcess
) -> None:
    taken, namespace = 0, control_plane.namespace("bad")
    for number, (manifest, reason) in enumerate(INVALID):
        document = copy.deepcopy(manifest)
        if not isinstance(document.get("metadata"), dict):
            continue
        document["metadata"] |= {"name": f"m{number}", "namespace": namespace}
        try:
            from_object(document)
        except InvalidManifestsError as error:
            words = "; ".join(f"{item.path}: {item.reason}".lstrip(": ") for item in error.errors)
        else:
            continue  # what was wrong is its name, which is another one here
        try:
            control_plane.apply(document)
        except CommandFailed:
            continue
        accepted = eventually(
            partial(condition, control_plane, document["kind"].lower(), f"m{number}", namespace, "Accepted"),
            what=reason,
        )
        assert (accepted["status"], accepted["message"]) == ("False", words)
        taken += 1
    assert taken >= len(LEFT_TO_THE_OPERATOR)
    for table in ("project", "upstream", "tier", "budget"):
        assert rows(operator.dsn, f"SELECT 1 FROM ledger.{table}") == []


def test_while_the_ledger_is_away_the_status_says_so_and_then_everything_is_as_it_was_asked(
    control_plane: ControlPlane, operator: OperatorProcess, postgres: Server
) -> None:
    namespace = control_plane.namespace()
    name = operator.dsn.rpartition("/")[2]
    closed = [
        f"ALTER DATABASE {name} ALLOW_CONNECTIONS false",
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
    ]
    asyncio.run(execute(postgres.dsn, *closed))
    try:
        control_plane.apply(budget(namespace), project(namespace))

        def unknown() -> bool:
            found = condition(control_plane, "budget", "sessions", namespace, "Programmed")
            return found is not None and (found["status"], found["reason"]) == ("Unknown", "LedgerUnavailable")

        eventually(unknown, what="the word that the ledger is away")
    finally:
        asyncio.run(execute(postgres.dsn, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))

    def programmed() -> bool:
        found = condition(control_plane, "budget", "sessions", namespace, "Programmed")
        return found is not None and found["status"] == "True"

    eventually(programmed, what="the reading of the budget")
    assert operator.process is not None
    assert operator.process.poll() is None


def test_a_rotated_login_of_the_ledger_is_taken_without_a_restart(
    control_plane: ControlPlane, operator: OperatorProcess, postgres: Server, tmp_path: Path
) -> None:
    file, names = tmp_path / "database-url", [f"owner{number}_{os.getpid()}" for number in (1, 2)]
    parts = urlsplit(operator.dsn)

    def of(name: str) -> str:
        return urlunsplit(parts._replace(netloc=f"{name}:pass-of-{name}@{parts.hostname}:{parts.port}"))

    for name in names:
        asyncio.run(execute(postgres.dsn, f"CREATE ROLE {name} SUPERUSER LOGIN PASSWORD 'pass-of-{name}'"))
    operator.stop()
    operator.environment |= {"BEHEST_DATABASE_URL": "", "BEHEST_DATABASE_URL_FILE": str(file)}
    file.write_text(of(names[0]))
    operator.start()
    namespace = control_plane.namespace()
    try:
        control_plane.apply(budget(namespace), project(namespace))
        programmed = partial(condition, control_plane, "budget", "sessions", namespace, "Programmed")
        eventually(programmed, what="the reading of the budget")
        file.write_text(of(names[1]))
        eventually(lambda: "connecting to the ledger by the login" in operator.log.read_text(), what="the new login")
        gone = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{names[0]}'"
        asyncio.run(execute(postgres.dsn, f"ALTER ROLE {names[0]} NOLOGIN", gone))
        control_plane.apply(budget(namespace, limit={"amount": "2", "currency": "USD"}))
        two = "SELECT 1 FROM ledger.budget WHERE namespace = $1 AND limit_amount = 2e12"
        eventually(lambda: rows(operator.dsn, two, namespace), what="the change")
        keeping = "SELECT usename::text AS name FROM pg_stat_activity WHERE application_name = 'behest keeper'"
        eventually(lambda: {"name": names[1]} in rows(operator.dsn, keeping), what="the keeper's new session")
    finally:
        operator.stop()
        # At the turn of a month the keeper makes partitions, and the login that it has then owns them.
        for name in names:
            asyncio.run(execute(operator.dsn, f"DROP OWNED BY {name}", f"DROP ROLE {name}"))
