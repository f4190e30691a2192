"""Which origins may read a project's answers in a browser (Fetch standard, "CORS protocol")."""

from behest_ledger.configuration.snapshot import ProjectEntry

_WILDCARD = "://*."


def project_allows(project: ProjectEntry, origin: str) -> bool:
    """Whether a project lets scripts of an origin read its answers: exact, `https://*.example.com`, or `*`."""
    return any(_allows(pattern, origin) for pattern in project.allowed_origins)


def _allows(pattern: str, origin: str) -> bool:
    if pattern in ("*", origin):
        return True
    scheme, wildcard, rest = pattern.partition(_WILDCARD)
    if not wildcard:
        return False
    prefix = scheme + "://"
    # At least one label stands for the star, and the scheme is part of the origin.
    return origin.startswith(prefix) and origin.endswith("." + rest) and len(origin) > len(prefix) + len(rest) + 1
