"""A request made safe to put on a wire: parsed origin, clean headers, checked values; or refused."""

import re
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from behest_proxy.upstream.call import UpstreamRequest

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FORBIDDEN_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_FORBIDDEN_IN_URL = re.compile(r"[^\x21-\x7e]")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_METHODS_WITH_BODY = frozenset({b"POST", b"PUT", b"PATCH"})

# RFC 9110, 7.6.1 and RFC 9113, 8.2.2: these speak of one connection, so the client decides them. `expect` would
# ask for an answer that the client does not wait for; `proxy-authorization` is between us and our own proxy.
_OWNED_BY_CLIENT = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)


class Origin(NamedTuple):
    """Where requests share connections (RFC 6454): the key of a pool, together with the wire form."""

    scheme: Literal["http", "https"]
    host: str
    """Lower case; an IPv6 address without brackets."""

    port: int

    @property
    def authority(self) -> str:
        """`host` or `host:port`, with brackets around an IPv6 address, without the scheme's own port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"


class PreparedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a connection needs to send a request; nothing in it can break a wire's framing."""

    origin: Origin
    protocol: Literal["auto", "http1", "http2"]
    method: bytes
    target: bytes
    """Path and query, never empty."""

    headers: list[tuple[bytes, bytes]]
    """Lower-case names, with `content-length` where the method has a body, without `host`."""

    body: bytes
    connect_timeout_s: float
    first_byte_timeout_s: float
    idle_timeout_s: float

    def __repr__(self) -> str:
        """Without headers and body, as `UpstreamRequest`."""
        return f"PreparedRequest({self.method!r} {self.origin})"


def prepare(request: UpstreamRequest) -> PreparedRequest:
    """Check and normalise. Raises ValueError, without the offending value, for what must not reach a wire."""
    method = request.method.encode("ascii", "replace")
    if not _TOKEN.fullmatch(method) or method in (b"CONNECT", b"HEAD"):
        raise ValueError("the method is none of a request to an origin whose answer may have a body")
    origin, target = _split(request.url)
    headers = _clean(request.headers)
    if request.body or method in _METHODS_WITH_BODY:
        headers.append((b"content-length", b"%d" % len(request.body)))
    return PreparedRequest(
        origin=origin,
        protocol="http1" if request.protocol == "auto" and origin.scheme == "http" else request.protocol,
        method=method,
        target=target,
        headers=headers,
        body=request.body,
        connect_timeout_s=request.connect_timeout_s,
        first_byte_timeout_s=request.first_byte_timeout_s,
        idle_timeout_s=request.idle_timeout_s,
    )


def _split(url: str) -> tuple[Origin, bytes]:
    # Before urlsplit, which drops tabs and line breaks silently.
    if _FORBIDDEN_IN_URL.search(url):
        raise ValueError("the URL holds characters that must be percent-encoded")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("the URL is neither http nor https")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL holds user information; send an authorization header instead")
    if not parts.hostname:
        raise ValueError("the URL names no host")
    scheme: Literal["http", "https"] = "https" if parts.scheme == "https" else "http"
    port = parts.port if parts.port is not None else _DEFAULT_PORTS[scheme]
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Origin(scheme, parts.hostname, port), target.encode("ascii")


def _clean(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Lower-case the names, check names and values, drop what the client decides and what `connection` names."""
    dropped = set(_OWNED_BY_CLIENT)
    lowered = [(name.lower(), value) for name, value in headers]
    for name, value in lowered:
        if name == b"connection":
            dropped.update(option.strip().lower() for option in value.split(b","))
    clean: list[tuple[bytes, bytes]] = []
    for name, value in lowered:
        if not _TOKEN.fullmatch(name):
            raise ValueError("a header's name is no token (RFC 9110, 5.1)")
        if _FORBIDDEN_IN_VALUE.search(value):
            raise ValueError(f"the value of header {name.decode('ascii')} holds a control character")
        if name not in dropped:
            clean.append((name, value.strip(b" \t")))
    return clean
