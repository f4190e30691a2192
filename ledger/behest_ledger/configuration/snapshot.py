"""The configuration as a proxy holds it in memory: typed, immutable, read again when its version changes."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from behest_ledger.configuration.kinds import ProjectSpec, TierSpec, UpstreamSpec
from behest_ledger.configuration.state import StoredSpec


class ProjectEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A project as it is in force."""

    tenant_id: str
    namespace: str
    name: str
    spec: ProjectSpec

    @property
    def project_id(self) -> str:
        """`<namespace>/<name>`."""
        return f"{self.namespace}/{self.name}"

    @property
    def default_model(self) -> str | None:
        """The model of requests that name none."""
        return self.spec.default_model

    @property
    def allowed_models(self) -> list[str]:
        """Names and globs; empty allows whatever the project's upstreams serve."""
        return self.spec.allowed_models

    @property
    def allowed_origins(self) -> list[str]:
        """Exact origins, `https://*.example.com`, or `*`."""
        return self.spec.allowed_origins

    @property
    def suspended(self) -> bool:
        """The kill switch."""
        return self.spec.suspended

    @property
    def require_session(self) -> bool:
        """Whether a request must name a session."""
        return self.spec.require_session


class UpstreamEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An upstream as it is in force."""

    tenant_id: str
    namespace: str
    name: str
    spec: UpstreamSpec

    @property
    def qualified_name(self) -> str:
        """`<namespace>/<name>`."""
        return f"{self.namespace}/{self.name}"


class TierEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A tier as it is in force."""

    tenant_id: str
    namespace: str
    name: str
    spec: TierSpec


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """All projects, upstreams and tiers of one tenant, or of all, at one version."""

    version: int
    projects: Mapping[tuple[str, str], ProjectEntry] = {}
    """By (tenant id, project id): a token names both, and must match both."""
    upstreams: Mapping[tuple[str, str], tuple[UpstreamEntry, ...]] = {}
    """By (tenant id, namespace), ordered by name."""
    tiers: Mapping[tuple[str, str], tuple[TierEntry, ...]] = {}
    """By (tenant id, namespace), ordered by number and name."""
    problems: tuple[str, ...] = ()
    """Stored rows that could not be read and are left out, one sentence each: a newer version wrote them."""

    def project(self, tenant_id: str, project_id: str) -> ProjectEntry | None:
        """The project, None where it is unknown."""
        return self.projects.get((tenant_id, project_id))

    def tenant_of(self, project_id: str) -> str | None:
        """Whose a project is, where only one tenant has one of that id; None: unknown."""
        found = [tenant for tenant, known in self.projects if known == project_id]
        return found[0] if len(found) == 1 else None

    def upstreams_of(self, project: ProjectEntry) -> tuple[UpstreamEntry, ...]:
        """The upstreams that a project may use: those of its namespace."""
        return self.upstreams.get((project.tenant_id, project.namespace), ())

    def tier(self, project: ProjectEntry, tier: str | int | None) -> TierEntry | None:
        """A tier of the project's namespace by name or number; None: the project's default tier.

        None also where no such tier exists: a token may name one that was deleted.
        """
        wanted = project.spec.default_tier if tier is None else tier
        for entry in self.tiers.get((project.tenant_id, project.namespace), ()):
            if wanted in (entry.name, entry.spec.number) or wanted == str(entry.spec.number):
                return entry
        return None


def configuration_of(
    version: int,
    *,
    projects: Iterable[StoredSpec],
    upstreams: Iterable[StoredSpec],
    tiers: Iterable[StoredSpec],
) -> Configuration:
    """The snapshot of stored rows. A row that cannot be read is left out and told: it must not stop the others."""
    problems: list[str] = []
    by_id: dict[tuple[str, str], ProjectEntry] = {}
    for row in projects:
        spec = _read(row, "Project", ProjectSpec, problems)
        if spec is not None:
            project = ProjectEntry(tenant_id=row.tenant_id, namespace=row.namespace, name=row.name, spec=spec)
            by_id[project.tenant_id, project.project_id] = project
    upstream_groups: dict[tuple[str, str], list[UpstreamEntry]] = {}
    for row in upstreams:
        endpoint = _read(row, "Upstream", UpstreamSpec, problems)
        if endpoint is not None:
            upstream_groups.setdefault((row.tenant_id, row.namespace), []).append(
                UpstreamEntry(tenant_id=row.tenant_id, namespace=row.namespace, name=row.name, spec=endpoint)
            )
    tier_groups: dict[tuple[str, str], list[TierEntry]] = {}
    for row in tiers:
        rates = _read(row, "Tier", TierSpec, problems)
        if rates is not None:
            tier_groups.setdefault((row.tenant_id, row.namespace), []).append(
                TierEntry(tenant_id=row.tenant_id, namespace=row.namespace, name=row.name, spec=rates)
            )
    return Configuration(
        version=version,
        projects=by_id,
        upstreams={key: tuple(sorted(group, key=lambda entry: entry.name)) for key, group in upstream_groups.items()},
        tiers={
            key: tuple(sorted(group, key=lambda entry: (entry.spec.number, entry.name)))
            for key, group in tier_groups.items()
        },
        problems=tuple(problems),
    )


_SpecT = TypeVar("_SpecT", bound=msgspec.Struct)


def _read(row: StoredSpec, kind: str, model: type[_SpecT], problems: list[str]) -> _SpecT | None:
    spec: dict[str, Any] = row.spec
    try:
        return msgspec.convert(spec, model)
    except msgspec.ValidationError as error:
        problems.append(f"{kind} {row.qualified_name}: {error}")
        return None
