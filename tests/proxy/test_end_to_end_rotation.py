"""Sidecars of their own: a signing key is rotated under one, and one lets each address ask only so often."""

from collections.abc import Iterator

import httpx
import jwt
import pytest

from behest_ledger.store.identity import set_signing_key_state
from behest_proxy.identity.keys import SigningKey
from conftest import Server, own_database
from stack import Project, Stack, running_stack, wait_until


@pytest.fixture(scope="module")
def project(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("identity")
    with (
        own_database(template, "identity") as dsn,
        running_stack(dsn, folder) as stack,
    ):
        yield stack.project()


def believed(stack: Stack, token: str) -> bool:
    answer = httpx.get(stack.base_url + "/v1/models", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code in (200, 401), answer.text
    return answer.status_code == 200


def kid_of(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def test_our_own_key_is_rotated_and_whoever_reads_the_jwk_set_can_verify_both(project: Project) -> None:
    stack = project.stack
    before = project.mint()
    key = SigningKey.generate()
    (stack.log.parent / "signing.pem").write_bytes(key.private_pem())
    after = wait_until(
        lambda: token if kid_of(token := project.mint()) != kid_of(before) else None, what="the new key's first token"
    )
    published = jwt.PyJWKSet.from_dict(httpx.get(stack.base_url + "/.well-known/jwks.json").json())
    for token in (before, after):
        assert believed(stack, token)
        claims = jwt.decode(token, published[kid_of(token)].key, algorithms=["RS256"], audience="behest")
        assert claims["pid"] == project.project_id
    # Withdrawn, the former key takes its tokens along, in the set too, and nothing else.
    stack.run(set_signing_key_state(stack.dsn, kid=kid_of(before), state="revoked"))
    wait_until(lambda: not believed(stack, before), what="the end of the former key's tokens")
    assert believed(stack, after)
    keys = httpx.get(stack.base_url + "/.well-known/jwks.json").json()["keys"]
    assert [one["kid"] for one in keys] == [kid_of(after)]


def test_an_address_that_asks_too_often_is_refused_before_its_token_is_looked_at_and_no_other_is(
    project: Project,
) -> None:
    one_in_50_s = {
        "BEHEST_ADDRESS_RATE": "0.02",
        "BEHEST_TRUSTED_PROXIES": "127.0.0.1/32",
        "BEHEST_FORWARDED_HEADER": "x-forwarded-for",
    }
    with project.stack.another_sidecar(**one_in_50_s) as url, httpx.Client(base_url=url) as client:

        def ask(forwarded: str) -> httpx.Response:
            return client.get(
                "/v1/models", headers={"Authorization": "Bearer not-a-token", "X-Forwarded-For": forwarded}
            )

        # What the client wrote before our proxy's own entry is nobody's word.
        assert ask("198.51.100.1, 203.0.113.9").status_code == 401
        refused = ask("198.51.100.2, 203.0.113.9")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 50
        assert ask("203.0.113.9").status_code == 429
        assert ask("198.51.100.1").status_code == 401
        assert ask("203.0.113.10").status_code == 401
