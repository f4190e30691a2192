# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Every call of the published SDK, unmodified. Run by its own Python, in which nothing of ours is installed."""

import base64
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import openai

import behest

GIVEN = json.loads(os.environ["GIVEN"])
BASE_URL = GIVEN["base_url"]
HI = [{"role": "user", "content": "Hi"}]
SHORT = {"model": "gpt-4o-mini", "messages": HI, "max_tokens": 20, "sim": {"output_tokens": 5}}


def client(**options):
    return behest.Behest(**{"key": GIVEN["api_key"], "base_url": BASE_URL, **options})


def signing(key):
    named = {name: GIVEN[name] for name in ("kid", "tenant_id", "project_id")}
    return client(key=key, **named)


def raised(error_class, call, *arguments, **named) -> Any:
    found = None
    try:
        call(*arguments, **named)
    except error_class as error:
        found = error
    assert type(found) is error_class, found
    return found


def every_call(one):
    minted = one.auth.mint(user_id="ann", session_id="s1", ttl=600)
    claims = behest.decode_token(minted.token)
    assert (claims["uid"], claims["sid"], minted.session_id, minted.ttl) == ("ann", "s1", "s1", 600)
    whole = one.chat.completions.create(**SHORT)
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == 5
    again = one.chat.completions.create(**SHORT, token=minted.token, session_id="s1")
    assert again["choices"][0]["message"]["content"]
    for model in ("", "default"):
        assert one.chat.completions.create(**{**SHORT, "model": model}, user_id="ann")["choices"]
    chunks = list(one.chat.completions.create(**SHORT, stream=True))
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    early = one.chat.completions.create(**{**SHORT, "sim": {"output_tokens": 15}}, stream=True)
    next(early)
    early.close()
    assert one.threads.list() == []
    for call in (one.threads.get, one.threads.delete, one.threads.messages):
        error = raised(behest.BehestError, call, "t1")
        assert (error.status, error.code) == (404, "not_found")
        assert len(error.trace_id) == 32


def usage(one):
    now = datetime.now(UTC)
    for granularity in ("minute", "hour", "day"):
        told = one.usage.get(from_=now - timedelta(days=1), to=now + timedelta(hours=1), granularity=granularity)
        assert told["totals"]["requests"] == sum(part["requests"] for part in told["breakdown"]) >= 1, told
    assert one.usage.get()["totals"]["requests"] >= 1
    tomorrow = f"{now.date() + timedelta(days=1)}T00:00:00.000Z"
    assert one.usage.get(from_="2026-01-01", to=tomorrow)["totals"]["cost_usd"] > 0
    assert one.usage.get(user_id="default")["totals"]["requests"] >= 1
    error = raised(behest.BehestAuthError, one.usage.get, user_id="somebody else")
    assert (error.status, error.code) == (403, "forbidden")


def errors():
    unknown = client(key="behest_sk_live_" + "0" * 32)
    error = raised(behest.BehestAuthError, unknown.auth.mint, user_id="ann")
    assert (error.status, error.code) == (401, "invalid_token")
    one = client()
    error = raised(behest.BehestBadRequestError, one.chat.completions.create, model="gpt-4o-mini")
    assert (error.status, error.code) == (400, "validation_error")
    error = raised(behest.BehestBadRequestError, one.auth.mint, user_id="admin")
    error = raised(behest.BehestServerError, one.chat.completions.create, **{**SHORT, "sim": {"status": 500}})
    assert error.status >= 500
    poor = client(key=GIVEN["poor_api_key"])
    create = poor.chat.completions.create
    for call in (lambda: create(**SHORT), lambda: list(create(**SHORT, stream=True))):
        error = raised(behest.BehestQuotaError, call)
        assert (error.status, error.code) == (402, "quota_exceeded")
    hasty = client(tier=7)
    hasty.chat.completions.create(**SHORT)
    error = raised(behest.BehestRateLimitError, hasty.chat.completions.create, **SHORT)
    assert (error.status, error.code) == (429, "rate_limited")
    assert 1 <= error.retry_after <= 86_400
    raised(behest.BehestConfigError, behest.Behest, key="nonsense", base_url=BASE_URL)


def legacy():
    raw = behest.BehestClient(api_key=GIVEN["api_key"], base_url=BASE_URL + "/v1", end_user_id="ann", max_retries=0)
    error = raised(openai.AuthenticationError, raw.chat.completions.create, model="gpt-4o-mini", messages=HI)
    assert "/v1/auth/mint" in str(error)
    local = behest.BehestSigningClient(
        signing_key_pem=GIVEN["pem"],
        key_id=GIVEN["kid"],
        tenant_id=GIVEN["tenant_id"],
        project_id=GIVEN["project_id"],
        base_url=BASE_URL + "/v1",
        default_user_id="ann",
        max_retries=0,
    )
    answer = local.chat.completions.create(model="gpt-4o-mini", messages=HI, max_tokens=20)
    assert answer.choices[0].message.content
    stream = local.chat.completions.create(model="gpt-4o-mini", messages=HI, max_tokens=20, stream=True)
    assert any(chunk.choices and chunk.choices[0].delta.content for chunk in stream)
    assert local.models.list().data
    assert local.sign_token(user_id="bob")["access_token"]


for bearer in (
    client(),
    signing(base64.b64encode(GIVEN["pem"].encode()).decode()),
    signing("behest_pk_" + GIVEN["pem"]),
):
    every_call(bearer)
    usage(bearer)
errors()
legacy()
assert "behest_proxy" not in sys.modules
