"""The backend of a page: it serves what was built, and hands out tokens as an application's backend does."""

import json
import mimetypes
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from stack import Project


@dataclass
class Site:
    """Where it is, and what it gives to whom asks for a token."""

    origin: str
    folder: Path
    token: Callable[[], dict[str, Any]] = field(default=dict)

    def speak_for(
        self, project: Project, *, base_url: str | None = None, simulated: bool = True, user: str | None = None
    ) -> None:
        """From now on tokens are of this project, and of this user, or each of a user of its own. So are sessions."""

        def give() -> dict[str, Any]:
            name = user or f"user-{time.monotonic_ns()}"
            return {
                "token": project.mint(user=name, session=name),
                "sessionId": name,
                "expiresAt": int(time.time() * 1000) + 600_000,
                "baseURL": base_url or project.stack.base_url,
                "simulated": simulated,
            }

        self.token = give


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        """A file; another path is the page itself."""
        path = self.path.partition("?")[0].lstrip("/") or "index.html"
        file = (self.site.folder / path).resolve()
        if not file.is_relative_to(self.site.folder) or not file.is_file():
            self.send_error(404)
            return
        self._answer(file.read_bytes(), mimetypes.guess_type(file.name)[0] or "application/octet-stream")

    def do_POST(self) -> None:
        """A token."""
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(json.dumps(self.site.token()).encode(), "application/json")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing."""


@contextmanager
def serving(folder: Path) -> Generator[Site]:
    """A site of this folder, on a port of its own, while the block runs."""
    handler: Any = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        site = Site(f"http://localhost:{server.server_address[1]}", folder.resolve())
        handler.site = site
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join(5)
