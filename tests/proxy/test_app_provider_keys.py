"""Keys out of the environment: only for whom its operator said, and only what is a provider's."""

import logging

import pytest

from behest_ledger.configuration.kinds import Credentials, UpstreamSpec
from behest_ledger.configuration.snapshot import UpstreamEntry
from behest_proxy.app.lent_keys import LentKeys, lent_keys_in
from behest_proxy.app.provider_keys import ProviderKeys
from behest_proxy.errors import ServerError
from behest_proxy.upstream.call import UpstreamRequest
from behest_proxy.upstream.prepared import prepare

OPENAI = "https://api.openai.com/v1"
EVIL = "https://evil.example/v1"


def upstream(base_url: str, variable: str, *, tenant: str = "shop") -> UpstreamEntry:
    spec = UpstreamSpec(base_url=base_url, credentials=Credentials(env=variable))
    return UpstreamEntry(tenant_id=tenant, namespace=tenant, name="it", spec=spec)


def key_of(keys: ProviderKeys, entry: UpstreamEntry) -> str | None:
    return keys.of(entry, project_id="shop/app", provider="openai")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENAI_API_KEY", "ACME_KEY", "BEHEST_MASTER_KEY", "DATABASE_URL"):
        monkeypatch.setenv(variable, f"value of {variable}")


def test_without_a_word_of_the_operator_nobody_gets_anything() -> None:
    for entry in (upstream(OPENAI, "OPENAI_API_KEY"), upstream(EVIL, "OPENAI_API_KEY")):
        with pytest.raises(ServerError, match="allows it in BEHEST_PROVIDER_KEY_ENV"):
            key_of(ProviderKeys(None, lent_keys_in("")), entry)


def test_a_key_that_is_for_an_address_goes_there_for_everybody_and_nowhere_else() -> None:
    keys = ProviderKeys(None, lent_keys_in("OPENAI_API_KEY=https://api.openai.com"))
    for tenant in ("shop", "search"):
        assert key_of(keys, upstream(OPENAI, "OPENAI_API_KEY", tenant=tenant)) == "value of OPENAI_API_KEY"
    assert key_of(keys, upstream("https://API.openai.com:443", "OPENAI_API_KEY")) == "value of OPENAI_API_KEY"
    for elsewhere in (
        EVIL,
        "http://api.openai.com/v1",
        "https://api.openai.com:8443/v1",
        "https://api.openai.com.evil.example/v1",
        "https://api.openai.com@evil.example/v1",
        "https://api.openai.com\\@evil.example/v1",
        "https://api.openai.com\t.evil.example/v1",
    ):
        with pytest.raises(ServerError, match="BEHEST_PROVIDER_KEY_ENV"):
            key_of(keys, upstream(elsewhere, "OPENAI_API_KEY"))
    with pytest.raises(ServerError, match="BEHEST_PROVIDER_KEY_ENV"):
        key_of(keys, upstream(OPENAI, "ACME_KEY"))


def test_a_key_that_is_a_tenants_is_that_tenants_alone() -> None:
    keys = ProviderKeys(None, lent_keys_in(" OPENAI_API_KEY=https://api.openai.com,\n ACME_KEY=acme "))
    assert key_of(keys, upstream(EVIL, "ACME_KEY", tenant="acme")) == "value of ACME_KEY"
    for tenant in ("shop", "acme.shop"):
        with pytest.raises(ServerError, match="BEHEST_PROVIDER_KEY_ENV"):
            key_of(keys, upstream(OPENAI, "ACME_KEY", tenant=tenant))


def test_where_everything_is_allowed_only_keys_are() -> None:
    keys = ProviderKeys(None, lent_keys_in("*"))
    assert key_of(keys, upstream("http://127.0.0.1:9/v1", "ACME_KEY")) == "value of ACME_KEY"
    # A ledger may have resources that were written when less was refused.
    for variable in ("BEHEST_MASTER_KEY", "DATABASE_URL", "PATH"):
        with pytest.raises(ServerError, match="BEHEST_PROVIDER_KEY_ENV"):
            key_of(keys, upstream(OPENAI, variable))


def test_an_allowed_variable_that_is_not_set_is_told_apart() -> None:
    with pytest.raises(ServerError, match="the provider's key is not configured"):
        key_of(ProviderKeys(None, lent_keys_in("OTHER_KEY=shop")), upstream(OPENAI, "OTHER_KEY"))


def test_what_is_not_allowed_is_logged_once_for_each_change_of_the_configuration(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = ProviderKeys(None, LentKeys())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pytest.raises(ServerError):
                key_of(keys, upstream(EVIL, "OPENAI_API_KEY"))
        keys.use([])
        with pytest.raises(ServerError):
            key_of(keys, upstream(EVIL, "OPENAI_API_KEY"))
    assert len(caplog.messages) == 2
    assert "shop/it" in caplog.text
    assert EVIL in caplog.text
    assert "value of" not in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "OPENAI_API_KEY",
        "OPENAI_API_KEY=",
        "=acme",
        "BEHEST_MASTER_KEY=acme",
        "DATABASE_URL=acme",
        "ACME_KEY=*",
        "*,ACME_KEY=acme",
        "ACME_KEY=Acme Corp",
        "ACME_KEY=https://",
        "ACME_KEY=ftp://files.example",
        "ACME_KEY=https://api.example/v1",
        "ACME_KEY=https://api.example?x=1",
        "ACME_KEY=https://user@api.example",
        "ACME_KEY=https://api.example:port",
    ],
)
def test_an_entry_that_says_nothing_clear_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ValueError, match=r"^entry 1 must (begin|end) with [^=*]*$"):
        lent_keys_in(text)


@pytest.mark.parametrize("url", ["https://api.example/v1", "http://API.example:8080/a?b", "https://[::1]:8443/v1"])
def test_a_place_is_what_the_client_connects_to(url: str) -> None:
    origin = prepare(UpstreamRequest(method="POST", url=url, headers=[])).origin
    lent = lent_keys_in(f"ACME_KEY={origin}")
    assert lent.may_use("ACME_KEY", tenant_id="any", base_url=url)
    assert {tuple(place) for _, place in lent.to_places} == {tuple(origin)}
