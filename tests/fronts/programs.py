"""nginx and Envoy before the sidecar, with the configurations that docs/behind-a-proxy.md shows."""

import importlib.util
import re
import shutil
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from behest_proxy.cli.preflight import free_port
from proxy.certificates import self_signed
from stack import process, wait_until


@dataclass(frozen=True)
class Front:
    """Something before the sidecar."""

    name: str
    url: str
    certificate: str | None
    """PEM; None: without TLS."""


def shown(page: Path, language: str) -> str:
    """The one configuration in this language that the page shows."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    return str(found)


def _instead(text: str, replaced: dict[str, str]) -> str:
    for old, new in replaced.items():
        assert old in text, f"the page shows no {old}"
        text = text.replace(old, new)
    return text


def _listens(port: int) -> Callable[[], bool]:
    def probe() -> bool:
        with socket.socket() as probing:
            return probing.connect_ex(("127.0.0.1", port)) == 0

    return probe


@contextmanager
def nginx(page: Path, folder: Path, sidecar_url: str) -> Generator[Front]:
    """nginx with the page's `upstream` and `server`, in one process of ours. Skips where there is none."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt install nginx-light)")
    port = free_port(0)
    certificate, key = (part.decode() for part in self_signed())
    (folder / "certificate.pem").write_text(certificate)
    (folder / "key.pem").write_text(key)
    text = _instead(
        shown(page, "nginx"),
        {
            "127.0.0.1:8080": sidecar_url.removeprefix("http://"),
            "listen 443 ": f"listen 127.0.0.1:{port} ",
            "/etc/nginx/": f"{folder}/",
        },
    )
    places = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\nerror_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{places}{text}}}\n"
    )
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    with process(command, environment={}, log=folder / "nginx.log") as child:
        wait_until(lambda: child.poll() is not None or _listens(port)(), what="nginx's start")
        assert child.poll() is None, (folder / "nginx.log").read_text()
        yield Front("nginx", f"https://127.0.0.1:{port}", certificate)


@contextmanager
def envoy(page: Path, folder: Path, sidecar_url: str) -> Generator[Front]:
    """Envoy with the page's configuration. Skips where the extra `bench` is not installed."""
    spec = importlib.util.find_spec("envoy")
    if spec is None or spec.origin is None:
        pytest.skip("Envoy is not installed (make .venv/.installed-bench)")
    program = Path(spec.origin).parent / "_bin" / "envoy"  # the console script would be a Python process before it
    port = free_port(0)
    text = _instead(
        shown(page, "yaml"),
        {
            "port_value: 8080": f"port_value: {sidecar_url.rpartition(':')[2]}",
            "port_value: 8000": f"port_value: {port}",
        },
    )
    (folder / "envoy.yaml").write_text(text)
    command = [str(program), "-c", str(folder / "envoy.yaml"), "--concurrency", "1", "--disable-hot-restart"]
    with process([*command, "-l", "error"], environment={}, log=folder / "envoy.log") as child:
        wait_until(lambda: child.poll() is not None or _listens(port)(), what="Envoy's start")
        assert child.poll() is None, (folder / "envoy.log").read_text()
        yield Front("Envoy", f"http://127.0.0.1:{port}", None)
