"""How the API server reaches Services, where nobody else routes to them: its own egress selector, and a small proxy.

The API server is configured as in clusters whose control plane is apart from the nodes: it asks an HTTP CONNECT proxy
on a Unix socket for connections into the cluster. Tests say which port of this machine stands behind a Service.
"""

import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_HEAD_BYTES_MAX = 8192


class Routes:
    """The address of a Service, as `10.96.0.7:443`, to a port on loopback."""

    def __init__(self) -> None:
        self._ports: dict[str, int] = {}

    def add(self, address: str, port: int) -> None:
        """From now on something stands behind this address."""
        self._ports[address] = port

    def port_of(self, target: str) -> int | None:
        """The port behind a target of CONNECT."""
        return self._ports.get(target)


@contextmanager
def proxied(routes: Routes, folder: Path) -> Generator[Path]:
    """Run the proxy, and write the API server's configuration for it."""
    path = folder / "egress.sock"
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen(16)
    threading.Thread(target=_accept, args=(server, routes), daemon=True, name="egress proxy").start()
    configuration = folder / "egress.yaml"
    configuration.write_text(
        f"""
apiVersion: apiserver.k8s.io/v1beta1
kind: EgressSelectorConfiguration
egressSelections:
  - name: cluster
    connection:
      proxyProtocol: HTTPConnect
      transport: {{uds: {{udsName: {path}}}}}
  - {{name: controlplane, connection: {{proxyProtocol: Direct}}}}
  - {{name: etcd, connection: {{proxyProtocol: Direct}}}}
"""
    )
    try:
        yield configuration
    finally:
        server.close()


def _accept(server: socket.socket, routes: Routes) -> None:
    while True:
        try:
            client, _ = server.accept()
        except OSError:
            return  # closed: the run is over
        threading.Thread(target=_connect, args=(client, routes), daemon=True).start()


def _connect(client: socket.socket, routes: Routes) -> None:
    # The API server may have given up at any point.
    with client, suppress(OSError):
        head = b""
        while b"\r\n\r\n" not in head and len(head) < _HEAD_BYTES_MAX:
            data = client.recv(4096)
            if not data:
                return
            head += data
        target = head.split(b" ")[1].decode()
        port = routes.port_of(target)
        try:
            assert port is not None, "nothing stands behind it"
            upstream = socket.create_connection(("127.0.0.1", port), timeout=5)
        except (AssertionError, OSError):
            client.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            return
        upstream.settimeout(None)
        with upstream:
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=_pipe, args=(upstream, client), daemon=True)
            back.start()
            _pipe(client, upstream)
            back.join()


def _pipe(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
