"""`behest keys` as a process, against a real PostgreSQL and a running sidecar."""

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from behest_ledger.api_key_hash import api_key_digest, api_key_matches
from behest_ledger.store.configuration import apply_text
from behest_ledger.store.identity import put_signing_key
from behest_proxy.identity.keys import SigningKey
from conftest import Server, own_database
from stack import Project, Stack, wait_until

PROJECT = """
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {name: shop, namespace: demo}
spec: {}
"""
BELIEVED_S = 1.0
"""How long a key may still be believed after its revocation was told."""


def keys(dsn: str | None, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("DATABASE_URL")}
    return subprocess.run(
        [sys.executable, "-I", "-m", "behest_proxy.cli.main", "keys", *argv],
        env={**environment, **({"DATABASE_URL": dsn} if dsn is not None else {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def made(dsn: str, project_id: str, *argv: str) -> tuple[str, str]:
    """A new key and its id."""
    done = keys(dsn, "create", "--project", project_id, *argv)
    assert (done.returncode, done.stderr) == (0, "")
    key, about, *_ = done.stdout.splitlines()
    assert re.fullmatch(r"behest_sk_live_[0-9a-f]{32}", key)
    return key, about.strip().partition(":")[0]


def mint(stack: Stack, key: str) -> httpx.Response:
    return httpx.post(
        stack.base_url + "/v1/auth/mint", json={"user_id": "ada"}, headers={"Authorization": f"Bearer {key}"}
    )


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


def test_a_key_is_shown_once_stored_hashed_and_mints_until_it_is_revoked(stack: Stack, project: Project) -> None:
    key, key_id = made(stack.dsn, project.project_id, "--name", "billing")
    assert re.fullmatch(r"key_[0-9a-f]{16}", key_id)

    (row,) = stack.query("SELECT * FROM ledger.api_key WHERE key_id = $1", key_id)
    assert (row["tenant_id"], row["role"], row["name"]) == (project.namespace, "user", "billing")
    assert row["sha256"] == api_key_digest(key)
    assert api_key_matches(key, argon2_hash=row["argon2"])
    secret = key.rpartition("_")[2]
    assert all(secret not in str(value) for value in row.values())

    listed = keys(stack.dsn, "list", "--project", project.project_id)
    (line,) = (line for line in listed.stdout.splitlines() if key_id in line)
    assert line.split() == [
        key_id,
        f"...{key[-4:]}",
        project.namespace,
        project.project_id,
        "user",
        f"{row['created_at']:%Y-%m-%d}",
        "good",
        "billing",
    ]
    assert secret not in listed.stdout

    assert mint(stack, key).status_code == 200
    revoked = keys(stack.dsn, "revoke", key_id)
    since = time.monotonic()
    assert (revoked.returncode, revoked.stderr) == (0, "")
    assert key_id in revoked.stdout
    wait_until(lambda: mint(stack, key).status_code == 401, what="the refusal of the revoked key")
    assert time.monotonic() - since < BELIEVED_S + 1  # and a second for a busy machine
    assert "revoked" in keys(stack.dsn, "list", "--project", project.project_id).stdout

    again = keys(stack.dsn, "revoke", key_id)
    assert again.returncode == 2
    assert "see `behest keys list`" in again.stderr


def test_a_role_is_the_highest_that_its_tokens_have(stack: Stack, project: Project) -> None:
    key, _ = made(stack.dsn, project.project_id, "--role", "admin")
    answer = httpx.post(
        stack.base_url + "/v1/auth/mint",
        json={"user_id": "ada", "role": "admin"},
        headers={"Authorization": f"Bearer {key}"},
    )
    assert answer.status_code == 200


def test_a_signing_key_that_is_revoked_is_not_believed_any_more(stack: Stack, project: Project) -> None:
    key = SigningKey.generate()

    async def register() -> None:
        await put_signing_key(
            stack.dsn,
            kid=key.kid,
            tenant_id=project.namespace,
            kind="tenant",
            algorithm=key.algorithm,
            public_pem=key.public_pem(),
        )

    stack.run(register())
    now_s = int(time.time())
    token = key.sign(
        {
            "tid": project.namespace,
            "pid": project.project_id,
            "uid": "ada",
            "iss": "behest",
            "aud": "behest",
            "iat": now_s,
            "nbf": now_s,
            "exp": now_s + 600,
        }
    )

    def status() -> int:
        answer = httpx.get(stack.base_url + "/v1/models", headers={"Authorization": f"Bearer {token}"})
        return answer.status_code

    wait_until(lambda: status() == 200, what="the sidecar's knowing the key")
    listed = keys(stack.dsn, "signing", "--tenant", project.namespace)
    (line,) = (line for line in listed.stdout.splitlines() if key.kid in line)
    assert line.split()[1:5] == ["current", "tenant", "RS256", project.namespace]
    assert "PRIVATE" not in listed.stdout

    stranger = keys(stack.dsn, "signing", f"--revoke={key.kid}", "--tenant", "somebody-else")
    assert stranger.returncode == 2
    assert "there is no signing key with this kid" in stranger.stderr
    assert status() == 200

    assert keys(stack.dsn, "signing", f"--retire={key.kid}").returncode == 0
    listed = keys(stack.dsn, "signing", "--tenant", project.namespace)
    assert "previous" in listed.stdout
    time.sleep(BELIEVED_S)
    assert status() == 200, "a retired key's tokens are good until they expire"

    assert keys(stack.dsn, "signing", f"--revoke={key.kid}").returncode == 0
    since = time.monotonic()
    wait_until(lambda: status() == 401, what="the refusal of the token")
    assert time.monotonic() - since < BELIEVED_S + 1


@pytest.mark.parametrize(
    ("argv", "what", "cure"),
    [
        (["create", "--project", "demo/none"], "there is no project 'demo/none'", "behest apply -f FILE"),
        (["create", "--project", "shop"], "there is no project 'shop'", "write it as NAMESPACE/NAME"),
        (["create", "--project", "demo/shop", "--tenant", "x"], "of tenant 'x'", "behest apply -f FILE"),
        (["create", "--project", "demo/shop", "--name", "a\x07b"], "control characters", "255 plain characters"),
        (["create", "--project", "demo/shop", "--role", "god"], "invalid choice: 'god'", "choose from"),
        (["create"], "--project", "required"),
        (["revoke", "key_none"], "there is no API key 'key_none'", "see `behest keys list`"),
        (["signing", "--revoke", "none"], "there is no signing key", "see `behest keys signing`"),
    ],
)
def test_a_mistake_says_what_is_wrong_and_what_to_do(keys_database: str, argv: list[str], what: str, cure: str) -> None:
    done = keys(keys_database, *argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert what in done.stderr
    assert cure in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_database_it_says_how_to_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = keys(None, "list")
    assert done.returncode == 2
    assert "set DATABASE_URL" in done.stderr
    done = keys("postgresql://nobody@127.0.0.1:1/x?sslmode=disable", "create", "--project", "demo/shop")
    assert done.returncode == 2
    assert "does not answer" in done.stderr
    assert "behest_sk_live_" not in done.stdout + done.stderr


def test_where_there_are_none_it_says_how_to_make_one(keys_database: str) -> None:
    assert "behest keys create" in keys(keys_database, "list").stdout
    assert "There are no signing keys yet" in keys(keys_database, "signing").stdout


@pytest.fixture(scope="module")
def keys_database(template: Server) -> Iterator[str]:
    with own_database(template, "keys") as dsn:
        asyncio.run(apply_text(dsn, PROJECT))
        yield dsn
