"""The proxies that the environment names: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, in upper or lower case."""

import base64
import ipaddress
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

import msgspec

from behest_proxy.upstream.prepared import Origin

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP proxy. `https` origins are reached through its CONNECT (RFC 9110, 9.3.6)."""

    host: str
    port: int
    authorization: bytes | None
    """The value of `proxy-authorization`, from the user information of the proxy's URL."""

    def __repr__(self) -> str:
        """Without the credentials."""
        return f"Proxy({self.host}:{self.port})"


class _Exception(msgspec.Struct, frozen=True):
    """One entry of NO_PROXY: an address range or a domain, optionally one port of it."""

    network: IpNetwork | None
    domain: str
    port: int | None

    def covers(self, host: str, port: int, address: IpAddress | None) -> bool:
        if self.port is not None and self.port != port:
            return False
        if self.network is not None:
            return address is not None and address in self.network
        return host == self.domain or host.endswith("." + self.domain)


class Proxies:
    """Which proxy, if any, leads to an origin.

    Loopback is always reached directly, as in Go: a proxy elsewhere has another loopback. The lower-case name of a
    variable wins over the upper-case one, as in curl.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Raise ValueError for a proxy URL that is none, or not of scheme `http`."""

        def variable(name: str) -> str:
            return environment.get(name) or environment.get(name.upper()) or ""

        self._by_scheme = {
            "http": _parse_proxy("HTTP_PROXY", variable("http_proxy")),
            "https": _parse_proxy("HTTPS_PROXY", variable("https_proxy")),
        }
        entries = [entry.strip() for entry in variable("no_proxy").split(",")]
        self._never = "*" in entries
        self._exceptions = [_parse_exception(entry) for entry in entries if entry not in ("", "*")]

    def proxy_for(self, origin: Origin) -> Proxy | None:
        """The proxy that leads to this origin, or None: go directly."""
        proxy = self._by_scheme[origin.scheme]
        if proxy is None or self._never or origin.host == "localhost":
            return None
        address = parse_address(origin.host)
        if address is not None and address.is_loopback:
            return None
        if any(exception.covers(origin.host, origin.port, address) for exception in self._exceptions):
            return None
        return proxy


def parse_address(host: str) -> IpAddress | None:
    """The IP address that `host` spells, or None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _parse_proxy(name: str, url: str) -> Proxy | None:
    if not url:
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{name} must be http://[user:password@]host[:port]")
    authorization = None
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = b"Basic " + base64.b64encode(credentials.encode())
    return Proxy(host=parts.hostname, port=parts.port or 80, authorization=authorization)


def _parse_exception(entry: str) -> _Exception:
    entry = entry.lower()
    try:
        return _Exception(ipaddress.ip_network(entry.strip("[]"), strict=False), "", None)
    except ValueError:
        pass
    host, colon, port = entry.rpartition(":")
    if colon and port.isdecimal():
        address = parse_address(host.strip("[]"))
        if address is not None:
            return _Exception(ipaddress.ip_network(address), "", int(port))
        return _Exception(None, host.removeprefix("*").removeprefix("."), int(port))
    return _Exception(None, entry.removeprefix("*").removeprefix("."), None)
