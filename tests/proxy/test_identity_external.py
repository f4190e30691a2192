"""Tokens of external issuers: which are believed and as whom, and when their keys are asked for."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from msgspec.structs import replace

from behest_proxy.errors import InvalidToken
from behest_proxy.identity.external import KEYS_BYTES_MAX, Trust, Trusts, keys_in
from behest_proxy.identity.issuer_keys import BACKOFF_MIN_S, FRESH_S, STALE_S, UNKNOWN_KID_WAIT_S, IssuerKeys
from behest_proxy.identity.keys import KeySet, SigningKey
from behest_proxy.identity.tokens import TokenVerifier
from proxy.token_makers import ACME, CURVE, EVIL, KEYS, NOW_S, OWN, signed

URL = "https://issuer.example/keys"
ISSUER = "https://issuer.example"
CLAIMS: dict[str, Any] = {"iss": ISSUER, "aud": "shop", "sub": "alice", "iat": NOW_S, "exp": NOW_S + 600}
TRUST = Trust(tenant_id="acme", project_id="demo/shop", issuer=ISSUER, keys_url=URL, audience="shop")


def document(*keys: SigningKey, **changes: Any) -> bytes:
    """A key set as an issuer publishes it."""
    listed = [json.loads(KeySet([key.verification_key()]).jwks())["keys"][0] for key in keys]
    return json.dumps({"keys": [{**member, **changes} for member in listed]}).encode()


class Issuer:
    """What a fetch finds, and a clock."""

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer
        self.asked = 0
        self.now_s = 1000.0
        self.gate: asyncio.Event | None = None
        self.keys = IssuerKeys(self.fetch, clock=lambda: self.now_s)
        self.keys.keep([URL])

    async def fetch(self, url: str) -> bytes:
        assert url == URL
        self.asked += 1
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def knows(self, key: SigningKey) -> bool:
        await self.keys.ensure(URL, key.kid)
        return self.keys.get(URL, key.kid) is not None


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(bounded())


def verifier(*keys: SigningKey, trusts: tuple[Trust, ...] = (TRUST,)) -> TokenVerifier:
    published = keys_in(document(*keys))
    judge = TokenVerifier(KEYS, external_key=lambda url, kid: published.get(kid) if url == URL else None)
    judge.use_trusts(Trusts(trusts))
    return judge


def refusal(judge: TokenVerifier, token: str, now_s: float = NOW_S) -> str:
    with pytest.raises(InvalidToken) as caught:
        judge.verify(token, now_s)
    return caught.value.message


def test_an_issuers_user_is_a_user_of_the_project_and_nothing_more() -> None:
    token = signed({**CLAIMS, "role": "admin", "scp": ["all"], "tid": "evil", "pid": "evil/lair", "uid": "u"}, key=ACME)
    caller = verifier(ACME).verify(token, NOW_S)
    assert (caller.tenant_id, caller.project_id, caller.user_id) == ("acme", "demo/shop", "alice")
    assert (caller.role, caller.scopes, caller.session_id, caller.tier) == ("user", (), None, None)


def test_claims_are_taken_from_where_the_project_says() -> None:
    trust = replace(TRUST, claims={"uid": "email", "sid": "session", "tier": "plan"})
    token = signed({**CLAIMS, "email": "a@example.com", "session": "s9", "plan": "pro"}, key=ACME)
    caller = verifier(ACME, trusts=(trust,)).verify(token, NOW_S)
    assert (caller.user_id, caller.session_id, caller.tier) == ("a@example.com", "s9", "pro")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aud": "other"}, "aud"),
        ({"aud": ["other"]}, "aud"),
        ({"aud": None}, "aud"),
        ({"iss": "https://issuer.example/"}, "kid"),  # judged as one of ours, and our keys do not have it
        ({"iss": None}, "kid"),
        ({"iss": [ISSUER]}, "kid"),
        ({"exp": NOW_S - 31}, "expired"),
        ({"exp": None}, "exp"),
        ({"nbf": NOW_S + 100}, "not valid yet"),
        ({"iat": NOW_S + 100}, "not valid yet"),
        ({"sub": None}, "user"),
        ({"sub": "a\nb"}, "user"),
        ({"sub": "admin"}, "reserved"),
        ({"sub": "sys:x"}, "reserved"),
    ],
)
def test_a_token_that_is_not_for_us_is_refused(changes: dict[str, Any], said: str) -> None:
    claims = {name: value for name, value in {**CLAIMS, **changes}.items() if value is not None}
    assert said in refusal(verifier(ACME), signed(claims, key=ACME))


def test_an_issuers_key_never_signs_for_another_issuer() -> None:
    ours = {**CLAIMS, "iss": "behest", "aud": "behest", "tid": "acme", "pid": "demo/shop", "uid": "u1"}
    assert "kid" in refusal(verifier(CURVE), signed(ours, key=CURVE, header={"kid": "elsewhere"}))
    # And ours never for it, nor a tenant's, nor one that came along.
    for key in (OWN, ACME):
        assert "kid" in refusal(verifier(CURVE), signed({**CLAIMS, "tid": "acme"}, key=key))
    assert "signature" in refusal(verifier(ACME), signed(CLAIMS, key=EVIL, header={"kid": ACME.kid}))


@pytest.mark.parametrize("kid", ["../keys", "https://evil.example/keys", "k" * 4000, "", None, 7, ["a"]])
def test_kid_tricks_find_no_key(kid: object) -> None:
    assert "kid" in refusal(verifier(ACME), signed(CLAIMS, key=ACME, header={"kid": kid}))


def test_a_token_that_two_projects_may_mean_needs_the_host_of_one() -> None:
    other = replace(TRUST, tenant_id="zeta", project_id="zeta/app")
    judge = verifier(ACME, trusts=(TRUST, other))
    token = signed(CLAIMS, key=ACME)
    assert judge.verify(token, NOW_S, ("zeta", "zeta/app")).project_id == "zeta/app"
    assert judge.verify(token, NOW_S, ("acme", "demo/shop")).project_id == "demo/shop"
    # What was remembered for a host is not taken for none.
    assert "host" in refusal(judge, token)
    with pytest.raises(InvalidToken):
        judge.verify(token, NOW_S, ("evil", "evil/lair"))


def test_a_token_may_name_its_project_where_that_is_mapped() -> None:
    one = replace(TRUST, claims={"pid": "app"})
    other = replace(TRUST, tenant_id="zeta", project_id="zeta/app", claims={"pid": "app"})
    judge = verifier(ACME, trusts=(one, other))
    assert judge.verify(signed({**CLAIMS, "app": "zeta/app"}, key=ACME), NOW_S).tenant_id == "zeta"
    assert judge.verify(signed({**CLAIMS, "app": "shop"}, key=ACME), NOW_S).tenant_id == "acme"
    assert "trusts" in refusal(judge, signed(CLAIMS, key=ACME))


def test_a_withdrawn_key_and_a_withdrawn_trust_end_tokens_that_were_believed() -> None:
    published = keys_in(document(ACME))
    judge = TokenVerifier(KEYS, external_key=lambda _url, kid: published.get(kid))
    judge.use_trusts(Trusts([TRUST]))
    token = signed(CLAIMS, key=ACME)
    assert judge.verify(token, NOW_S)
    del published[ACME.kid]
    assert "kid" in refusal(judge, token)
    published.update(keys_in(document(ACME)))
    assert judge.verify(token, NOW_S)
    judge.use_trusts(Trusts())
    assert "kid" in refusal(judge, token)


def test_only_a_token_of_a_trusted_issuer_wants_a_key_of_it() -> None:
    judge = verifier(ACME)
    assert judge.wanted_key(signed(CLAIMS, key=ACME)) == (URL, ACME.kid)
    assert judge.wanted_key(signed({**CLAIMS, "aud": "other"}, key=ACME)) is None
    assert judge.wanted_key(signed({**CLAIMS, "iss": "behest"}, key=ACME)) is None
    for text in ("", "behest_sk_live_" + "0" * 32, "a.b.c", "x" * 100_000, "é.é.é"):
        assert judge.wanted_key(text) is None
    assert verifier(ACME, trusts=()).wanted_key(signed(CLAIMS, key=ACME)) is None


# ---- key sets


def test_only_usable_keys_are_read() -> None:
    private = json.loads(document(ACME))["keys"][0] | {"d": "AQAB"}
    members = [
        {"kty": "oct", "kid": "hmac", "k": "c2VjcmV0"},
        private,
        {**json.loads(document(EVIL))["keys"][0], "use": "enc"},
        {**json.loads(document(OWN))["keys"][0], "alg": "RS512"},
        {"kty": "RSA", "kid": "weak", "e": "AQAB", "n": "AQAB"},
        {"kty": "EC", "kid": "off", "crv": "P-256", "x": "AQ", "y": "AQ"},
        "text",
        {},
        json.loads(document(CURVE))["keys"][0],
    ]
    assert set(keys_in(json.dumps({"keys": members}).encode())) == {CURVE.kid}


def test_a_kid_that_is_listed_twice_is_nobodys() -> None:
    assert set(keys_in(document(ACME, ACME, CURVE))) == {CURVE.kid}


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": []}',
        b'{"keys":[],"keys":[]}',
        b"[" * 100_000,
        b" " * (KEYS_BYTES_MAX + 1),
        json.dumps({"keys": [{}] * 65}).encode(),
    ],
    ids=range(10),
)
def test_what_is_no_key_set_is_refused(wrong: bytes) -> None:
    with pytest.raises(ValueError):
        keys_in(wrong)


# ---- when they are asked for


def test_a_known_key_is_asked_for_once_and_a_hundred_requests_share_that() -> None:
    async def scenario() -> None:
        issuer = Issuer(document(ACME))
        issuer.gate = asyncio.Event()
        waiting = [asyncio.create_task(issuer.knows(ACME)) for _ in range(100)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # whoever goes away takes nothing from the others
        await asyncio.sleep(0)
        issuer.gate.set()
        assert all(await asyncio.gather(*waiting[1:]))
        assert await issuer.knows(ACME)
        assert issuer.asked == 1
        await issuer.keys.aclose()

    play(scenario)


def test_an_unknown_kid_makes_at_most_one_fetch_in_its_time() -> None:
    async def scenario() -> None:
        issuer = Issuer(document(ACME))
        assert await issuer.knows(ACME)
        for _ in range(50):
            assert not await issuer.knows(EVIL)
        assert issuer.asked == 1
        issuer.now_s += UNKNOWN_KID_WAIT_S
        issuer.answer = document(ACME, EVIL)
        assert await issuer.knows(EVIL)
        assert issuer.asked == 2

    play(scenario)


def test_a_rotated_key_is_gone_within_five_minutes() -> None:
    async def scenario() -> None:
        issuer = Issuer(document(ACME))
        assert await issuer.knows(ACME)
        issuer.answer = document(EVIL)
        issuer.now_s += FRESH_S - 1
        assert await issuer.knows(ACME)  # asks beside it
        while issuer.keys.get(URL, EVIL.kid) is None:
            await asyncio.sleep(0)
        assert issuer.asked == 2
        assert not await issuer.knows(ACME)
        issuer.answer = document(ACME)
        issuer.now_s += 10 * FRESH_S
        assert await issuer.knows(ACME)
        assert not await issuer.knows(EVIL)

    play(scenario)


def test_a_dead_issuer_is_believed_for_an_hour_and_asked_ever_more_rarely() -> None:
    async def scenario() -> None:
        issuer = Issuer(document(ACME))
        assert await issuer.knows(ACME)
        issuer.answer = OSError("refused")
        for _ in range(int(FRESH_S + STALE_S) - 1):
            issuer.now_s += 1
            assert await issuer.knows(ACME)
        assert issuer.asked <= 1 + 7 + STALE_S / 300
        issuer.now_s += 1
        assert not await issuer.knows(ACME)
        issuer.answer = document(ACME)
        issuer.now_s += 300
        assert await issuer.knows(ACME)

    play(scenario)


@pytest.mark.parametrize("wrong", [OSError("reset"), ValueError("huge"), b"<html>", b'{"keys":[]}'], ids=str)
def test_what_an_issuer_says_wrongly_takes_no_key_away(wrong: bytes | Exception) -> None:
    async def scenario() -> None:
        issuer = Issuer(wrong)
        assert not await issuer.knows(ACME)
        assert not await issuer.knows(ACME)
        assert issuer.asked == 1
        issuer.answer = document(ACME)
        issuer.now_s += BACKOFF_MIN_S
        assert await issuer.knows(ACME)
        issuer.answer = wrong
        issuer.now_s += FRESH_S + 1
        assert await issuer.knows(ACME)
        assert issuer.asked == 3

    play(scenario)


def test_urls_that_nobody_trusts_any_more_are_forgotten_and_never_fetched() -> None:
    async def scenario() -> None:
        issuer = Issuer(document(ACME))
        assert await issuer.knows(ACME)
        issuer.keys.keep([])
        assert not await issuer.knows(ACME)
        assert issuer.asked == 1

    play(scenario)
