"""Heads of requests and answers: from the wire to an ASGI scope, and from the application to the wire."""

import re
import time
from collections.abc import Iterable, Sequence
from email.utils import formatdate
from typing import Any
from urllib.parse import unquote_to_bytes

from behest_proxy.edge.direct import EXTENSION, DirectStream, Header

SERVER_NAME = b"behest"

HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"te", b"trailer"}
)
"""Headers that belong to one connection: the edge writes its own, and HTTP/2 forbids them (RFC 9113, 8.2.2)."""

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")  # RFC 9110, 5.6.2, in lower case
_VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")
_TARGET = re.compile(rb"[!-~\x80-\xff]+")
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}")

Address = tuple[str, int]


class BadHead(ValueError):
    """A request's method or target that no application should see."""


def http_scope(
    *,
    http_version: str,
    method: bytes,
    target: bytes,
    headers: list[Header],
    scheme: str,
    client: Address | None,
    server: Address | None,
    state: dict[str, Any],
) -> dict[str, Any]:
    """The ASGI http scope of a request. `headers` have lower-case names, `host` among them.

    Raises BadHead for a method that is no token or a target that is neither a path, nor an absolute URI
    (RFC 9112, 3.2.2: servers must accept it), nor `*`.
    """
    if not _METHOD.fullmatch(method):
        raise BadHead("malformed method")
    if not _TARGET.fullmatch(target):
        raise BadHead("malformed request target")
    if target[:1] != b"/" and target != b"*":
        before, found, rest = target.partition(b"://")
        if not found or before.lower() not in (b"http", b"https"):
            raise BadHead("malformed request target")
        target = _path_of_absolute(rest)
    raw_path, _, query = target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": http_version,
        "method": method.decode("ascii").upper(),
        "scheme": scheme,
        "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"),
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": client,
        "server": server,
        "state": dict(state),
        "extensions": {},
    }


def _path_of_absolute(rest: bytes) -> bytes:
    """Path and query of `authority[/path][?query]`."""
    for index, byte in enumerate(rest):
        if byte == 0x2F:
            return rest[index:]
        if byte == 0x3F:
            return b"/" + rest[index:]
    return b"/"


def offer_direct(scope: dict[str, Any], stream: DirectStream) -> None:
    """Put the stream into the scope's extensions."""
    scope["extensions"][EXTENSION] = {"stream": stream}


_date_second = -1
_date_value = b""


def date_header() -> bytes:
    """The current HTTP date, formatted once a second."""
    global _date_second, _date_value
    second = int(time.time())
    if second != _date_second:
        _date_value = formatdate(second, usegmt=True).encode("ascii")
        _date_second = second
    return _date_value


def answer_headers(headers: Iterable[Header]) -> list[Header]:
    """The headers of an answer as both protocols send them: lower case, safe, with `date` and `server`.

    Connection-level headers are dropped, and white space around values (RFC 9110, 5.5). Raises ValueError for names
    that are no tokens and for values with control characters: such a header could split the answer.
    """
    result: list[Header] = []
    has_date = has_server = False
    for given_name, value in headers:
        name = given_name.lower()
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"malformed header {name!r}")
        if name in HOP_BY_HOP:
            continue
        has_date = has_date or name == b"date"
        has_server = has_server or name == b"server"
        result.append((name, bytes(value).strip(b" \t")))
    if not has_date:
        result.append((b"date", date_header()))
    if not has_server:
        result.append((b"server", SERVER_NAME))
    return result


def asks_to_close(headers: Sequence[Header]) -> bool:
    """Whether the application's headers hold `connection: close`."""
    return any(
        name.lower() == b"connection" and b"close" in value.lower().replace(b" ", b"").split(b",")
        for name, value in headers
    )


def has_no_body(*, method: str, status: int) -> bool:
    """Whether an answer has no body whatever its headers say (RFC 9110, 6.4.1)."""
    return method == "HEAD" or status in (204, 304) or 100 <= status < 200


def peer_address(name: object) -> Address | None:
    """Host and port of `getpeername()`/`getsockname()`, None for Unix sockets."""
    match name:
        case (str(host), int(port), *_):
            return host, port
        case _:
            return None
