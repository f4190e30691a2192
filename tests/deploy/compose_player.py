"""Plays Compose: starts what compose.yaml says as processes, from nothing but what it says.

It is no container engine. An image is a name for a program here; read-only roots, users, capabilities, `restart` and
networks are not played (tests/images runs a real container). All services share the loopback of this machine: their
names become 127.0.0.1, their fixed ports free ones, mounted paths folders of this run, wherever they are named.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import yaml

from behest_proxy.cli.binaries import embedded_folder
from behest_proxy.cli.preflight import free_port
from conftest import own_server, set_password

BEHEST = [sys.executable, "-I", "-m", "behest_proxy.cli.main"]
PROGRAMS = (embedded_folder() or Path("/usr")) / "bin"
"""Of PostgreSQL: psql and pg_isready."""
BUSY = 3
"""Machines of tests do other things too: so many times the file's patience."""
_UNITS_S = {"s": 1.0, "m": 60.0}


class ComposeError(AssertionError):
    """A service did not become what others wait for; the message is its log."""


class Compose:
    """A project of Compose, with one profile."""

    def __init__(self, file: Path, folder: Path, profile: str) -> None:
        self._source, self._folder = file.parent, folder
        text = re.sub(r"\$\{[A-Z_]+:?-([^}]*)\}", r"\1", file.read_text())
        document: dict[str, Any] = yaml.safe_load(text)
        self.services: dict[str, dict[str, Any]] = {
            name: service
            for name, service in document["services"].items()
            if profile in service.get("profiles", [profile])
        }
        self._secrets: dict[str, Any] = document["secrets"]
        self._ports = {port: free_port(0) for port in sorted(self._fixed_ports(text))}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._running = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._running.close()

    def up(self) -> None:
        """`up`: each service when what it depends on is as it waits for. Raises `ComposeError`."""
        waiting = dict(self.services)
        while waiting:
            ready = [name for name, service in waiting.items() if not set(service.get("depends_on", {})) & set(waiting)]
            assert ready, f"these wait for each other: {sorted(waiting)}"
            for name in ready:
                service = waiting.pop(name)
                for other, condition in service.get("depends_on", {}).items():
                    self._await(other, condition["condition"])
                self._start(name, service.get("command", []))

    def down(self) -> None:
        """`down`: SIGTERM to all, the last ones first. Raises `ComposeError` for one that does not end in its time."""
        for name in reversed(self._processes):
            process = self._processes[name]
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_seconds(self.services[name].get("stop_grace_period", "10s")) * BUSY)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    raise ComposeError(f"{name} does not end: {self.log(name)}") from None

    def run(self, name: str, *command: str, stdin: str = "") -> str:
        """`run --rm`: another command in a service's place; what it prints. Raises `ComposeError`."""
        done = subprocess.run(
            [*BEHEST, *command],
            env=self._environment(self.services[name]),
            input=stdin,
            text=True,
            capture_output=True,
            timeout=60,
        )
        if done.returncode != 0:
            raise ComposeError(done.stderr)
        return done.stdout

    def await_health(self, name: str) -> None:
        """Wait until a service's own check says that it is well. Raises `ComposeError`."""
        self._await(name, "service_healthy")

    def returncode(self, name: str) -> int | None:
        """How a service ended; None: it runs."""
        return self._processes[name].poll()

    def log(self, name: str) -> str:
        """What a service wrote."""
        return (self._folder / f"{name}.log").read_text()

    def url(self, port: int) -> str:
        """Where a container's port is on this machine."""
        return f"http://127.0.0.1:{self._ports[port]}"

    def _fixed_ports(self, text: str) -> set[int]:
        addresses = re.findall(r"(?:postgres|simulator|127\.0\.0\.1|0\.0\.0\.0):(\d{4,5})\b", text)
        arguments = re.findall(r"--port, \"(\d+)\"", text)
        return {5432, *map(int, addresses), *map(int, arguments)}

    def _start(self, name: str, command: list[str]) -> None:
        service = self.services[name]
        if "postgres" in service["image"]:
            self._start_database(service)
            return
        environment = self._environment(service)
        arguments = [self._local(item, service) for item in command]
        with (self._folder / f"{name}.log").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                [*BEHEST, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._folder,
            )

    def _start_database(self, service: dict[str, Any]) -> None:
        """What the official image does with an empty volume: its user and database, then the mounted scripts."""
        environment = self._environment(service)
        password = Path(environment["POSTGRES_PASSWORD_FILE"]).read_text().strip()
        server = self._running.enter_context(own_server(None))
        dsn = set_password(server, environment["POSTGRES_USER"], environment["POSTGRES_DB"], password)
        port = self._ports[5432] = int(urlsplit(dsn).port or 0)
        connection = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(port),
            "PGPASSWORD": password,
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        }
        for mount in service["volumes"]:
            source, _, target = mount.removesuffix(":ro").partition(":")
            if target.startswith("/docker-entrypoint-initdb.d/"):
                script = self._local((self._source / source).read_text(), service)
                subprocess.run(["sh", "-c", script], env={**environment, **connection}, check=True, timeout=60)

    def _await(self, name: str, condition: str) -> None:
        if condition == "service_completed_successfully":
            if self._processes[name].wait(120) != 0:
                raise ComposeError(f"{name}: {self.log(name)}")
            return
        check = self.services[name]["healthcheck"]
        assert check["test"][0] == "CMD"
        command = [self._local(item, self.services[name]) for item in check["test"][1:]]
        command[0] = {"pg_isready": str(PROGRAMS / "pg_isready")}.get(command[0], sys.executable)
        if "pg_isready" in command[0]:
            command += ["--port", str(self._ports[5432])]
        said, interval_s = "", _seconds(check["interval"])
        deadline_s = time.monotonic() + check["retries"] * interval_s * BUSY
        while time.monotonic() < deadline_s:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                return
            if name in self._processes and self._processes[name].poll() is not None:
                raise ComposeError(f"{name} has ended: {self.log(name)}")
            said = done.stdout + done.stderr
            time.sleep(interval_s / 10)
        raise ComposeError(f"{name} is not well: {said}")

    def _environment(self, service: dict[str, Any]) -> dict[str, str]:
        given = service.get("environment", {})
        return {"PATH": os.environ["PATH"], **{name: self._local(str(value), service) for name, value in given.items()}}

    def _local(self, text: str, service: dict[str, Any]) -> str:
        """A text of the container as it is on this machine."""
        for secret in service.get("secrets", []):
            path = self._mounted(self._source / self._secrets[secret]["file"])
            text = text.replace(f"/run/secrets/{secret}", str(path))
        for mount in service.get("volumes", []):
            source, _, target = mount.removesuffix(":ro").partition(":")
            if source.startswith("."):
                text = text.replace(target, str(self._mounted(self._source / source)))
            else:
                folder = self._folder / "volumes" / source
                folder.mkdir(parents=True, exist_ok=True)
                text = text.replace(target, str(folder))
        return self._addressed(text)

    def _mounted(self, source: Path) -> Path:
        """A file as the container sees it: hosts and ports in it are this machine's."""
        path = self._folder / "mounted" / source.name
        path.parent.mkdir(exist_ok=True)
        path.write_text(self._addressed(source.read_text()))
        return path

    def _addressed(self, text: str) -> str:
        for port, mine in self._ports.items():
            text = re.sub(rf"\b(postgres|simulator|127\.0\.0\.1|0\.0\.0\.0):{port}\b", f"127.0.0.1:{mine}", text)
        if text.isdigit() and int(text) in self._ports:
            return str(self._ports[int(text)])
        return "127.0.0.1" if text == "0.0.0.0" else text


def _seconds(text: str) -> float:
    return float(text[:-1]) * _UNITS_S[text[-1]]


@contextmanager
def played(file: Path, folder: Path, profile: str) -> Generator[Compose]:
    """The project, up and well until the block ends."""
    with Compose(file, folder, profile) as project:
        project.up()
        yield project
