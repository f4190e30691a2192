"""Both clients against a scripted gateway: tokens, questions, answers, errors."""

import asyncio
import concurrent.futures
import json
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime
from functools import partial
from typing import Any

import pytest

from behest import (
    Behest,
    BehestAuthError,
    BehestBadRequestError,
    BehestConnectionError,
    BehestError,
    BehestNotFoundError,
    BehestRateLimitError,
    BehestServerError,
    BehestSync,
)
from behest.testing import API_KEY, QUESTION, Gateway, Scripted, async_http, refusal, sync_http

Asked = Callable[[Any], Awaitable[Any]]


def ask(gateway: Gateway, how: str, question: Callable[[Any], Any], **options: Any) -> Any:
    """The same question to either client: `question` gets the client, and returns what its method returns."""
    given: dict[str, Any] = {"key": API_KEY, "base_url": gateway.base_url, **options}
    if how == "sync":
        with BehestSync(**given, http_client=sync_http()) as client:
            return question(client)

    async def asked() -> Any:
        async with Behest(**given, http_client=async_http()) as client:
            return await question(client)

    return asyncio.run(asked())


@pytest.fixture(params=["async", "sync"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def answered(value: object) -> Scripted:
    return Scripted(pieces=(json.dumps(value).encode(),))


WHOLE = answered({"id": "c", "choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "Hi"}}]})


def test_a_completion_needs_no_model_and_its_options_stay_out_of_the_body(gateway: Gateway, how: str) -> None:
    gateway.plays(WHOLE)
    found = ask(
        gateway,
        how,
        lambda client: client.chat.completions.create(
            messages=QUESTION, user_id="ann", session_id="s1", tier=2, thread_id="t1", idempotency_key="k1",
            temperature=0.5, extra_body={"sim": {}}, extra_headers={"X-More": "1"},
        ),
    )  # fmt: skip
    assert found.choices[0].message.content == "Hi"
    (seen,), (mint,) = gateway.seen, gateway.mints
    assert seen.body == {"messages": QUESTION, "temperature": 0.5, "sim": {}}
    assert mint.body == {"user_id": "ann", "ttl": 3600, "session_id": "s1", "tier": 2}
    assert mint.headers["authorization"] == f"Bearer {API_KEY}"
    told = {name: seen.headers.get(name) for name in ("authorization", "x-thread-id", "idempotency-key", "x-more")}
    expected = {"authorization": "Bearer token-1", "x-thread-id": "t1", "idempotency-key": "k1", "x-more": "1"}
    assert told == expected
    assert "x-session-id" not in seen.headers, "the token says it"


def test_messages_of_an_answer_can_be_sent_back(gateway: Gateway, how: str) -> None:
    gateway.plays(WHOLE, WHOLE)

    def twice(client: Any) -> Any:
        first = client.chat.completions.create(messages=QUESTION)
        if how == "sync":
            return client.chat.completions.create(messages=[*QUESTION, first.choices[0].message])

        async def then() -> Any:
            return await client.chat.completions.create(messages=[*QUESTION, (await first).choices[0].message])

        return then()

    ask(gateway, how, twice)
    assert gateway.seen[1].body["messages"][1] == {"content": "Hi"}


def _create(more: dict[str, Any], client: Any) -> Any:
    return client.chat.completions.create(messages=QUESTION, **more)


def test_what_is_not_json_is_refused_here(gateway: Gateway, how: str) -> None:
    values: list[tuple[str, Any]] = [("seed", object()), ("temperature", float("nan")), ("thread_id", "a b")]
    for more in [{name: value} for name, value in (*values, ("idempotency_key", "x" * 256))]:
        with pytest.raises(BehestBadRequestError):
            ask(gateway, how, partial(_create, more))
    assert gateway.seen == []


def test_a_given_token_is_used_as_it_is(gateway: Gateway, how: str) -> None:
    gateway.plays(answered({"object": "list", "data": [{"id": "m"}]}))
    found = ask(gateway, how, lambda client: client.models.list(token="mine", session_id="s9"))
    assert [model.id for model in found] == ["m"]
    assert gateway.mints == []
    assert gateway.seen[0].headers["authorization"] == "Bearer mine"
    assert gateway.seen[0].headers["x-session-id"] == "s9"


def test_many_calls_at_once_for_one_user_ask_for_one_token(gateway: Gateway) -> None:
    gateway.mint_delay_s = 0.1
    gateway.plays(*[answered([])] * 41)  # the impatient one may have its token before it is cancelled

    async def together() -> None:
        async with Behest(key=API_KEY, base_url=gateway.base_url, http_client=async_http()) as client:
            async with asyncio.timeout(20):
                impatient = asyncio.ensure_future(client.threads.list(user_id="ann"))
                await asyncio.sleep(0.01)
                impatient.cancel()
                await asyncio.gather(*(client.threads.list(user_id=user) for user in ("ann", "bob") for _ in range(10)))

    asyncio.run(together())
    assert sorted(mint.body["user_id"] for mint in gateway.mints) == ["ann", "bob"]
    with (
        BehestSync(key=API_KEY, base_url=gateway.base_url, http_client=sync_http()) as client,
        concurrent.futures.ThreadPoolExecutor(20) as pool,
    ):
        asked = [pool.submit(client.threads.list, user_id=f"u{number % 2}") for number in range(20)]
        assert [each.result() for each in asked] == [[]] * 20
    assert len(gateway.mints) == 4


def test_a_token_that_ends_soon_is_replaced_and_its_session_stays(gateway: Gateway, how: str) -> None:
    gateway.mint_ttl_s = 1  # half of its life is over after half a second
    gateway.plays(answered([]), answered([]))

    def twice(client: Any) -> Any:
        if how == "sync":
            client.threads.list()
            time.sleep(0.6)
            return client.threads.list()

        async def both() -> Any:
            await client.threads.list()
            await asyncio.sleep(0.6)
            return await client.threads.list()

        return both()

    ask(gateway, how, twice)
    assert [seen.headers["authorization"] for seen in gateway.seen] == ["Bearer token-1", "Bearer token-2"]
    first, second = (mint.body["session_id"] for mint in gateway.mints)
    assert first == second


def test_a_token_that_is_not_believed_is_an_error_and_the_next_call_has_another(gateway: Gateway, how: str) -> None:
    gateway.plays(refusal(401, "invalid_token"), refusal(403, "forbidden"), answered([]))
    calls: list[Any] = []

    def thrice(client: Any) -> Any:
        if how == "sync":
            for _ in range(2):
                with pytest.raises(BehestAuthError) as refused:
                    client.threads.list()
                calls.append(refused.value.code)
            return client.threads.list()

        async def all_three() -> Any:
            for _ in range(2):
                with pytest.raises(BehestAuthError) as refused:
                    await client.threads.list()
                calls.append(refused.value.code)
            return await client.threads.list()

        return all_three()

    ask(gateway, how, thrice)
    assert calls == ["invalid_token", "forbidden"]
    assert [seen.headers["authorization"] for seen in gateway.seen] == [
        "Bearer token-1",
        "Bearer token-2",
        "Bearer token-2",
    ]


def test_threads_usage_billing_and_budgets_ask_what_the_api_says(gateway: Gateway, how: str) -> None:
    costs: dict[str, Any] = {"requests": 1, "input_tokens": 2, "output_tokens": 3, "cost_usd": 0.5}
    parts: dict[str, Any] = {"by_model": [{**costs, "model": "m"}], "by_session": [{**costs, "session_id": "s"}]}
    bill: dict[str, Any] = {**costs, **parts}
    bins: list[dict[str, Any]] = [{**costs, "tokens": 5, "timestamp": "now"}]
    used_in_all: dict[str, Any] = {"totals": {**costs, "tokens": 5}, "breakdown": bins}
    gateway.plays(
        answered([{"id": "a/b", "more": 1}]),
        answered({"id": "a/b"}),
        answered([{"role": "user", "content": "Hi"}]),
        Scripted(204),
        answered(used_in_all),
        answered({"project_id": "p", "window": {}, "platform": bill, "byok": bill}),
        answered({"object": "list", "data": [{"budget": "n/b", "remaining": "0.5"}]}),
    )
    threads = ask(gateway, how, lambda client: client.threads.list(limit=5, before="x", user_id="ann"))
    assert (threads[0].id, threads[0].more) == ("a/b", 1)
    assert ask(gateway, how, lambda client: client.threads.get("a/b")).id == "a/b"
    assert ask(gateway, how, lambda client: client.threads.messages("a/b"))[0].content == "Hi"
    assert ask(gateway, how, lambda client: client.threads.delete("a/b")) is None
    moment = datetime(2026, 4, 1, tzinfo=UTC)
    used = ask(
        gateway,
        how,
        lambda client: client.usage.get(from_=moment, to="2026-05-01", granularity="hour", tz="Europe/Berlin"),
    )
    assert (used.totals.cost_usd, used.breakdown[0].timestamp) == (0.5, "now")
    billed = ask(gateway, how, lambda client: client.billing.usage(from_=date(2026, 4, 1), role="admin"))
    assert (billed.platform.by_model[0].model, billed.byok.by_session[0].session_id) == ("m", "s")
    assert ask(gateway, how, lambda client: client.budgets.list(session_id="s"))[0].remaining == "0.5"
    assert [(seen.method, seen.path) for seen in gateway.seen] == [
        ("GET", "/v1/threads?limit=5&before=x"),
        ("GET", "/v1/threads/a%2Fb"),
        ("GET", "/v1/threads/a%2Fb/messages"),
        ("DELETE", "/v1/threads/a%2Fb"),
        ("GET", "/v1/usage?granularity=hour&tz=Europe%2FBerlin&from=2026-04-01T00%3A00%3A00%2B00%3A00&to=2026-05-01"),
        ("GET", "/v1/billing/usage?from=2026-04-01"),
        ("GET", "/v1/budgets"),
    ]
    assert gateway.mints[-2].body["role"] == "admin"


def test_what_a_retry_can_help_is_retried_and_what_not_is_not(gateway: Gateway, how: str, waits: list[float]) -> None:
    gateway.plays(
        refusal(503, "draining", headers={"retry-after": "1"}),
        refusal(429, "rate_limited", headers={"retry-after": "4"}),
    )
    gateway.plays(refusal(502, "upstream_error"), WHOLE)
    assert ask(gateway, how, lambda client: client.chat.completions.create(messages=QUESTION)).choices
    assert waits == [1.0, 4.0, 2.0]
    waits.clear()
    gateway.plays(refusal(404, "not_found"))
    with pytest.raises(BehestNotFoundError) as missing:
        ask(gateway, how, lambda client: client.threads.get("t"))
    assert (missing.value.status, missing.value.code, missing.value.trace_id) == (404, "not_found", "t" * 32)
    gateway.plays(refusal(429, "rate_limited", headers={"retry-after": "80000"}))
    with pytest.raises(BehestRateLimitError) as limited:
        ask(gateway, how, lambda client: client.threads.list())
    assert limited.value.retry_after == 80_000
    gateway.plays(refusal(500, "server_error", headers={"x-should-retry": "false"}))
    with pytest.raises(BehestServerError):
        ask(gateway, how, lambda client: client.threads.list())
    assert waits == []


def test_a_lost_answer_is_asked_for_again_only_where_that_charges_nothing_twice(
    gateway: Gateway, how: str, waits: list[float]
) -> None:
    lost = Scripted(pieces=(b'{"id":',), end="cut")
    gateway.plays(lost)
    with pytest.raises(BehestConnectionError) as failed:
        ask(gateway, how, lambda client: client.chat.completions.create(messages=QUESTION))
    assert (failed.value.status, failed.value.code, waits) == (None, "network_error", [])
    gateway.plays(lost)
    with pytest.raises(BehestConnectionError):
        ask(gateway, how, lambda client: client.threads.delete("t"))
    assert waits == []
    gateway.plays(lost, WHOLE, lost, answered([]))
    assert ask(gateway, how, lambda client: client.chat.completions.create(messages=QUESTION, idempotency_key="k"))
    assert ask(gateway, how, lambda client: client.threads.list()) == []
    assert waits == [0.5, 0.5]


def test_nobody_listening_is_a_connection_error_after_three_more_tries(how: str, waits: list[float]) -> None:
    nobody = Gateway()
    nobody.base_url = "http://127.0.0.1:9"
    with pytest.raises(BehestConnectionError) as failed:
        ask(nobody, how, lambda client: client.chat.completions.create(messages=QUESTION))
    assert failed.value.request_sent is False
    assert waits == [0.5, 1.0, 2.0]


def test_an_answer_of_something_else_is_an_error_with_a_type(gateway: Gateway, how: str) -> None:
    for text in (b"<html>", b"[]", b'"x"', b""):
        gateway.plays(Scripted(pieces=(text,)))
        with pytest.raises(BehestError) as failed:
            ask(gateway, how, lambda client: client.budgets.list())
        assert failed.value.code == "invalid_answer"
