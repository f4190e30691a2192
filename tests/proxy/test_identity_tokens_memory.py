"""The memory of verified tokens: it ends with the key, the project or the time, and is bounded."""

import pytest

from behest_proxy.errors import Forbidden
from behest_proxy.identity.keys import KeySet, SigningKey
from behest_proxy.identity.tokens import TokenVerifier
from proxy.token_makers import (
    ACME,
    BOUND,
    CLAIMS,
    CURVE,
    KEYS,
    LEGACY,
    NOW_S,
    OWN,
    PROJECTS,
    refusal,
    signed,
    thiefs_private_key,
    verifier,
)


def test_a_remembered_token_expires_all_the_same() -> None:
    judge, token = verifier(), OWN.sign(CLAIMS)
    judge.verify(token, NOW_S)
    assert judge.cached_count == 1
    assert "expired" in refusal(token, NOW_S + 3631, by=judge)
    # The clock went back: what was refused is not remembered, and is judged anew.
    assert judge.verify(token, NOW_S)
    assert "not valid yet" in refusal(token, NOW_S - 31, by=judge)


def test_a_project_taken_from_its_tenant_ends_remembered_tokens() -> None:
    projects = dict(PROJECTS)
    judge = TokenVerifier(KEYS, project_belongs=lambda tenant_id, pid: projects.get(pid) == tenant_id)
    token = signed(LEGACY, key=ACME)
    judge.verify(token, NOW_S)
    del projects["demo/shop"]
    with pytest.raises(Forbidden):
        judge.verify(token, NOW_S)


def test_a_remembered_token_ends_when_its_key_is_revoked() -> None:
    judge, token = verifier(), signed(LEGACY, key=ACME)
    judge.verify(token, NOW_S)
    assert judge.use_keys(KeySet([OWN.verification_key()]))
    assert "kid" in refusal(token, by=judge)


def test_a_remembered_token_ends_when_its_kid_means_another_key() -> None:
    judge, token = verifier(), OWN.sign(CLAIMS)
    judge.verify(token, NOW_S)
    other = SigningKey(thiefs_private_key(), kid=OWN.kid)
    judge.use_keys(KeySet([other.verification_key()]))
    assert "signature" in refusal(token, by=judge)


def test_polling_the_same_keys_again_forgets_nothing() -> None:
    judge, token = verifier(), OWN.sign(CLAIMS)
    judge.verify(token, NOW_S)
    again = SigningKey.load(OWN.private_pem()).verification_key()
    assert again.public_key is not OWN.public_key
    rest = [
        KEYS.get(BOUND.kid),
        KEYS.get(CURVE.kid),
        KEYS.get("sk_acme", "acme"),
        KEYS.get("sk_evil", "evil"),
    ]
    assert not judge.use_keys(KeySet([again, *(key for key in rest if key)]))
    assert judge.cached_count == 1


def test_only_so_many_tokens_are_remembered_and_the_least_used_goes_first() -> None:
    judge = verifier(cache_size=3)
    tokens = [BOUND.sign({**LEGACY, "uid": f"u_{number}"}) for number in range(4)]
    for token in tokens[:3]:
        judge.verify(token, NOW_S)
    judge.verify(tokens[0], NOW_S)
    judge.verify(tokens[3], NOW_S)
    assert judge.cached_count == 3
    for token in tokens:
        assert judge.verify(token, NOW_S)


def test_a_remembered_token_yields_the_same_caller_without_another_check() -> None:
    judge, token = verifier(), OWN.sign(CLAIMS)
    first = judge.verify(token, NOW_S)
    assert judge.verify(token, NOW_S + 1) is first


def test_refused_tokens_fill_no_memory() -> None:
    judge = verifier()
    for number in range(50):
        refusal(f"{OWN.sign(CLAIMS)}{number}", by=judge)
