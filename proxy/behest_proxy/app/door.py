"""What is settled of a request before anybody is asked who it is: for which host it came."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from behest_ledger.configuration.snapshot import ProjectEntry

_HOST_BYTES_MAX = 512


class Door:
    """One for all listeners that clients reach over the network."""

    def __init__(self, *, host_suffix: str = "") -> None:
        """`host_suffix`: below it the first label of a host is a project's slug; empty: hosts mean nothing."""
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
