"""A PgBouncer in transaction mode in front of the tests' PostgreSQL."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from behest_proxy.cli.preflight import free_port
from stack import wait_until

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
WHY_NOT = "PgBouncer is not installed (Debian: apt install pgbouncer)"

_CONFIGURATION = """\
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users
pool_mode = {mode}
default_pool_size = {size}
max_client_conn = 200
server_login_retry = 1
query_wait_timeout = 20
ignore_startup_parameters = {ignored}
"""


@contextmanager
def bouncer(
    dsn: str, *, size: int = 3, mode: str = "transaction", ignored: str = "extra_float_digits"
) -> Generator[str]:
    """The DSN that leads through a PgBouncer with so many sessions of the server; it is gone when the block ends."""
    assert PROGRAM is not None
    parts = urlsplit(dsn)
    listen_port = free_port(0)
    # It does not run as root: then somebody else has to read its files.
    account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="behest-bouncer-") as name:
        folder = Path(name)
        options = {"size": size, "mode": mode, "ignored": ignored, "listen_port": listen_port, "folder": folder}
        text = _CONFIGURATION.format(host=parts.hostname, port=parts.port, **options)
        (folder / "bouncer.ini").write_text(text)
        (folder / "users").write_text(f'"{parts.username}" "{unquote(parts.password or "")}"\n')
        if account is not None:
            for path in (folder, *folder.iterdir()):
                os.chown(path, account.pw_uid, account.pw_gid)
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [PROGRAM, str(folder / "bouncer.ini")],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                user=None if account is None else account.pw_uid,
                group=None if account is None else account.pw_gid,
            )
        try:

            def listens() -> bool:
                assert process.poll() is None, (folder / "log").read_text()
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", listen_port)) == 0

            wait_until(listens, what="PgBouncer's start")
            login = parts.netloc.rpartition("@")[0]
            yield urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{listen_port}"))
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
