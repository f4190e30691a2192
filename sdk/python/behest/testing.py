"""A gateway that plays a script over real sockets, to test with: what is answered next, and where it breaks.

with running_gateway() as gateway:
gateway.plays(stream(word("Hel", 1), end="cut"), stream(word("lo", 2, finish="stop"), DONE))
client = BehestSync(key=API_KEY, base_url=gateway.base_url)
"""

import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal

import httpx2

End = Literal["ended", "cut", "held"]
"""A clean end of the body; a reset connection; one that stays open until the client goes."""

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
# Reading the machine's certificates takes longer than most tests.
_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
API_KEY = "behest_sk_live_" + "0123456789abcdef" * 2


def async_http() -> httpx2.AsyncClient:
    """A client's network, quickly made."""
    return httpx2.AsyncClient(verify=_NO_CERTIFICATES, trust_env=False)


def sync_http() -> httpx2.Client:
    """A client's network, quickly made."""
    return httpx2.Client(verify=_NO_CERTIFICATES, trust_env=False)


@dataclass
class Scripted:
    """One answer."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    pieces: tuple[bytes, ...] = ()
    """Of its body; they leave with the head and the end in one write: a busy machine puts no pause between them."""
    end: End = "ended"
    wait_s: float = 0.0
    """Before its head."""


@dataclass
class Seen:
    """One request."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


def word(text: str, number: int | None = None, *, generation: str = "g", finish: str | None = None) -> bytes:
    """One chunk, with an id if it has a number."""
    chunk = {"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
    named = b"" if number is None else f"id: {generation}-{number}\n".encode()
    return named + b"data: " + json.dumps(chunk).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def stream(*pieces: bytes, end: End = "ended") -> Scripted:
    """A stream of these pieces."""
    headers = {"content-type": "text/event-stream", "x-trace-id": "t" * 32, "x-request-id": "r1"}
    return Scripted(headers=headers, pieces=pieces, end=end)


def refusal(status: int, code: str, *, headers: Mapping[str, str] | None = None, **details: Any) -> Scripted:
    """An error answer."""
    error = {"code": code, "message": f"{code}!", "type": "x", "param": None, "details": details}
    return Scripted(
        status, {"x-trace-id": "t" * 32, **(headers or {})}, (json.dumps({"error": error}).encode(),), "ended"
    )


def terminal(status: int, code: str, **details: Any) -> bytes:
    """The last event of a stream that failed."""
    error = {"code": code, "message": f"{code}!", "type": "x", "param": None, "details": details, "status": status}
    return b"data: " + json.dumps({"error": error, "choices": []}).encode() + b"\n\n" + DONE


class Gateway:
    """The scripted gateway: mints tokens by itself, and plays its script for everything else."""

    def __init__(self) -> None:
        self.base_url = ""
        self.script: list[Scripted] = []
        self.seen: list[Seen] = []
        """All but the mints."""
        self.mints: list[Seen] = []
        self.mint_delay_s = 0.0
        self.mint_ttl_s = 3600
        self.connections = 0
        self.gone = threading.Event()
        """The client went away from an answer that was held open."""
        self.lock = threading.Lock()

    def plays(self, *answers: Scripted) -> None:
        """What is answered from now on."""
        self.script.extend(answers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    gateway: Gateway

    def setup(self) -> None:
        super().setup()
        self.gateway.connections += 1

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        text = self.rfile.read(length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, self.path, headers, json.loads(text) if text else None)
        gateway = self.gateway
        with gateway.lock:
            if self.path == "/v1/auth/mint" and not (gateway.script and gateway.script[0].headers.get("mint")):
                gateway.mints.append(seen)
                told = {"jwt": f"token-{len(gateway.mints)}", "ttl": gateway.mint_ttl_s, **seen.body}
                answer = Scripted(pieces=(json.dumps({**told, "ttl": gateway.mint_ttl_s}).encode(),))
            else:
                gateway.seen.append(seen)
                answer = gateway.script.pop(0)
        if gateway.mint_delay_s and self.path == "/v1/auth/mint":
            threading.Event().wait(gateway.mint_delay_s)
        self._send(answer)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - the names that the base class looks for

    def _send(self, answer: Scripted) -> None:
        if answer.wait_s:
            threading.Event().wait(answer.wait_s)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status == 204:
            self.end_headers()
            return
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for piece in answer.pieces:
            if piece:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        if answer.end == "ended":
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
        if answer.end == "held":
            with suppress(OSError):
                assert self.connection.recv(1) == b""
            self.gateway.gone.set()
            self.close_connection = True
        elif answer.end == "cut":
            # What was written shall still arrive: half of it closes first, then the rest.
            self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False
    request_queue_size = 1024
    """The usual 5 make a crowd wait: who finds no room in the queue is dropped, and knocks again in a second."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address


@contextmanager
def running_gateway() -> Generator[Gateway]:
    """A scripted gateway on a port of its own."""
    gateway = Gateway()
    handler = type("Handler", (_Handler,), {"gateway": gateway})
    with _Server(("127.0.0.1", 0), handler) as server:
        gateway.base_url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield gateway
        finally:
            server.shutdown()
            thread.join(5)
