"""What a client takes from its arguments and its environment."""

import pytest

from behest import Behest, BehestConfigError, BehestSync
from behest.settings import resolve

KEY = "behest_sk_live_" + "ab" * 16


def test_every_variable_is_read() -> None:
    found = resolve(
        environment={
            "BEHEST_KEY": f" {KEY}\n",
            "BEHEST_BASE_URL": "http://127.0.0.1:8080/v1/",
            "BEHEST_USER_ID": "ann",
            "BEHEST_TTL": "600",
            "BEHEST_TIER": "2",
            "BEHEST_ISSUER": "me",
            "BEHEST_AUDIENCE": "you",
            "BEHEST_KID": "sk_1",
            "BEHEST_TENANT_ID": "t",
            "BEHEST_PROJECT_ID": "t/p",
        }
    )
    assert (found.mode, found.key, found.base_url) == ("api_key", KEY, "http://127.0.0.1:8080")
    assert (found.user_id, found.ttl_s, found.tier, found.issuer, found.audience) == ("ann", 600, 2, "me", "you")
    assert (found.kid, found.tenant_id, found.project_id) == ("sk_1", "t", "t/p")


def test_what_is_given_wins_and_the_rest_has_defaults() -> None:
    found = resolve(key=KEY, user_id="bob", tier="pro", environment={"BEHEST_USER_ID": "ann", "BEHEST_TIER": "1"})
    assert (found.user_id, found.tier, found.ttl_s) == ("bob", "pro", 3600)
    assert (found.base_url, found.issuer, found.audience) == (
        "https://api.behest.ai",
        "https://api.behest.ai",
        "behest",
    )


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({}, "missing_env"),
        ({"BEHEST_KEY": " "}, "missing_env"),
        ({"BEHEST_KEY": "sk-openai"}, "bad_key_format"),
        ({"BEHEST_KEY": "aGVsbG8="}, "bad_key_format"),
        ({"BEHEST_KEY": "behest_pk_nonsense"}, "bad_key_format"),
        ({"BEHEST_KEY": KEY, "BEHEST_BASE_URL": "localhost:8080"}, "bad_base_url"),
        ({"BEHEST_KEY": KEY, "BEHEST_TTL": "an hour"}, "bad_ttl"),
        ({"BEHEST_KEY": "-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----"}, "missing_env"),
    ],
)
def test_what_cannot_be_used_is_told_without_showing_the_key(environment: dict[str, str], code: str) -> None:
    with pytest.raises(BehestConfigError) as refused:
        resolve(environment=environment)
    assert refused.value.code == code
    assert not environment.get("BEHEST_KEY", "").strip() or environment["BEHEST_KEY"] not in str(refused.value)


def test_both_clients_are_made_of_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHEST_KEY", KEY)
    monkeypatch.setenv("BEHEST_BASE_URL", "http://127.0.0.1:1")
    assert Behest().settings == BehestSync().settings
    assert KEY not in repr(Behest().settings)
