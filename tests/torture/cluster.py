"""Real processes to be killed: PostgreSQL with all its children, a simulator, sidecars with journals of their own."""

import asyncio
import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import httpx

from behest_ledger.api_key_hash import new_api_key
from behest_ledger.prices.snapshot import compile_package_book
from behest_ledger.store.configuration import apply_text
from behest_ledger.store.identity import register_api_key
from behest_ledger.store.migrate import migrate
from behest_ledger.store.pool import connect
from behest_ledger.store.prices import store_book
from behest_proxy.cli.folder import DataFolder
from behest_proxy.cli.postgres import Postgres, launch
from behest_proxy.identity.keys import SigningKey
from faulty_wire import FaultyWire, faulty_wire
from stack import process

BEHEST = [sys.executable, "-I", "-m", "behest_proxy.cli.main"]
TENANT = "torture"
START_S = 60.0
DRAIN_S = 30.0
HOLDER_TTL_S = 4.0
"""So short that who stays away for a while is found dead."""
_PORTS = range(20_000, 32_000)
"""Below those that systems give to outgoing connections: nobody gets one while its owner is dead."""


class Database:
    """One PostgreSQL that is killed and started again on the same data and port."""

    def __init__(self, folder: Path) -> None:
        self._folder = DataFolder(folder)
        self._folder.create()
        place = folder / "postgres"
        place.mkdir()
        (place / "port").write_text(f"{_own_port()}\n")  # the port of last time is taken again
        self._server = self._launch()
        self.dsn = self._server.dsn
        self.stops: Counter[str] = Counter()
        """How often it was ended in which way."""
        self._earlier_log = ""
        self.lock = asyncio.Lock()
        """Held while it is down."""

    def _launch(self) -> Postgres:
        return launch(self._folder, environment={"PATH": os.environ.get("PATH", "")})

    def kill(self) -> None:
        """`kill -9` of the postmaster and its children, none of which has time to do anything."""
        postmaster = self._server.process.pid
        os.kill(postmaster, signal.SIGSTOP)  # it may make no more children, nor see those die
        for pid in [*_children(postmaster), postmaster]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not self._server.process.wait(20):
            raise AssertionError("PostgreSQL survived kill -9")
        self._ended("kill")

    def shut_down(self, how: Literal["fast", "immediate"]) -> None:
        """PostgreSQL's own ways to stop at once: with its transactions rolled back, or without another word."""
        os.kill(self._server.process.pid, signal.SIGINT if how == "fast" else signal.SIGQUIT)
        if not self._server.process.wait(20):
            raise AssertionError(f"PostgreSQL did not stop in the way {how}")
        self._ended(how)

    def _ended(self, how: str) -> None:
        self._earlier_log += self._current_log()  # each start begins a new file
        self.stops[how] += 1

    def start(self) -> None:
        """Recover and serve again, where the sidecars look for it."""
        self._server.stop()  # it has ended: this gives its lock back
        self._server = self._launch()
        if self._server.dsn != self.dsn:
            raise AssertionError("PostgreSQL came back on another port: somebody took its own")

    def stop(self) -> None:
        """The end of the torture."""
        self._server.stop()

    def _current_log(self) -> str:
        return self._server.process.log.read_text(errors="replace")

    def errors(self) -> Counter[str]:
        """What all its lives complained of."""
        lines = (self._earlier_log + self._current_log()).splitlines()
        return Counter(
            line.partition(word)[2][:120] for line in lines for word in ("ERROR:  ", "PANIC:  ") if word in line
        )


def _own_port() -> int:
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _children(parent: int) -> list[int]:
    if sys.platform.startswith("linux"):
        found: list[int] = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # pid (name) state ppid ...; the name may hold anything, also a parenthesis
                if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(stat.parent.name))
        return found
    lines = subprocess.run(["/bin/ps", "-Ao", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, of in (line.split() for line in lines.splitlines()) if int(of) == parent]


@dataclass(kw_only=True)
class Sidecar:
    """One sidecar; it comes back on the same ports with the same journal."""

    number: int
    port: int
    admin_port: int
    log: Path
    launch: Callable[[], subprocess.Popen[bytes]]
    wire: FaultyWire
    """Its way to PostgreSQL."""
    drains: int = 0
    slowest_start_s: float = 0.0
    kills_s: list[float] = field(default_factory=list[float])
    """When it was killed, on the monotonic clock."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while it is down."""
    process: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """As a crash would."""
        assert self.process is not None
        self.kills_s.append(time.monotonic())
        self.process.kill()
        self.process.wait(20)

    async def drain(self) -> None:
        """As whoever rolls out a new version does. Raises `AssertionError` where it does not end well."""
        assert self.process is not None
        self.process.terminate()
        self.drains += 1
        try:
            status = await asyncio.to_thread(self.process.wait, DRAIN_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"sidecar {self.number} did not end after SIGTERM") from None
        if status != 0:
            raise AssertionError(f"sidecar {self.number} ended with {status} after SIGTERM")

    async def ended(self) -> None:
        """Wait for its end, for a while."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self.process.wait, DRAIN_S)

    async def start(self) -> None:
        """Until it answers. One that ends because its ledger is down is started again."""
        began_s = time.monotonic()
        await self._start(began_s + START_S)
        self.slowest_start_s = max(self.slowest_start_s, time.monotonic() - began_s)

    async def _start(self, deadline_s: float) -> None:
        self.process = self.launch()
        async with httpx.AsyncClient(trust_env=False) as http:
            while time.monotonic() < deadline_s:
                if self.process.poll() is not None:
                    await asyncio.sleep(0.2)
                    self.process = self.launch()
                with contextlib.suppress(httpx.TransportError):
                    if (await http.get(f"http://127.0.0.1:{self.admin_port}/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.05)
        raise AssertionError(f"sidecar {self.number} did not start: {self.log.read_text()[-2000:]}")

    def was_killed(self, since_s: float, until_s: float) -> bool:
        """Whether it was killed in that time."""
        return any(since_s <= at_s <= until_s for at_s in self.kills_s)


@dataclass(kw_only=True)
class KeeperProcess:
    """`behest ledger keep`, with little patience."""

    launch: Callable[[], subprocess.Popen[bytes]]
    log: Path
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait(20)

    def start(self) -> None:
        """Another one."""
        self.process = self.launch()

    @property
    def found_dead(self) -> int:
        """How many holders it fenced."""
        return self.log.read_text(errors="replace").count(" is dead: fenced")

    @property
    def charged(self) -> int:
        """How many requests it charged by policy, for their sidecar was away for too long."""
        found = re.findall(r" (\d+) requests that no journal settled", self.log.read_text(errors="replace"))
        return sum(map(int, found))


@dataclass(kw_only=True)
class Cluster:
    """What is tortured."""

    database: Database
    sidecars: list[Sidecar]
    keeper: KeeperProcess
    sim_url: str
    api_key: str

    async def query(self, sql: str, *arguments: Any) -> list[dict[str, Any]]:
        """Rows of the ledger. Raises `LedgerError` and what asyncpg raises while it is down."""
        connection = await connect(self.database.dsn)
        try:
            return [dict(row) for row in await connection.fetch(sql, *arguments)]
        finally:
            connection.terminate()

    async def mint(self, session: str) -> str:
        """A token for a session; every sidecar takes it."""
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.post(
                f"http://127.0.0.1:{self.sidecars[0].port}/v1/auth/mint",
                json={"user_id": "u1", "session_id": session},
                headers={"Authorization": f"Bearer {self.api_key}"},
                timeout=20,
            )
        answer.raise_for_status()
        return str(answer.json()["jwt"])

    async def sim_requests(self) -> list[dict[str, Any]]:
        """What the provider saw, which it then forgets."""
        async with httpx.AsyncClient(trust_env=False) as http:
            found: list[dict[str, Any]] = (await http.get(f"{self.sim_url}/sim/requests", timeout=60)).json()
            await http.delete(f"{self.sim_url}/sim/requests")
        return found

    def sidecar_faults(self) -> Counter[str]:
        """Lines of the sidecars' logs that may never be written."""
        words = (" ERROR ", " CRITICAL ")
        return Counter(
            f"sidecar {sidecar.number}: {line[-160:]}"
            for sidecar in self.sidecars
            for line in sidecar.log.read_text(errors="replace").splitlines()
            if any(word in line for word in words) and not any(said in line for said in _EXPECTED)
        )


_EXPECTED = (
    "this process was silent for too long",  # its wire stood still
    "settlements could not be written before the end",  # it was told to stop while its ledger was away
)

_UPSTREAM = f"""
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: app, namespace: {TENANT}}}
spec: {{tenant: {TENANT}, defaultModel: gpt-4o-mini}}
---
apiVersion: behest.ai/v1alpha1
kind: Upstream
metadata: {{name: provider, namespace: {TENANT}}}
spec: {{baseURL: "%s/v1"}}
"""


async def _prepare(dsn: str, sim_url: str) -> str:
    await migrate(dsn)
    connection = await connect(dsn)
    try:
        await store_book(connection, compile_package_book(), effective_from=datetime.now(UTC))
    finally:
        await connection.close()
    await apply_text(dsn, _UPSTREAM % sim_url, default_namespace=TENANT)
    key = new_api_key()
    await register_api_key(dsn, tenant_id=TENANT, project_id=f"{TENANT}/app", key=key, role="admin", name="torture")
    return key


@contextlib.asynccontextmanager
async def running_cluster(folder: Path, *, sidecars: int, recordings: Path | None = None) -> AsyncGenerator[Cluster]:
    """Start everything on an empty ledger; nothing of it is left at the end. `folder`: others must be able to pass."""
    async with contextlib.AsyncExitStack() as processes:
        port_file = folder / "sim.port"
        arguments = [*BEHEST, "sim", "--port", "0", "--port-file", str(port_file)]
        if recordings is not None:
            arguments += ["--recordings", str(recordings / "chat")]
        processes.enter_context(process(arguments, environment={}, log=folder / "sim.log"))
        database = await asyncio.to_thread(Database, folder / "data")
        processes.callback(database.stop)
        while not (port_file.exists() and port_file.read_text().strip()):
            await asyncio.sleep(0.05)
        sim_url = f"http://127.0.0.1:{port_file.read_text().strip()}"
        key_file = folder / "signing.pem"
        key_file.write_bytes(SigningKey.generate().private_pem())
        key_file.chmod(0o600)
        api_key = await _prepare(database.dsn, sim_url)
        made: list[Sidecar] = []
        for number in range(sidecars):
            wire, dsn = await processes.enter_async_context(faulty_wire(database.dsn))
            made.append(_sidecar(number, folder, key_file, dsn, wire, processes))
        await asyncio.gather(*(sidecar.start() for sidecar in made))
        keeper = _keeper(folder, database.dsn, processes)
        try:
            yield Cluster(database=database, sidecars=made, keeper=keeper, sim_url=sim_url, api_key=api_key)
        finally:
            # Here, where their wires still work: whoever leaves the stack stops the loop while it waits.
            for sidecar in made:
                if sidecar.process is not None:
                    sidecar.process.terminate()
            await asyncio.gather(*(sidecar.ended() for sidecar in made))


def _keeper(folder: Path, dsn: str, processes: contextlib.AsyncExitStack) -> KeeperProcess:
    log = folder / "keeper.log"
    log.touch()
    # All that is held is charged, so that what the journal says later can only be less: no window is ever overrun.
    arguments = [*BEHEST, "ledger", "keep", "--interval", "0.3", "--grace-hours", "0.0002", "--policy", "hold"]

    def start() -> subprocess.Popen[bytes]:
        return processes.enter_context(process(arguments, environment={"DATABASE_URL": dsn}, log=log))

    return KeeperProcess(launch=start, log=log, process=start())


def _sidecar(
    number: int, folder: Path, key_file: Path, dsn: str, wire: FaultyWire, processes: contextlib.AsyncExitStack
) -> Sidecar:
    port, admin_port = _own_port(), _own_port()
    log = folder / f"sidecar-{number}.log"
    log.touch()
    environment = {
        "BEHEST_DATABASE_URL": dsn,
        "BEHEST_SIGNING_KEY_FILE": str(key_file),
        "BEHEST_BIND": f"127.0.0.1:{port}",
        "BEHEST_ADMIN_BIND": f"127.0.0.1:{admin_port}",
        "BEHEST_JOURNAL_DIR": str(folder / f"journal-{number}"),
        "BEHEST_NAME": f"torture-{number}",
        "BEHEST_HOLDER_TTL_S": f"{HOLDER_TTL_S}",
        "BEHEST_DRAIN_S": "0.5",
        "NO_PROXY": "127.0.0.1,localhost",
    }

    def start() -> subprocess.Popen[bytes]:
        return processes.enter_context(process([*BEHEST, "proxy"], environment=environment, log=log))

    return Sidecar(number=number, port=port, admin_port=admin_port, log=log, launch=start, wire=wire)
