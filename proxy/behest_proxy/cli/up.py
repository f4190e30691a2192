"""`behest up`: the whole of Behest on one machine, supervised, for trying it and for tests."""

import argparse
import asyncio
import contextlib
import http.client
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from behest_proxy.cli import demo as demo_steps
from behest_proxy.cli import preflight
from behest_proxy.cli.folder import DataFolder, write_whole
from behest_proxy.cli.guarded import Guarded, GuardedStartError, Stop
from behest_proxy.cli.loopback import call, no_proxy
from behest_proxy.cli.postgres import Postgres, launch
from behest_proxy.cli.supervisor import ChildEndedError, Supervisor
from behest_proxy.cli.terminal import Terminal, UserError, complain
from behest_proxy.cli.welcome import Welcome, greet

_READY_S = 30.0
_SIMULATOR_S = 20.0
_DRAIN_S = "1.5"  # whoever pressed Ctrl-C is waiting: all of it ends within 5 s
_LINGER_S = 2.5  # when we are killed: the sidecar still needs the others, to drain and to settle
BEHEST: tuple[str, ...] = (sys.executable, "-P", "-m", "behest_proxy.cli.main")
"""How the child processes are started: by this very installation, whatever is on PATH."""
_DEMO_TOKEN = {"user_id": "demo-user", "session_id": "first-session", "ttl": 3600}

_DESCRIPTION = """\
Start everything on this machine, on 127.0.0.1 only: PostgreSQL, a provider simulator (unless --upstream names a
real one), the ledger with a demo project, and the sidecar. Ctrl-C stops all of it; the data stay in the data
folder and the next start finds them there.
"""
_EPILOG = """\
environment:
  DATABASE_URL    use this PostgreSQL (15 or newer) instead of the embedded one
  NO_COLOR        no colours

with OpenAI itself as upstream:
  behest up --upstream https://api.openai.com/v1 --upstream-key-env OPENAI_API_KEY
"""


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port (0 to 65535, 0: any free one)")
    return int(text)


def add_data_folder(parser: argparse.ArgumentParser) -> None:
    """The option that `up` and `down` share."""
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(".behest"),
        metavar="DIR",
        help="where everything is kept (default: .behest)",
    )


def add_parser(subparsers: Any) -> None:
    """Add `up` to the commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "up",
        help="start everything on this machine",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=_port, default=8080, help="port of the API (default: %(default)s)")
    parser.add_argument(
        "--admin-port", type=_port, default=8081, help="port of the health probes (default: %(default)s)"
    )
    parser.add_argument("--tls", action="store_true", help="serve https with a throw-away certificate")
    add_data_folder(parser)
    parser.add_argument("--upstream", metavar="URL", help="an OpenAI-compatible provider, such as .../v1")
    parser.add_argument(
        "--upstream-key-env", metavar="NAME", help="the environment variable that holds the provider's key"
    )
    parser.add_argument("--ready-file", type=Path, metavar="PATH", help="written, as JSON, when everything is ready")


def run(arguments: argparse.Namespace) -> int:
    """Run until Ctrl-C. Exit status 0 after a wanted stop, 1 when a process died, 2 for a mistake."""
    environment = dict(os.environ)
    folder = DataFolder(arguments.data_dir)
    folder.create()
    with folder.locked():
        found = preflight.problems(arguments, environment)
        if found:
            for problem in found:
                complain(problem)
            return 2
        return asyncio.run(Up(arguments, folder, Terminal(), environment).run())


class StepError(Exception):
    """A step to ready failed for a reason that is not the person's mistake."""


@dataclass(frozen=True)
class _Secrets:
    """What is made before the sidecar starts."""

    api_key: str
    signing_key: Path
    certificate: Path | None
    certificate_key: Path | None


class Up:
    """One run of `behest up`: the steps to ready, and the end."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        folder: DataFolder,
        terminal: Terminal,
        environment: Mapping[str, str],
    ) -> None:
        self._arguments = arguments
        self._folder = folder
        self._terminal = terminal
        self._environment = environment
        self._supervisor = Supervisor()
        self._launching: asyncio.Future[Postgres] | None = None
        self._ready = False
        self._started = time.monotonic()
        scheme = "https" if arguments.tls else "http"
        self._address = f"127.0.0.1:{preflight.free_port(arguments.port)}"
        self._admin_address = f"127.0.0.1:{preflight.free_port(arguments.admin_port)}"
        self._base_url = f"{scheme}://{self._address}"
        self._admin_url = f"http://{self._admin_address}"
        self._ready_files = [folder.ready_file]
        if arguments.ready_file is not None:
            self._ready_files.append(arguments.ready_file.absolute())

    async def run(self) -> int:
        """To ready, then until the end; returns the exit status."""
        self._forget_ready()
        try:
            await self._supervisor.run(self._start, stopping=self._stopping)
        except ChildEndedError as error:
            _tell(str(error), error.child)
            return 1
        except (StepError, GuardedStartError) as error:
            _tell(str(error), None)
            return 1
        finally:
            await self._stop_late_postgres()
            self._forget_ready()
        self._terminal.line(f"Stopped. The data are kept in {self._arguments.data_dir}.")
        return 0 if self._ready else 130

    def _stopping(self) -> None:
        if self._supervisor.stop_requested:
            self._terminal.line("\nStopping ...")

    def _forget_ready(self) -> None:
        for path in self._ready_files:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    async def _stop_late_postgres(self) -> None:
        """A start that was interrupted may still give us a server: it must not stay."""
        if self._launching is not None:
            with contextlib.suppress(UserError):  # why it did not start has been told
                postgres = await self._launching
                await asyncio.to_thread(postgres.stop)

    # The steps

    async def _start(self) -> None:
        self._terminal.line(self._terminal.bold(f"Behest {importlib.metadata.version('behest-sidecar')}"))
        simulator = None if self._arguments.upstream else self._start_simulator()
        secrets_task = asyncio.ensure_future(asyncio.to_thread(self._make_secrets))
        dsn = await self._database()
        secrets = await secrets_task
        upstream_url = self._arguments.upstream or await self._simulator_url(simulator)
        key_env = self._arguments.upstream_key_env
        demo = demo_steps.Demo(dsn, upstream_url, key_env, secrets.api_key, *demo_steps.sidecar_login(self._folder))
        for label, act in demo_steps.STEPS:
            await self._ledger_step(label, act(demo))
        if demo.note is not None:
            self._terminal.note(demo.note)
        self._start_keeper(dsn)
        sidecar = await self._start_sidecar(demo.sidecar_dsn or dsn, secrets)
        token = await self._mint(secrets)
        self._write_ready(demo, sidecar)
        self._ready = True
        self._greet(token, secrets)

    def _make_secrets(self) -> _Secrets:
        certificate, key = demo_steps.certificate(self._folder) if self._arguments.tls else (None, None)
        return _Secrets(demo_steps.api_key(self._folder), demo_steps.signing_key(self._folder), certificate, key)

    async def _database(self) -> str:
        given = self._environment.get("DATABASE_URL")
        if given:
            with self._terminal.step(f"PostgreSQL of DATABASE_URL ({urlsplit(given).hostname or 'local'})"):
                return given
        notes: list[str] = []
        with self._terminal.step("PostgreSQL") as step:
            # In a thread, and shielded: a first start takes a second and cannot be cut in the middle.
            work = asyncio.to_thread(
                launch, self._folder, say=notes.append, environment=self._environment, linger_s=_LINGER_S
            )
            self._launching = asyncio.ensure_future(work)
            postgres = await asyncio.shield(self._launching)
            self._supervisor.add(postgres.process)
            step.label = f"PostgreSQL {postgres.version}" + (", a new database" if postgres.made else "")
        for note in notes:
            self._terminal.note(note)
        return postgres.dsn

    async def _ledger_step(self, label: str, work: Awaitable[None]) -> None:
        with self._terminal.step(f"ledger: {label}"):
            try:
                await work
            except UserError:
                raise
            except Exception as error:
                raise StepError(f"the step `{label}` failed: {type(error).__name__}: {error}") from error

    def _start_simulator(self) -> Guarded:
        port_file = self._folder.path / "sim.port"
        port_file.unlink(missing_ok=True)
        return self._supervisor.add(
            Guarded.start(
                "the simulator",
                [*BEHEST, "sim", "--port", "0", "--port-file", port_file],
                log=self._folder.logs / "sim.log",
                stop=Stop(grace_s=0.5, linger_s=_LINGER_S),
            )
        )

    async def _simulator_url(self, simulator: Guarded | None) -> str:
        assert simulator is not None
        port_file = self._folder.path / "sim.port"
        with self._terminal.step("provider simulator") as step:
            deadline = time.monotonic() + _SIMULATOR_S
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError, ValueError):
                    url = f"http://127.0.0.1:{int(port_file.read_text(encoding='ascii'))}/v1"
                    port_file.unlink()
                    step.label = f"provider simulator on {url}"
                    return url
                await asyncio.sleep(0.02)
        raise StepError(f"the simulator was not ready within {_SIMULATOR_S:.0f} s; see {simulator.log}")

    def _start_keeper(self, dsn: str) -> None:
        """What looks after holds whose sidecar does not come back, and after the months ahead."""
        self._supervisor.add(
            Guarded.start(
                "the keeper",
                [*BEHEST, "ledger", "keep"],
                log=self._folder.logs / "keeper.log",
                environment={**self._environment, "BEHEST_DATABASE_URL": dsn},
                stop=Stop(grace_s=0.5),
            )
        )

    async def _start_sidecar(self, dsn: str, secrets: _Secrets) -> Guarded:
        environment = {
            "BEHEST_DRAIN_S": _DRAIN_S,
            "BEHEST_PROVIDER_KEY_ENV": "*",  # who applies Upstreams here has this environment already
            **self._environment,
            "BEHEST_DATABASE_URL": dsn,
            "BEHEST_BIND": self._address,
            "BEHEST_ADMIN_BIND": self._admin_address,
            "BEHEST_SIGNING_KEY_FILE": str(secrets.signing_key),
            "BEHEST_JOURNAL_DIR": str(self._folder.journal),
        }
        if not (environment.get("BEHEST_DATA_KEY_FILE") or environment.get("BEHEST_MASTER_KEY_FILE")):
            environment["BEHEST_MASTER_KEY_FILE"] = str(demo_steps.master_key(self._folder))
        if self._arguments.upstream is None:  # the simulator is on the loopback, where no proxy can reach it
            names = environment.get("no_proxy") or environment.get("NO_PROXY")
            environment["no_proxy"] = environment["NO_PROXY"] = no_proxy(names)
        if secrets.certificate is not None:
            environment["BEHEST_TLS_CERT_FILE"] = str(secrets.certificate)
            environment["BEHEST_TLS_KEY_FILE"] = str(secrets.certificate_key)
        with self._terminal.step(f"sidecar on {self._base_url}"):
            sidecar = self._supervisor.add(
                Guarded.start(
                    "the sidecar",
                    [*BEHEST, "proxy"],
                    log=self._folder.logs / "proxy.log",
                    environment=environment,
                    stop=Stop(grace_s=3.5),  # after its drain; what it cannot settle by then is in its journal
                )
            )
            await self._wait_ready(sidecar)
        return sidecar

    async def _wait_ready(self, sidecar: Guarded) -> None:
        deadline = time.monotonic() + _READY_S
        last = "no answer"
        while time.monotonic() < deadline:
            try:
                status, body = await asyncio.to_thread(call, "GET", self._admin_url + "/readyz", timeout_s=2.0)
                if status == 200:
                    return
                last = body.decode("utf-8", "replace").strip()[:300]
            except (OSError, http.client.HTTPException):
                pass
            await asyncio.sleep(0.02)
        raise StepError(f"the sidecar was not ready within {_READY_S:.0f} s: {last}; see {sidecar.log}")

    async def _mint(self, secrets: _Secrets) -> str:
        with self._terminal.step("first token"):
            url = self._base_url + "/v1/auth/mint"
            headers = {"Authorization": f"Bearer {secrets.api_key}", "Content-Type": "application/json"}
            body = json.dumps(_DEMO_TOKEN).encode()
            try:
                status, answer = await asyncio.to_thread(
                    call, "POST", url, body=body, headers=headers, certificate=secrets.certificate
                )
                if status == 200:
                    return str(json.loads(answer)["access_token"])
                reason = f"{status} {answer.decode('utf-8', 'replace')[:300]}"
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                reason = f"{type(error).__name__}: {error}"
            raise StepError(f"no token could be minted: {reason}; see {self._folder.logs / 'proxy.log'}")

    def _write_ready(self, demo: demo_steps.Demo, sidecar: Guarded) -> None:
        members = {
            "base_url": self._base_url,
            "admin_url": self._admin_url,
            "api_key": demo.api_key,
            "project_id": demo_steps.PROJECT_ID,
            "tenant_id": demo_steps.TENANT,
            "database_url": demo.dsn,
            "upstream_url": demo.upstream_url,
            "pid": os.getpid(),
            "proxy_pid": sidecar.pid,
        }
        for path in self._ready_files:
            try:
                write_whole(path, json.dumps(members, indent=2) + "\n")
            except OSError as error:
                raise StepError(f"the ready file {path} cannot be written: {error.strerror}") from None

    def _greet(self, token: str, secrets: _Secrets) -> None:
        token_file = self._folder.keys / "token"
        write_whole(token_file, token + "\n")
        here = Path.cwd()
        seconds = time.monotonic() - self._started
        welcome = Welcome(self._base_url, self._admin_url, demo_steps.MODEL, token_file, secrets.certificate, seconds)
        greet(self._terminal, welcome, environment=self._environment, here=here)
        if self._arguments.upstream is None and self._environment.get("OPENAI_API_KEY"):
            self._terminal.line()
            self._terminal.line("OPENAI_API_KEY is set, and not used: the simulator answers. For OpenAI itself:")
            self._terminal.line("behest up --upstream https://api.openai.com/v1 --upstream-key-env OPENAI_API_KEY")


def _tell(what: str, child: Guarded | None) -> None:
    """Say on standard error what went wrong, with the end of the log of the process it happened to."""
    lines = [f"behest: {what}"]
    if child is not None:
        lines += [f"the end of {child.log}:", *(f"  {line[:400]}" for line in child.last_lines())]
    with contextlib.suppress(OSError, ValueError):
        print("\n".join(lines), file=sys.stderr, flush=True)
