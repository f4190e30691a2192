"""One real PostgreSQL for the whole run, one fresh database with the ledger's schema for each test that asks."""

import asyncio
import gc
import os
import shutil
import ssl
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest
from hypothesis import settings

from behest_ledger.store.migrate import migrate
from behest_ledger.store.pool import connect
from behest_proxy.cli.binaries import Binaries, side_by_side
from behest_proxy.cli.folder import DataFolder
from behest_proxy.cli.postgres import launch
from stack import Stack, running_stack

# An example's time says how busy the machine is, and nothing of the code.
settings.register_profile("behest", deadline=None)
settings.load_profile("behest")

_TEMPLATE = "behest_template"
MEMORY_BYTES_MIN = 4 * 1024**3
_numbers = count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Everything can be run on another version of PostgreSQL than the embedded one."""
    version = os.environ.get("BEHEST_TEST_POSTGRES")
    parser.addoption(
        "--postgres",
        type=int,
        default=int(version) if version else None,
        metavar="MAJOR",
        help="run on an installed PostgreSQL of this version, such as 15 (or BEHEST_TEST_POSTGRES)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Clients that trust the usual authorities share one context.

    Each client of httpx, and so each `httpx.get` and each `openai.OpenAI`, reads 150 certificates at first:
    25 ms of a processor each time, for requests that take two.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr("httpx._transports.default.create_ssl_context", _once(httpx.create_ssl_context))
    config.add_cleanup(patch.undo)


def _once(create: Callable[..., ssl.SSLContext]) -> Callable[..., ssl.SSLContext]:
    """What `create` makes of its defaults is made once; whoever names authorities of his own gets what he asks for."""
    usual = cache(create)

    def context(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
        return usual() if verify is True and cert is None and trust_env else create(verify, cert, trust_env)

    return context


def pytest_collection_finish() -> None:
    """What was collected lives to the end: a garbage collector that looks at it each time takes a minute of the run."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Server:
    """A PostgreSQL server on which databases may be made."""

    dsn: str

    def of(self, database: str) -> str:
        """The DSN of a database of this server."""
        return urlunsplit(urlsplit(self.dsn)._replace(path="/" + database))


async def execute(dsn: str, *statements: str) -> None:
    """Run statements on a database."""
    connection: Any = await connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The server: `BEHEST_TEST_DATABASE_URL` (PostgreSQL 15 or newer, a superuser), or one of our own."""
    given = os.environ.get("BEHEST_TEST_DATABASE_URL")
    if given:
        yield Server(given)
        return
    major: int | None = request.config.getoption("--postgres")
    binaries = side_by_side(major) if major is not None else None
    if major is not None and binaries is None:
        pytest.exit(f"PostgreSQL {major} is not installed (Debian: apt install postgresql-{major})", returncode=4)
    with own_server(binaries) as server:
        yield server


@contextmanager
def own_server(binaries: Binaries | None) -> Generator[Server]:
    """A server for as long as the block runs; of the embedded programs where none are named."""
    # Not pytest's own folder: that is closed to others, and root's PostgreSQL runs as somebody else.
    with tempfile.TemporaryDirectory(prefix="behest-test-", dir=_memory()) as name:
        Path(name).chmod(0o711)
        folder = DataFolder(Path(name) / "data")
        folder.create()
        with launch(folder, environment={"PATH": os.environ.get("PATH", "")}, binaries=binaries) as server:
            yield Server(server.dsn)


def _memory() -> Path | None:
    """A file system in memory, where there is a large one: hundreds of databases made and dropped keep a disk busy."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > MEMORY_BYTES_MIN else None


def set_password(server: Server, user: str, database: str, password: str) -> str:
    """Make of a server of one's own what PostgreSQL's official image makes of these: the DSN."""
    found = urlsplit(server.dsn)
    assert (found.username, found.path) == (user, "/" + database), (
        "embedded servers and the deployments name them alike"
    )
    asyncio.run(execute(server.dsn, f"ALTER ROLE {user} PASSWORD '{password}'"))
    return urlunsplit(found._replace(netloc=f"{user}:{password}@{found.hostname}:{found.port}"))


@pytest.fixture(scope="session")
def template(postgres: Server) -> Server:
    """The server with a migrated database to copy: copying takes a twentieth of the time of migrating."""

    async def make() -> None:
        await execute(postgres.dsn, f"DROP DATABASE IF EXISTS {_TEMPLATE} WITH (FORCE)", f"CREATE DATABASE {_TEMPLATE}")
        await migrate(postgres.of(_TEMPLATE))

    asyncio.run(make())
    return postgres


@contextmanager
def own_database(template: Server, name: str) -> Generator[str]:
    """The DSN of a database for a whole file of tests, with the ledger's schema and nothing in it."""
    name = f"behest_{name}_{os.getpid()}"
    asyncio.run(execute(template.dsn, f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}"))
    yield template.of(name)
    asyncio.run(execute(template.dsn, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def database(template: Server) -> Iterator[str]:
    """The DSN of a database of one's own, with the ledger's schema and nothing in it."""
    name = f"behest_test_{os.getpid()}_{next(_numbers)}"
    asyncio.run(execute(template.dsn, f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}"))
    yield template.of(name)
    asyncio.run(execute(template.dsn, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def stack(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A sidecar, a simulator and a ledger, shared by the whole run. The books must be clean at its end."""
    name = f"behest_stack_{os.getpid()}"
    asyncio.run(execute(template.dsn, f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}"))
    streams = Path(__file__).parent / "proxy" / "streams"
    with running_stack(
        template.of(name), tmp_path_factory.mktemp("stack"), recordings=streams, BEHEST_HOST_SUFFIX="behest.test"
    ) as running:
        yield running
        assert running.verify().findings == []
    asyncio.run(execute(template.dsn, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this repository."""
    return Path(__file__).resolve().parents[1]
