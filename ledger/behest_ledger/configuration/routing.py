"""Which upstream serves a request's model, and as what: pure resolution over the configuration in memory."""

import msgspec

from behest_ledger.configuration.globs import is_pattern, matches, matches_any
from behest_ledger.configuration.kinds import ModelEntry
from behest_ledger.configuration.snapshot import Configuration, ProjectEntry, TierEntry, UpstreamEntry


class RoutingError(Exception):
    """No upstream can be named for the request. The message is meant for the caller."""

    def __init__(self, message: str, *, model: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.model = model


class UnknownModelError(RoutingError):
    """The project may not use the model, or the request names none and there is no default."""


class NoUpstreamError(RoutingError):
    """The project may use the model, but nothing serves it."""


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes."""

    model: str
    """The model as it is told to the client and charged: what was asked for, or the default."""
    upstream_name: str
    """What the provider calls the model."""
    upstream: UpstreamEntry
    entry: ModelEntry | None
    """What the upstream says about the model: prices, limits, what is visible; None: nothing."""

    @property
    def provider(self) -> str | None:
        """The price book's provider id, where the manifest says it."""
        return self.entry.provider if self.entry else None


def route(
    configuration: Configuration, project: ProjectEntry, model: str | None, *, tier: TierEntry | None = None
) -> Route:
    """Where a request of the project for the model goes.

    No model, an empty one and `default` mean the default model. A tier may replace models. Of several upstreams,
    one that lists the model by name comes before one that lists a fitting glob (the longest first), and both
    before one that lists nothing; equals go by the upstream's name. Raises `UnknownModelError` and
    `NoUpstreamError`.
    """
    wanted = resolve_model(project, model, tier=tier)
    choices: list[tuple[tuple[int, int], str, UpstreamEntry, ModelEntry | None]] = []
    for upstream in configuration.upstreams_of(project):
        if not upstream.spec.models:
            choices.append((_LISTS_NOTHING, upstream.name, upstream, None))
        choices += [
            (_fitness(entry, wanted), upstream.name, upstream, entry)
            for entry in upstream.spec.models
            if matches(entry.name, wanted)
        ]
    if not choices:
        raise NoUpstreamError(f"No upstream of this project serves the model '{wanted}'.", model=wanted)
    *_, upstream, entry = min(choices, key=lambda choice: choice[:2])
    upstream_name = entry.upstream_name if entry and entry.upstream_name else wanted
    return Route(model=wanted, upstream_name=upstream_name, upstream=upstream, entry=entry)


def resolve_model(project: ProjectEntry, model: str | None, *, tier: TierEntry | None = None) -> str:
    """The model that a request of the project means. Raises `UnknownModelError`."""
    replacements = tier.spec.models if tier else {}
    if model in (None, "", "default"):
        wanted = replacements.get("default") or project.default_model
        if wanted is None:
            raise UnknownModelError("The request names no model, and the project has no default model.", model=None)
        # The default is what the project's owner chose: the list of what callers may choose does not bind it.
        return replacements.get(wanted, wanted)
    assert model is not None
    if project.allowed_models and not matches_any(project.allowed_models, model):
        raise UnknownModelError(f"The model '{model}' does not exist or this project may not use it.", model=model)
    return replacements.get(model, model)


def served_models(configuration: Configuration, project: ProjectEntry) -> list[str]:
    """The names that a client can be told, sorted: what upstreams list by name, and literal names of the project.

    A glob names no model, so that of an upstream without a list only names which the project allows are known.
    """
    upstreams = configuration.upstreams_of(project)
    names = {entry.name for upstream in upstreams for entry in upstream.spec.models}
    names |= {name for name in project.allowed_models if _is_served(configuration, project, name)}
    names = {name for name in names if not is_pattern(name)}
    if project.allowed_models:
        names = {name for name in names if matches_any(project.allowed_models, name)}
    if project.default_model is not None and _is_served(configuration, project, project.default_model):
        names.add(project.default_model)
    return sorted(names)


def _is_served(configuration: Configuration, project: ProjectEntry, model: str) -> bool:
    return any(
        not upstream.spec.models or any(matches(entry.name, model) for entry in upstream.spec.models)
        for upstream in configuration.upstreams_of(project)
    )


_LISTS_NOTHING = (2, 0)


def _fitness(entry: ModelEntry, model: str) -> tuple[int, int]:
    """Smaller fits better."""
    if entry.name == model:
        return (0, 0)
    return (1, -len(entry.name))
