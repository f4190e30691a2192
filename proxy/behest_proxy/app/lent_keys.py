"""Which variables of this process's environment are keys of providers, and for whom.

The environment is its operator's; who writes an Upstream says where a key is sent. Where these are not the
same people, any of the latter could have every key here by naming its variable beside an address of their own. So the
operator says of each variable whose Upstreams may use it, or to which place it may go; of others nobody gets anything.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from behest_ledger.configuration.rules import DNS_SUBDOMAIN, holds_a_key, split_url

EVERYTHING = "*"
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Place(NamedTuple):
    """Where requests of a URL go (its origin, RFC 6454)."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class LentKeys:
    """What the operator allowed."""

    everything: bool = False
    """Whoever writes Upstreams here is also the environment's owner."""
    to_tenants: frozenset[tuple[str, str]] = frozenset()
    """A variable, and the tenant whose Upstreams may use it, wherever they send it."""
    to_places: frozenset[tuple[str, Place]] = frozenset()
    """A variable, and the place that it may be sent to by everybody's Upstreams."""

    def may_use(self, variable: str, *, tenant_id: str, base_url: str) -> bool:
        """Whether an Upstream of this tenant and with this address may call with this variable's value."""
        if not holds_a_key(variable):
            return False
        if self.everything or (variable, tenant_id) in self.to_tenants:
            return True
        place = _place(base_url)
        return place is not None and (variable, place) in self.to_places


def lent_keys_in(text: str) -> LentKeys:
    """What is written as `OPENAI_API_KEY=https://api.openai.com, ACME_KEY=acme`, or `*`; nothing lends nothing.

    Raises ValueError saying which entry is none.
    """
    if text.strip() == EVERYTHING:
        return LentKeys(everything=True)
    to_tenants: set[tuple[str, str]] = set()
    to_places: set[tuple[str, Place]] = set()
    for number, entry in enumerate(re.split(r"[,\s]+", text.strip()) if text.strip() else (), 1):
        # What was given is not shown: it may be the key itself.
        variable, _, whom = entry.partition("=")
        if not holds_a_key(variable):
            raise ValueError(f"entry {number} must begin with a variable with KEY or TOKEN in its name, not BEHEST_...")
        if "://" not in whom:
            if not DNS_SUBDOMAIN.fullmatch(whom.replace("_", "-")):
                raise ValueError(f"entry {number} must end with the name of a tenant or with an address")
            to_tenants.add((variable, whom))
            continue
        place = _place(whom)
        parts = split_url(whom)
        if place is None or parts is None or parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError(f"entry {number} must end with scheme, host and port alone, as in https://api.openai.com")
        to_places.add((variable, place))
    return LentKeys(to_tenants=frozenset(to_tenants), to_places=frozenset(to_places))


def _place(url: str) -> Place | None:
    """None: nothing is sent there."""
    parts = split_url(url)
    if parts is None or parts.scheme not in _DEFAULT_PORTS or not parts.hostname or "@" in parts.netloc:
        return None
    return Place(parts.scheme, parts.hostname, parts.port if parts.port is not None else _DEFAULT_PORTS[parts.scheme])
