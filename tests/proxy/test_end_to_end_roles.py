"""A sidecar whose database login is bound to one tenant: everything works, for that tenant."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ledger.tenant_roles import login
from stack import Project, Stack, running_stack, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
LONG = {"output_tokens": 900, "chunk_interval_ms": 1}


@pytest.fixture
def bound(database: str, tmp_path: Path) -> Iterator[Stack]:
    """A stack whose sidecar may act for the tenant acme. The books must be clean at the end."""
    with (
        login(database, "acme") as dsn,
        running_stack(
            database, tmp_path, BEHEST_DATABASE_URL=dsn, BEHEST_JOURNAL_DIR=str(tmp_path / "journal")
        ) as stack,
    ):
        yield stack
        assert stack.verify().findings == []


def client_of(project: Project, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=project.stack.base_url + "/v1", api_key=project.mint(**options), max_retries=0)


def test_an_unmodified_client_streams_and_is_billed(bound: Stack) -> None:
    project = bound.project(namespace="acme")
    with client_of(project, session="s1") as client:
        stream = client.chat.completions.create(
            model="gpt-4o-mini", messages=QUESTION, stream=True, extra_body={"sim": LONG}
        )
        assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")
    (row,) = project.settled()
    assert (row["outcome"], row["source"], row["output_tokens"]) == ("completed", "provider", 900)
    assert row["amount_pico"] > 0
    (holder,) = bound.query("SELECT role_name::text AS role FROM ledger.holder")
    assert holder["role"].startswith("test_")
    token = project.mint(session="s1")
    assert project.budgets(token)["sessions"]["held"] in ("0", "0.000000000000")
    usage = httpx.get(bound.base_url + "/v1/billing/usage", headers={"Authorization": f"Bearer {token}"})
    assert usage.json()["platform"]["requests"] == 1


def test_a_budget_ends_a_stream_in_the_middle(bound: Stack) -> None:
    project = bound.project(namespace="acme", limit_usd="0.0003")
    with client_of(project, session="poor") as client, pytest.raises(openai.APIError, match="budget"):
        for _ in client.chat.completions.create(
            model="gpt-4o-mini", messages=QUESTION, stream=True, extra_body={"sim": {**LONG, "output_tokens": 5000}}
        ):
            pass
    (row,) = project.settled()
    assert row["outcome"] == "quota_exceeded"


def test_another_tenants_key_and_project_are_not_there(bound: Stack) -> None:
    bound.project(namespace="acme")
    other = bound.project(namespace="globex", served=False)
    answer = httpx.post(
        bound.base_url + "/v1/auth/mint",
        json={"user_id": "u1"},
        headers={"Authorization": f"Bearer {other.api_key}"},
    )
    assert answer.status_code == 401
    keys = bound.query("SELECT tenant_id, kind FROM ledger.signing_key")
    assert keys == [{"tenant_id": "acme", "kind": "own"}]


def test_its_journal_is_settled_after_a_crash(bound: Stack) -> None:
    project = bound.project(namespace="acme")
    with client_of(project, session="crash") as client:
        stream = client.chat.completions.create(
            model="gpt-4o-mini", messages=QUESTION, stream=True, extra_body={"sim": {**LONG, "chunk_interval_ms": 20}}
        )
        for _, _ in zip(stream, range(20), strict=False):
            pass
        bound.kill_sidecar()
    bound.start_sidecar()
    (row,) = project.settled()
    assert row["outcome"] == "crashed"
    assert row["amount_pico"] > 0


def test_a_sidecar_whose_role_acts_for_nobody_says_so(database: str, stack: Stack, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(stack.signing_key.private_pem())

    def ended(dsn: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-I", "-m", "behest_proxy.cli.main", "proxy"],
            env={"BEHEST_DATABASE_URL": dsn, "BEHEST_SIGNING_KEY_FILE": str(key), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 2
        return ran.stderr

    with login(database, "acme") as dsn:
        name = dsn.split("//")[1].split(":")[0]
        run_sql(stack, database, f"UPDATE ledger.tenant_role SET role_name = 'x{name}'")
        assert f"role {name} may act for no tenant: see `behest ledger role create`" in ended(dsn)
        run_sql(stack, database, f"UPDATE ledger.tenant_role SET role_name = '{name}'")


def run_sql(stack: Stack, dsn: str, statement: str) -> None:
    from behest_ledger.store.pool import connect

    async def run() -> None:
        connection = await connect(dsn)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    stack.run(run())


def test_two_tenants_sidecars_share_a_ledger_and_nothing_else(database: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with (
        login(database, "acme") as acme_dsn,
        login(database, "globex") as globex_dsn,
        running_stack(database, folders[0], BEHEST_DATABASE_URL=acme_dsn) as one,
        running_stack(database, folders[1], BEHEST_DATABASE_URL=globex_dsn) as two,
    ):
        acme, globex = one.project(namespace="acme"), two.project(namespace="globex")
        token = acme.mint()
        models = [stack.base_url + "/v1/models" for stack in (one, two)]
        answers = [httpx.get(url, headers={"Authorization": f"Bearer {token}"}).status_code for url in models]
        assert answers[0] == 200
        assert answers[1] in (401, 403), "a token of one tenant's sidecar is believed by the other's"
        for project in (acme, globex):
            with client_of(project) as client:
                client.chat.completions.create(
                    model="gpt-4o-mini", messages=QUESTION, extra_body={"sim": {"output_tokens": 5}}
                )
            assert wait_until(project.settled)[0]["outcome"] == "completed"
