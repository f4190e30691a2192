"""The tiers that everybody knows by number: what `behest up` writes where nobody wrote tiers of their own."""

from behest_ledger.configuration.kinds import Metadata, Tier, TierSpec

BUILTIN = {
    "free": TierSpec(number=1, requests_per_minute=10, requests_per_day=100, tokens_per_day=50_000),
    "pro": TierSpec(number=2, requests_per_minute=60, requests_per_day=10_000, tokens_per_day=2_000_000),
    "max": TierSpec(number=3, requests_per_minute=300, requests_per_day=100_000, tokens_per_day=20_000_000),
}
"""By name; each per project and user."""


def builtin_tiers(namespace: str) -> list[Tier]:
    """The built-in tiers as resources of a namespace: they are changed and deleted like any other."""
    return [Tier(metadata=Metadata(name=name, namespace=namespace), spec=spec) for name, spec in BUILTIN.items()]
