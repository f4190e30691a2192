"""A network that breaks: passes bytes on to a server, and closes the connection after so many bytes of its answer."""

import selectors
import socket
import socketserver
import struct
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from threading import Lock, Thread
from typing import Any
from urllib.parse import urlsplit

_RESET_AT_ONCE = struct.pack("ii", 1, 0)


class Cutter:
    """Where it listens, and how often it has cut. Connections after the last cut are left alone."""

    def __init__(self, target: tuple[str, int], cuts: Iterable[int], *, is_noticed: bool) -> None:
        self.target = target
        self.is_noticed = is_noticed
        """By the server. Otherwise it says all that it has to say, to nobody."""
        self.base_url = ""
        self.done = 0
        self._cuts = list(cuts)
        self._lock = Lock()

    def next_cut(self) -> int | None:
        """After how many bytes of answers the next connection breaks."""
        with self._lock:
            return self._cuts.pop(0) if self._cuts else None


class _Handler(socketserver.BaseRequestHandler):
    cutter: Cutter

    def handle(self) -> None:
        left = self.cutter.next_cut()
        client: socket.socket = self.request
        with (
            socket.create_connection(self.cutter.target) as server,
            selectors.DefaultSelector() as both,
            suppress(OSError),
        ):
            both.register(client, selectors.EVENT_READ, server)
            both.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in both.select():
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    if not data:
                        return
                    said = data
                    if key.fileobj is server and left is not None:
                        data, left = data[:left], left - len(data)
                    key.data.sendall(data)
                    if left is not None and left <= 0:
                        self._break(client, server, said)
                        return

    def _break(self, client: socket.socket, server: socket.socket, said: bytes) -> None:
        """`said`: by the server, last; it may have been the end already."""
        self.cutter.done += 1
        while not self.cutter.is_noticed and not said.endswith(b"0\r\n\r\n"):
            more = server.recv(65536)
            if not more:
                break
            said = said[-5:] + more
        # What was passed on still arrives; the server sees a reset.
        client.shutdown(socket.SHUT_WR)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_ONCE)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # the usual 5 are fewer than a browser knocks with, and who finds no room waits a second

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address


@contextmanager
def cutting(base_url: str, cuts: Iterable[int], *, is_noticed: bool = True) -> Generator[Cutter]:
    """A broken network before the server of this URL."""
    parts = urlsplit(base_url)
    assert parts.hostname is not None
    assert parts.port is not None
    cutter = Cutter((parts.hostname, parts.port), cuts, is_noticed=is_noticed)
    handler = type("Handler", (_Handler,), {"cutter": cutter})
    with _Server(("127.0.0.1", 0), handler) as server:
        cutter.base_url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield cutter
        finally:
            server.shutdown()
            thread.join(5)
