"""What is settled of a request before anybody is asked who it is: for which host it came, and that the keys are here
by which its token will be judged.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from behest_ledger.configuration.snapshot import ProjectEntry
from behest_proxy.app.context import RequestContext
from behest_proxy.errors import RateLimited
from behest_proxy.identity.addresses import AddressLimit, Network, client_address, values_of

_HOST_BYTES_MAX = 512


Prepare = Callable[[str, tuple[str, str] | None], Awaitable[None]]
"""Makes ready what a bearer's verification needs, for the project of the host if it is one's."""


class Door:
    """One for all listeners. On the pod's own loopback no host means a project, and no address is counted."""

    def __init__(
        self,
        prepare: Prepare,
        *,
        host_suffix: str = "",
        address_rate: float = 0,
        trusted_proxies: Sequence[Network] = (),
        forwarded_header: str = "x-forwarded-for",
    ) -> None:
        """`address_rate`: requests a second of one address, 0 for any; the proxies' word on it counts.

        `host_suffix`: below it the first label of a host is a project's slug; empty: hosts mean nothing.
        """
        self._limit = AddressLimit(address_rate, clock=time.monotonic) if address_rate else None
        self._proxies = trusted_proxies
        self._forwarded = forwarded_header.encode()
        self._prepare = prepare
        self._suffix = ("." + host_suffix.strip(".").lower()).encode("latin-1", "replace") if host_suffix else b""
        self._by_slug: Mapping[str, ProjectEntry] = {}

    def use(self, projects: Iterable[ProjectEntry]) -> None:
        """The projects from now on.

        A slug that two of them claim is nobody's: their tokens still say whose they are.
        """
        by_slug: dict[str, ProjectEntry | None] = {}
        for project in projects:
            if slug := project.spec.slug:
                by_slug[slug] = None if slug in by_slug else project
        self._by_slug = MappingProxyType({slug: project for slug, project in by_slug.items() if project is not None})

    def project_at(self, host: bytes) -> ProjectEntry | None:
        """The project whose slug a Host header (RFC 9110, section 7.2) names; None: the token or key says which."""
        if not self._suffix or len(host) > _HOST_BYTES_MAX:
            return None
        name = host.lower().partition(b":")[0].rstrip(b".")
        if not name.endswith(self._suffix):
            return None
        return self._by_slug.get(name[: -len(self._suffix)].decode("latin-1"))

    async def enter(self, scope: Any, context: RequestContext) -> None:
        """Wait for what the request's token needs; most need nothing, and then nothing waits.

        Raises `RateLimited` for an address that asks too often.
        """
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if self._limit is not None and not context.by_pod:
            self._count(self._limit, scope["client"], headers)
        project = context.host_project
        place = None if project is None else (project.tenant_id, project.project_id)
        for value in values_of(headers, b"authorization"):
            if value[:7].lower() == b"bearer ":
                await self._prepare(value[7:].strip().decode("latin-1"), place)
                return

    def _count(self, limit: AddressLimit, peer: tuple[str, int] | None, headers: list[tuple[bytes, bytes]]) -> None:
        if peer is None:
            return
        address = client_address(peer[0], values_of(headers, self._forwarded), self._proxies)
        if address is not None and (wait_s := limit.wait_s(address)):
            raise RateLimited("Too many requests come from this address.", retry_after_s=wait_s)
