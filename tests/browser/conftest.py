"""A browser for each file of this folder, a gateway for all: while a browser runs, asyncio is for other threads."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from browser.beside import StackBeside, beside
from browser.chromium import BrowserMissing, running
from browser.site import Site, serving
from conftest import Server, execute
from proxy.certificates import self_signed
from stack import Project, running_stack
from typescript.packages import install, run

expect.set_options(timeout=20_000)
"""Its own five seconds are short on a machine that is busy."""


@pytest.fixture(scope="module")
def browser(template: Server) -> Iterator[Browser]:
    """Chromium. Without one nothing here can be tested, and that is said at once. The server is started before it: see
    `browser.beside`."""
    try:
        with running() as started:
            yield started
    except BrowserMissing as error:
        pytest.exit(str(error), returncode=4)


@pytest.fixture(scope="session")
def gateway(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackBeside]:
    """A sidecar, a simulator and a ledger for all files. The books must be clean at the end."""
    name = f"behest_gateway_{os.getpid()}"
    beside(asyncio.run, execute(template.dsn, f"CREATE DATABASE {name} TEMPLATE behest_template"))
    starting = running_stack(template.of(name), tmp_path_factory.mktemp("gateway"))
    stack = StackBeside.of(beside(starting.__enter__))
    try:
        yield stack
        assert stack.verify().findings == []
    finally:
        stack.close()
        beside(starting.__exit__, None, None, None)
    beside(asyncio.run, execute(template.dsn, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def secure_url(gateway: StackBeside, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same gateway by another sidecar, with TLS and so with HTTP/2."""
    folder = tmp_path_factory.mktemp("tls")
    files = [folder / "certificate.pem", folder / "key.pem"]
    for file, content in zip(files, self_signed(), strict=True):
        file.write_bytes(content)
        file.chmod(0o600)
    with gateway.another_sidecar(BEHEST_TLS_CERT_FILE=str(files[0]), BEHEST_TLS_KEY_FILE=str(files[1])) as url:
        yield url.replace("http://", "https://")


def _built(folder: Path, *commands: list[str]) -> Path:
    try:
        install(folder)
    except pytest.skip.Exception as lacking:  # as a missing browser: nothing here could be tested
        pytest.exit(f"these tests need the packages of {folder.name}: {lacking}", returncode=4)
    for command in commands:
        run(command, folder)
    return folder


@pytest.fixture(scope="session")
def sdk(repository: Path) -> Path:
    """The folder of the client for TypeScript, built."""
    return _built(repository / "sdk" / "typescript", ["npm", "run", "build"])


@pytest.fixture(scope="session")
def guide_site(sdk: Path) -> Iterator[Site]:
    """The page that runs the guide's snippets: `sdk/typescript/test/browser`."""
    run(["node", "test/live/compose.mjs", "openai"], sdk)
    run(["npx", "vite", "build", "--config", "test/browser/vite.config.ts"], sdk)
    with serving(sdk / "test" / "browser" / "dist") as site:
        yield site


@pytest.fixture(scope="session")
def chat_site(sdk: Path, repository: Path) -> Iterator[Site]:
    """The chat of `examples/chat`, built for production."""
    folder = _built(repository / "examples" / "chat", ["npm", "run", "build"])
    with serving(folder / "dist") as site:
        yield site


@pytest.fixture(scope="session")
def project(gateway: StackBeside, guide_site: Site, chat_site: Site) -> Project:
    """A project that lets both sites in."""
    return gateway.project(project=f'  allowedOrigins: ["{guide_site.origin}", "{chat_site.origin}"]')
