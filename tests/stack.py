"""The whole system as a test sees it: a sidecar process, a simulator process, and a ledger of its own.

One stack serves a whole run. Tests keep out of each other's way by projects of their own: `Stack.project` makes one,
in a namespace of its own, with its API key, budget and upstream.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
from argon2 import PasswordHasher

from behest_ledger.api_key_hash import new_api_key
from behest_ledger.prices.snapshot import compile_package_book
from behest_ledger.store import identity
from behest_ledger.store.configuration import apply_text
from behest_ledger.store.pool import connect
from behest_ledger.store.prices import store_book
from behest_ledger.store.verify import Verdict, verify
from behest_proxy.cli.preflight import free_port
from behest_proxy.identity.keys import SigningKey

BEHEST = [sys.executable, "-I", "-m", "behest_proxy.cli.main"]
_CHEAP_HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
_numbers = count(1)
_DAY_S = 86_400
_ANSWER_S = 30.0
"""How long an answer may take where that is not what a test is about; httpx's own patience is 5 s."""


_PROBE = """
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: probe, namespace: probe}}
spec: {{allowedOrigins: ["{origin}"]}}
"""


def wait_until(is_so: Callable[[], Any], *, timeout_s: float = 60.0, what: str = "it") -> Any:
    """Poll until something is true, and return it. Fails loudly, never silently, when it does not come."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if found := is_so():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


def within_one(period_s: int, *, takes_s: float) -> None:
    """Wait for the next such period of the clock (UTC) where this one ends too soon for what follows.

    Windows of budgets begin with days, hours and minutes: what is counted in one must not begin in the one before.
    """
    left_s = period_s - time.time() % period_s
    if left_s < takes_s:
        time.sleep(left_s + 0.01)


@contextmanager
def process(arguments: list[str], *, environment: dict[str, str], log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A child process that is gone when the block ends, whatever happens in it."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            arguments, env={**os.environ, **environment}, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@dataclass
class Project:
    """A project in a namespace of its own."""

    stack: "Stack"
    namespace: str
    api_key: str

    @property
    def project_id(self) -> str:
        return f"{self.namespace}/app"

    def mint(self, *, user: str = "u1", session: str | None = "s1", **members: Any) -> str:
        """A token for a user and session."""
        body = {"user_id": user, **({"session_id": session} if session else {}), **members}
        answer = httpx.post(
            self.stack.base_url + "/v1/auth/mint",
            json=body,
            headers={"Authorization": f"Bearer {self.api_key}"},
            timeout=_ANSWER_S,
        )
        answer.raise_for_status()
        return str(answer.json()["jwt"])

    def wait_until_served(self) -> None:
        """Until the sidecar has read of it."""
        headers = {"Authorization": f"Bearer {self.mint()}"}

        def is_known() -> bool:
            return httpx.get(self.stack.base_url + "/v1/models", headers=headers, timeout=_ANSWER_S).status_code == 200

        wait_until(is_known, what="the sidecar's reading of the configuration")

    def budgets(self, token: str) -> dict[str, dict[str, Any]]:
        """The caller's budgets by name."""
        headers = {"Authorization": f"Bearer {token}"}
        answer = httpx.get(self.stack.base_url + "/v1/budgets", headers=headers, timeout=_ANSWER_S)
        answer.raise_for_status()
        return {row["budget"].partition("/")[2]: row for row in answer.json()["data"]}

    def all_settled(self) -> list[dict[str, Any]]:
        """All of the project's ended requests, once none of its tenant runs any more; there must be one.

        A client has its answer before the books have its charge: that is written beside, some milliseconds later.
        """
        open_ones = "SELECT FROM ledger.hold WHERE tenant_id = $1 AND state IN ('open', 'suspense')"
        wait_until(lambda: not self.stack.query(open_ones, self.namespace), what=f"the ends in {self.project_id}")
        return self.settled()

    def settled(self, *, number: int = 1) -> list[dict[str, Any]]:
        """The project's ended requests, oldest first, once there are so many of them."""

        def rows() -> list[dict[str, Any]] | None:
            found = self.stack.query(
                "SELECT request_id::text, user_id, session_id, model, outcome, source, input_tokens, output_tokens,"
                " amount_pico::text, facts::text FROM ledger.request_now WHERE project_id = $1 ORDER BY ended_at",
                self.project_id,
            )
            return found if len(found) >= number else None

        found = wait_until(rows, what=f"{number} settled requests of {self.project_id}")
        return [{**row, "amount_pico": int(row["amount_pico"]), "facts": json.loads(row["facts"])} for row in found]


@dataclass
class Stack:
    """Sidecar, simulator, ledger."""

    dsn: str
    base_url: str
    admin_url: str
    sim_url: str
    signing_key: SigningKey
    sidecar: subprocess.Popen[bytes]
    log: Path
    _start_sidecar: Callable[[], subprocess.Popen[bytes]]
    _environment: dict[str, str]
    _runner: asyncio.Runner = field(default_factory=asyncio.Runner)

    def run(self, work: Any) -> Any:
        """Await something on a loop of the test's own."""
        return self._runner.run(work)

    def kill_sidecar(self) -> None:
        """End the sidecar as a crash would."""
        self.sidecar.kill()
        self.sidecar.wait(10)

    def start_sidecar(self) -> None:
        """Start it again, as it was."""
        self.sidecar = self._start_sidecar()

    @contextmanager
    def another_sidecar(self, **settings: str) -> Generator[str]:
        """One more sidecar on the same ledger, with settings of its own: its base URL, while the block runs."""
        port, admin_port = free_port(0), free_port(0)
        environment = {
            **self._environment,
            "BEHEST_BIND": f"127.0.0.1:{port}",
            "BEHEST_ADMIN_BIND": f"127.0.0.1:{admin_port}",
            **settings,
        }
        assert "BEHEST_JOURNAL_DIR" not in environment, "two sidecars do not share a journal"
        with process([*BEHEST, "proxy"], environment=environment, log=self.log.with_name("another.log")):

            def is_up() -> bool:
                try:
                    return httpx.get(f"http://127.0.0.1:{admin_port}/readyz").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(is_up, what="another sidecar's start")
            yield f"http://127.0.0.1:{port}"

    def close(self) -> None:
        """Close the test's own loop."""
        self._runner.close()

    def query(self, sql: str, *arguments: Any) -> list[dict[str, Any]]:
        """Rows of the ledger's database."""

        async def fetch() -> list[dict[str, Any]]:
            connection = await connect(self.dsn)
            try:
                return [dict(row) for row in await connection.fetch(sql, *arguments)]
            finally:
                await connection.close()

        found: list[dict[str, Any]] = self.run(fetch())
        return found

    def verify(self) -> Verdict:
        """Recompute the books."""

        async def recompute() -> Verdict:
            connection = await connect(self.dsn)
            try:
                return await verify(connection)
            finally:
                await connection.close()

        verdict: Verdict = self.run(recompute())
        return verdict

    def apply(self, text: str) -> None:
        """Write manifests and wait until the sidecar has read them."""
        self.run(apply_text(self.dsn, text))
        self.wait_until_read()

    def wait_until_read(self) -> None:
        """Until the sidecar has read all that was applied so far: it lets an origin in that was allowed after that."""
        origin = f"https://probe-{next(_numbers)}.example"
        self.run(apply_text(self.dsn, _PROBE.format(origin=origin)))
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}

        def is_read() -> bool:
            preflight = httpx.options(self.base_url + "/v1/chat/completions", headers=headers, timeout=_ANSWER_S)
            return bool(preflight.headers.get("access-control-allow-origin") == origin)

        wait_until(is_read, what="the sidecar's reading of the configuration")

    def project(
        self,
        *,
        limit_usd: str = "1000",
        upstream_url: str | None = None,
        upstream: str = "",
        project: str = "",
        more: str = "",
        namespace: str | None = None,
        served: bool = True,
    ) -> Project:
        """A new project with a budget per session; further lines of YAML go into its specs.

        Its tenant is its namespace. Not served: this sidecar's database role may not act for that.
        """
        within_one(_DAY_S, takes_s=20.0)
        namespace = namespace or f"t{next(_numbers)}"
        self.run(
            apply_text(
                self.dsn,
                f"""
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: app, namespace: {namespace}}}
spec:
  tenant: {namespace}
  defaultModel: gpt-4o-mini
{project}
---
apiVersion: behest.ai/v1alpha1
kind: Upstream
metadata: {{name: provider, namespace: {namespace}}}
spec:
  baseURL: {upstream_url or self.sim_url}
{upstream}
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: sessions, namespace: {namespace}}}
spec:
  scope: {{project: app}}
  per: [session]
  limit: {{amount: "{limit_usd}", currency: USD}}
  window: {{period: Day}}
{more}
""",
                default_namespace=namespace,
            )
        )
        made = Project(self, namespace, new_api_key())
        # Hundreds of keys are made here, and each is verified once: the hash's parameters are stored with it.
        with patch.object(identity, "hash_api_key", _CHEAP_HASHER.hash):
            self.run(
                identity.register_api_key(
                    self.dsn,
                    tenant_id=namespace,
                    project_id=made.project_id,
                    key=made.api_key,
                    role="admin",
                    name="test",
                )
            )
        if not served:
            return made
        made.wait_until_served()
        return made

    def sim_requests(self, *, last: int = 10_000) -> list[dict[str, Any]]:
        """What the simulator saw last, oldest first."""
        url = self.sim_url.removesuffix("/v1") + "/sim/requests"
        answer = httpx.get(url, params={"limit": last}, timeout=_ANSWER_S)
        found: list[dict[str, Any]] = answer.json()
        return found

    def sim_request(self, request_id: str) -> dict[str, Any] | None:
        """What the simulator saw of one request; the id is the sidecar's."""
        url = self.sim_url.removesuffix("/v1") + "/sim/requests"
        answer = httpx.get(url, params={"id": request_id}, timeout=_ANSWER_S)
        found: list[dict[str, Any]] = answer.json()
        return found[-1] if found else None


@contextmanager
def running_stack(dsn: str, folder: Path, *, recordings: Path | None = None, **settings: str) -> Generator[Stack]:
    """Start simulator and sidecar on a migrated, empty ledger; stop them at the end."""

    async def prepare() -> None:
        connection = await connect(dsn)
        try:
            await store_book(connection, compile_package_book(), effective_from=datetime.now(UTC))
        finally:
            await connection.close()

    asyncio.run(prepare())
    key = SigningKey.generate()
    key_file = folder / "signing.pem"
    key_file.write_bytes(key.private_pem())
    key_file.chmod(0o600)
    port_file = folder / "sim.port"
    sim_arguments = [*BEHEST, "sim", "--port", "0", "--port-file", str(port_file)]
    if recordings is not None:
        sim_arguments += ["--recordings", str(recordings)]
    port, admin_port = free_port(0), free_port(0)
    environment = {
        "BEHEST_DATABASE_URL": dsn,
        "BEHEST_SIGNING_KEY_FILE": str(key_file),
        "BEHEST_BIND": f"127.0.0.1:{port}",
        "BEHEST_ADMIN_BIND": f"127.0.0.1:{admin_port}",
        "NO_PROXY": "127.0.0.1,localhost",
        **settings,
    }
    log = folder / "sidecar.log"
    with contextlib.ExitStack() as processes:
        processes.enter_context(process(sim_arguments, environment={}, log=folder / "sim.log"))
        sim_port = wait_until(
            lambda: port_file.exists() and port_file.read_text().strip(), what="the simulator's start"
        )
        admin_url = f"http://127.0.0.1:{admin_port}"

        def start_sidecar() -> subprocess.Popen[bytes]:
            sidecar = processes.enter_context(process([*BEHEST, "proxy"], environment=environment, log=log))

            def is_up() -> bool:
                if sidecar.poll() is not None:
                    raise AssertionError(f"the sidecar ended: {log.read_text()}")
                try:
                    return httpx.get(admin_url + "/healthz").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(is_up, what="the sidecar's start")
            return sidecar

        stack = Stack(
            dsn=dsn,
            base_url=f"http://127.0.0.1:{port}",
            admin_url=admin_url,
            sim_url=f"http://127.0.0.1:{sim_port}/v1",
            signing_key=key,
            sidecar=start_sidecar(),
            log=log,
            _start_sidecar=start_sidecar,
            _environment=environment,
        )
        try:
            yield stack
        finally:
            stack.close()
