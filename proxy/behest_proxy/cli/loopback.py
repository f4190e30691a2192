"""Calls to our own processes on 127.0.0.1: never through the proxies that the environment names."""

import http.client
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

# http.client, unlike urllib.request and most clients, does not read HTTP_PROXY and its relatives.


def call(
    method: str,
    url: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    certificate: Path | None = None,
    timeout_s: float = 5.0,
) -> tuple[int, bytes]:
    """One request; returns status and body (up to 1 MB). `certificate`: the only one trusted, for https.

    Raises `OSError` or `http.client.HTTPException` when there is no answer.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=certificate)
        connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        path = parts.path or "/"
        connection.request(method, path, body=body, headers=dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read(1_000_000)
    finally:
        connection.close()


def no_proxy(value: str | None) -> str:
    """NO_PROXY with the loopback names added."""
    names = [name.strip() for name in (value or "").split(",") if name.strip()]
    names += [name for name in ("127.0.0.1", "localhost", "::1") if name not in names]
    return ",".join(names)


def proxied(environment: Mapping[str, str]) -> bool:
    """Whether a client that reads the environment would send a call to 127.0.0.1 through a proxy."""
    names = ("http_proxy", "https_proxy", "all_proxy")
    if not any(environment.get(name) or environment.get(name.upper()) for name in names):
        return False
    exempt = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    return "*" not in exempt and "127.0.0.1" not in exempt.split(",")
