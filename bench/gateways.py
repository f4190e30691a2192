"""The gateways of others that can be installed here, each in an environment of its own, and those that cannot."""

import contextlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from bench.peers import Peer, PeerError, behest, envoy, envoy_version, free_port, listens, running, wait_for

_PLACE = Path(sys.prefix) / "peers"
"""Inside .venv: what is installed for the bench is removed with it."""
LITELLM, FERROGW = "1.106.2", "1.5.10"
_KEY = "fgw_bench_0123456789abcdef0123456789abcdef"
_INSTALL_S = 900

ABSENT = {
    "Bifrost": (
        "its Go module (github.com/maximhq/bifrost/transports) is not served by the module proxy where this was run,"
        " and its packages on npm only download a binary from elsewhere"
    ),
    "Portkey gateway 1.15.2": "from npm; on Node 20 it answers every request with 500 (`TypeError: immutable`)",
    "Envoy AI Gateway, Kong, agentgateway, TensorZero": "not a program that PyPI, npm or Go's module proxy there gave",
}
"""Who is missing, and why."""


@dataclass(frozen=True)
class Gateway:
    """One that takes part."""

    name: str
    version: str
    does: str
    """What it did with each request while it was measured."""
    start: Callable[[Path, str, int], AbstractContextManager[Peer]]
    """With a folder, the provider's base URL and the number of streams that need a token each."""
    chunk_cost_us: int
    """About what a chunk costs it: those with high costs get shorter answers."""


def gateways(say: Callable[[str], None], only: list[str] | None) -> tuple[list[Gateway], list[tuple[str, str]]]:
    """Those that take part, and those that do not with the reason. Installs what is missing; Behest comes first."""
    found = [
        Gateway(
            "behest",
            "this checkout",
            "signed tokens; a user and a budget a stream; each chunk parsed, counted, paid; a ledger in PostgreSQL",
            _behest,
            40,
        ),
        Gateway("envoy", envoy_version(), "nothing: a pass-through with one worker, as the floor", _envoy, 40),
    ]
    missing = list(ABSENT.items())
    further = [
        Gateway("ferrogw", FERROGW, "one static API key; no metering, no budgets, no database", _ferrogw, 120),
        Gateway("litellm", LITELLM, "nothing: no keys, no budgets, no database, no callbacks", _litellm, 1000),
    ]
    for gateway in further:
        if only and gateway.name not in only:
            continue
        try:
            _install(gateway.name, say)
        except PeerError as error:
            missing.append((gateway.name, str(error)))
        else:
            found.append(gateway)
    return [gateway for gateway in found if not only or gateway.name in only], missing


_REQUIREMENTS = {"ferrogw": f"ferrogw=={FERROGW}", "litellm": f"litellm[proxy]=={LITELLM}"}


def _install(name: str, say: Callable[[str], None]) -> None:
    """Raises `PeerError` with pip's own words."""
    place, requirement = _PLACE / name, _REQUIREMENTS[name]
    stamp = place / ".installed"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == requirement:
        return
    say(f"installing {requirement} into {place} (once)")
    venv.create(place, with_pip=True, clear=True)
    command = [
        str(place / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        requirement,
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_S)
    except subprocess.CalledProcessError as error:
        raise PeerError(f"pip could not install {requirement}: {error.stderr.strip()[-300:]}") from None
    except subprocess.TimeoutExpired:
        raise PeerError(f"pip did not install {requirement} within {_INSTALL_S} s") from None
    stamp.write_text(requirement, encoding="utf-8")


def _behest(folder: Path, upstream_url: str, streams: int) -> AbstractContextManager[Peer]:
    return behest(folder, upstream_url, tokens=streams)


def _envoy(folder: Path, upstream_url: str, streams: int) -> AbstractContextManager[Peer]:
    return envoy(folder, upstream_url, tokens=streams)


@contextlib.contextmanager
def _ferrogw(folder: Path, upstream_url: str, streams: int) -> Generator[Peer]:
    """With one processor, as the others: its threads would take both otherwise."""
    port = free_port()
    configuration = folder / "ferrogw.yaml"
    configuration.write_text("strategy:\n  mode: single\ntargets:\n  - virtual_key: openai\n", encoding="utf-8")
    environment = {
        "PORT": str(port),
        "OPENAI_BASE_URL": upstream_url.removesuffix("/v1"),
        "OPENAI_API_KEY": "none",
        "MASTER_KEY": _KEY,
        "GATEWAY_CONFIG": str(configuration),
        "LOG_LEVEL": "error",
        "RATE_LIMIT_RPS": "1000000",  # a limit for each address, otherwise
        "RATE_LIMIT_BURST": "1000000",
        "GOMAXPROCS": "1",
    }
    log = folder / "ferrogw.log"
    with running([str(_PLACE / "ferrogw" / "bin" / "ferrogw"), "serve"], log, environment=environment) as process:
        wait_for(process, log, lambda: listens(port))
        yield Peer("ferrogw", f"http://127.0.0.1:{port}", process.pid, [_KEY] * streams, wires=("h1",))


@contextlib.contextmanager
def _litellm(folder: Path, upstream_url: str, streams: int) -> Generator[Peer]:
    """One worker, which is one process."""
    port = free_port()
    parameters = {"model": "openai/*", "api_base": upstream_url, "api_key": "none"}
    configuration = folder / "litellm.json"  # JSON is YAML
    models = [{"model_name": "*", "litellm_params": parameters}]
    configuration.write_text(json.dumps({"model_list": models}), encoding="utf-8")
    environment = {
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    for name in ("DATABASE_URL", "LITELLM_MASTER_KEY"):
        if os.environ.get(name):
            environment[name] = ""
    program = str(_PLACE / "litellm" / "bin" / "litellm")
    command = [program, "--config", str(configuration), "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "litellm.log"
    with running(command, log, environment=environment) as process:
        wait_for(process, log, lambda: _lives(port))
        yield Peer("litellm", f"http://127.0.0.1:{port}", process.pid, ["none"] * streams, wires=("h1",))


def _lives(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
