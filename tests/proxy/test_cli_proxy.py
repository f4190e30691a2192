"""`behest proxy` as a process: what it says when it cannot begin."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from behest_proxy.identity.keys import SigningKey


@pytest.mark.parametrize("variable", ["BEHEST_BIND", "BEHEST_ADMIN_BIND"])
def test_a_port_that_is_taken_is_told_in_one_line(database: str, tmp_path: Path, variable: str) -> None:
    key_file = tmp_path / "key.pem"
    key_file.write_bytes(SigningKey.generate().private_pem())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment = {
            "BEHEST_DATABASE_URL": database,
            "BEHEST_SIGNING_KEY_FILE": str(key_file),
            "BEHEST_BIND": "127.0.0.1:0",
            "BEHEST_ADMIN_BIND": "127.0.0.1:0",
            variable: f"127.0.0.1:{taken.getsockname()[1]}",
        }
        done = subprocess.run(
            [sys.executable, "-I", "-m", "behest_proxy.cli.main", "proxy"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert "behest: the sidecar cannot listen: " in done.stderr
    assert "; look at BEHEST_BIND and BEHEST_ADMIN_BIND" in done.stderr
    assert "Traceback" not in done.stderr
