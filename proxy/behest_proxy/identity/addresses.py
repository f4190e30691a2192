"""Whose address a request comes from, and how many requests one address may send before anybody asks who it is."""

import ipaddress
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

__all__ = ["AddressLimit", "Network", "client_address", "networks_in"]

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

HOPS_MAX = 32
TABLE_MAX = 65_536
BURST_S = 5.0
"""An address that was quiet may send at once what it may send in this time."""

_FORWARDED_FOR = re.compile(r'(?:^|;)\s*for=(?:"([^"]*)"|([^;\s]*))', re.IGNORECASE)


def networks_in(text: str) -> tuple[Network, ...]:
    """Networks written as `10.0.0.0/8, 2001:db8::/32, 192.0.2.1`. Raises ValueError naming what is none."""
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def client_address(peer: str, forwarded: Sequence[bytes], trusted: Sequence[Network]) -> Address | None:
    """The nearest address that is no proxy of ours; None: nobody can be told from anybody.

    `forwarded` are the values of X-Forwarded-For or Forwarded (RFC 7239), in order. They are read from the end, where
    the proxy next to us wrote, and only as long as who wrote is trusted: what stands before that is the client's word.
    """
    address = _address(peer)
    if address is None:
        return None
    hops = [hop for value in forwarded for hop in value.decode("latin-1").split(",")]
    for hop in reversed(hops[-HOPS_MAX:]):
        if not any(address in network for network in trusted):
            return address
        before = _address(_node(hop))
        if before is None:
            return address  # a hidden or malformed hop: the proxy that said so stands for it
        address = before
    return address


def _node(hop: str) -> str:
    """The address in one hop of either header, with or without a port."""
    if (match := _FORWARDED_FOR.search(hop)) is not None:
        hop = match[1] or match[2] or ""
    hop = hop.strip()
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop


def _address(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


class AddressLimit:
    """A token bucket for each address; an IPv6 /64 is one, for whoever has one address of it has them all.

    The table is bounded: whoever was not seen for longest is forgotten first, and begins with a full bucket again. A
    flood from one address takes one place, so it never costs another one anything.
    """

    def __init__(self, rate_per_s: float, *, clock: Callable[[], float], table_max: int = TABLE_MAX) -> None:
        self._rate_per_s = rate_per_s
        self._burst = max(1.0, rate_per_s * BURST_S)
        self._clock = clock
        self._table_max = table_max
        self._buckets: OrderedDict[int, tuple[float, float]] = OrderedDict()
        """Subject -> tokens left, and when."""

    def __len__(self) -> int:
        return len(self._buckets)

    def wait_s(self, address: Address) -> int:
        """Count one request: 0, or after how many whole seconds the next one may come."""
        subject = _subject(address)
        now_s = self._clock()
        left, at_s = self._buckets.pop(subject, (self._burst, now_s))
        left = min(self._burst, left + max(0.0, now_s - at_s) * self._rate_per_s)
        allowed = left >= 1
        self._buckets[subject] = (left - 1 if allowed else left, now_s)
        if len(self._buckets) > self._table_max:
            self._buckets.popitem(last=False)
        return 0 if allowed else max(1, math.ceil((1 - left) / self._rate_per_s))


def _subject(address: Address) -> int:
    # IPv4 has the numbers below 2**32; no /64 of IPv6 is written so, for it is shifted above them.
    return int(address) if address.version == 4 else ((int(address) >> 64) + 1) << 32


def values_of(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[bytes]:
    """The values of a header, in order."""
    return [value for name, value in headers if name == wanted]
