from typing import Any

import pytest

from behest_ledger.configuration.routing import NoUpstreamError, UnknownModelError, route, served_models
from behest_ledger.configuration.snapshot import Configuration, ProjectEntry, TierEntry, configuration_of
from behest_ledger.configuration.state import StoredSpec

OPENAI = "https://api.openai.com/v1"


def stored(name: str, spec: dict[str, Any], *, namespace: str = "demo", tenant_id: str = "acme") -> StoredSpec:
    return StoredSpec(tenant_id=tenant_id, namespace=namespace, name=name, spec=spec)


def configured(*upstreams: StoredSpec, tiers: tuple[StoredSpec, ...] = (), **project: Any) -> Configuration:
    return configuration_of(7, projects=[stored("shop", project)], upstreams=upstreams, tiers=tiers)


def shop(configuration: Configuration) -> ProjectEntry:
    found = configuration.project("acme", "demo/shop")
    assert found is not None
    return found


def routed(configuration: Configuration, model: str | None, tier: TierEntry | None = None) -> tuple[str, str, str]:
    found = route(configuration, shop(configuration), model, tier=tier)
    return found.model, found.upstream.name, found.upstream_name


ANY = stored("any", {"baseURL": OPENAI})


@pytest.mark.parametrize("model", [None, "", "default"])
def test_no_model_means_the_projects_default(model: str | None) -> None:
    assert routed(configured(ANY, defaultModel="gpt-4o-mini"), model) == ("gpt-4o-mini", "any", "gpt-4o-mini")


def test_no_model_and_no_default_is_an_unknown_model() -> None:
    with pytest.raises(UnknownModelError, match="names no model"):
        routed(configured(ANY), None)


def test_a_model_that_is_not_allowed_is_unknown() -> None:
    configuration = configured(ANY, allowedModels=["gpt-4o*"])
    assert routed(configuration, "gpt-4o-mini")[0] == "gpt-4o-mini"
    with pytest.raises(UnknownModelError, match=r"'gpt-4\.1' does not exist or this project may not use it"):
        routed(configuration, "gpt-4.1")


def test_a_model_that_nothing_serves_has_no_upstream() -> None:
    configuration = configured(stored("one", {"baseURL": OPENAI, "models": [{"name": "a"}]}))
    with pytest.raises(NoUpstreamError, match=r"No upstream of this project serves the model 'b'\."):
        routed(configuration, "b")


def test_the_upstream_that_names_the_model_best_serves_it() -> None:
    configuration = configured(
        stored("a-open", {"baseURL": OPENAI}),
        stored("b-star", {"baseURL": OPENAI, "models": [{"name": "*"}]}),
        stored("c-glob", {"baseURL": OPENAI, "models": [{"name": "gpt-*"}]}),
        stored("d-exact", {"baseURL": OPENAI, "models": [{"name": "gpt-4o", "upstreamName": "azure-4o"}]}),
    )
    assert routed(configuration, "gpt-4o") == ("gpt-4o", "d-exact", "azure-4o")
    assert routed(configuration, "gpt-5") == ("gpt-5", "c-glob", "gpt-5")
    assert routed(configuration, "claude") == ("claude", "b-star", "claude")


def test_equally_good_upstreams_go_by_name() -> None:
    configuration = configured(stored("b", {"baseURL": OPENAI}), stored("a", {"baseURL": OPENAI}))
    assert routed(configuration, "m")[1] == "a"


def test_another_namespaces_upstream_does_not_serve() -> None:
    configuration = configured(
        stored("x", {"baseURL": OPENAI}, namespace="other"), stored("x", {"baseURL": OPENAI}, tenant_id="other")
    )
    with pytest.raises(NoUpstreamError):
        routed(configuration, "m")


def test_the_models_own_entry_comes_with_the_route() -> None:
    configuration = configured(
        stored("one", {"baseURL": OPENAI, "models": [{"name": "m", "provider": "groq", "contextLimit": 9}]}), ANY
    )
    found = route(configuration, shop(configuration), "m")
    assert found.provider == "groq"
    assert found.entry is not None
    assert found.entry.context_limit == 9
    assert route(configuration, shop(configuration), "n").entry is None


def test_a_tier_replaces_models_and_the_default() -> None:
    gold = stored("gold", {"number": 3, "models": {"gpt-4o": "gpt-4o-mini", "default": "o4-mini"}})
    configuration = configured(ANY, tiers=(gold,), defaultModel="gpt-4o", allowedModels=["gpt-4o"])
    for name in ("gold", 3, "3"):
        tier = configuration.tier(shop(configuration), name)
        assert tier is not None
        assert routed(configuration, "gpt-4o", tier)[0] == "gpt-4o-mini"
        assert routed(configuration, None, tier)[0] == "o4-mini"
    assert configuration.tier(shop(configuration), "silver") is None
    assert configuration.tier(shop(configuration), None) is None


def test_a_projects_default_tier_is_that_of_users_without_one() -> None:
    free = stored("free", {"number": 1})
    configuration = configured(tiers=(free,), defaultTier="free")
    tier = configuration.tier(shop(configuration), None)
    assert tier is not None
    assert tier.name == "free"


def test_clients_are_told_the_models_that_have_names() -> None:
    configuration = configured(
        stored("one", {"baseURL": OPENAI, "models": [{"name": "gpt-4o"}, {"name": "gpt-5*"}, {"name": "o3"}]}),
        defaultModel="gpt-5-mini",
        allowedModels=["gpt-*", "gpt-5-nano", "claude"],
    )
    assert served_models(configuration, shop(configuration)) == ["gpt-4o", "gpt-5-mini", "gpt-5-nano"]


def test_a_row_that_cannot_be_read_does_not_stop_the_others() -> None:
    configuration = configured(stored("new", {"baseURL": OPENAI, "protocol": "HTTP3"}), ANY)
    assert configuration.version == 7
    assert [entry.name for entry in configuration.upstreams_of(shop(configuration))] == ["any"]
    assert configuration.problems == ("Upstream demo/new: Invalid enum value 'HTTP3' - at `$.protocol`",)


def test_a_project_is_known_only_to_its_tenant() -> None:
    configuration = configured()
    assert configuration.project("other", "demo/shop") is None
    assert not shop(configuration).suspended
    assert not shop(configuration).require_session
