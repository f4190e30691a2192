"""The client for Python against a real sidecar, simulator and ledger."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from behest import (
    Behest,
    BehestAuthError,
    BehestBadRequestError,
    BehestForbiddenError,
    BehestNotFoundError,
    BehestQuotaError,
    BehestRateLimitError,
    BehestServerError,
    BehestSync,
)
from behest.testing import async_http, sync_http
from behest_proxy.identity.keys import SigningKey
from stack import Project, Stack, wait_until, within_one

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
DAY_S = 86_400


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


@pytest.fixture(scope="module")
def client(project: Project) -> Iterator[BehestSync]:
    with BehestSync(key=project.api_key, base_url=project.stack.base_url, http_client=sync_http()) as made:
        yield made


def _async(project: Project, **options: Any) -> Behest:
    return Behest(key=project.api_key, base_url=project.stack.base_url, http_client=async_http(), **options)


def _sim(**behaviour: Any) -> dict[str, Any]:
    return {"sim": behaviour}


def test_a_stream_is_billed_to_its_user_and_session(project: Project) -> None:
    async def scenario() -> tuple[str, int, str | None]:
        async with _async(project) as behest:
            stream = await behest.chat.completions.create(
                messages=QUESTION, stream=True, user_id="ada", session_id="s-1", extra_body=_sim(output_tokens=40),
                stream_options={"include_usage": True},
            )  # fmt: skip
            tokens = 0
            async for chunk in stream:
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            return stream.text, tokens, stream.request_id

    text, tokens, request_id = asyncio.run(scenario())
    assert text.startswith("This is simulated text")
    assert tokens == 40
    row = next(row for row in project.settled() if row["request_id"] == request_id)
    assert (row["user_id"], row["session_id"], row["output_tokens"], row["outcome"]) == ("ada", "s-1", 40, "completed")


def test_a_whole_answer_has_the_type_of_the_openai_package(client: BehestSync) -> None:
    answer = client.chat.completions.create(messages=QUESTION, extra_body=_sim(text="Hi"))
    assert (answer.object, answer.model, answer.choices[0].message.content) == ("chat.completion", "gpt-4o-mini", "Hi")
    assert answer.usage is not None


def test_leaving_the_loop_stops_the_provider_and_the_bill(project: Project, client: BehestSync) -> None:
    stream = client.chat.completions.create(
        messages=QUESTION, stream=True, extra_body=_sim(output_tokens=5000, chunk_interval_ms=5)
    )
    for number, _ in enumerate(stream):
        if number == 3:
            break
    request_id = str(stream.request_id)

    def ended() -> Any:
        return next((row for row in project.settled(number=0) if row["request_id"] == request_id), None)

    row = wait_until(ended, what="the settlement of the stream that was left")
    assert row["outcome"] == "client_cancelled"
    seen = wait_until(
        lambda: (found := project.stack.sim_request(request_id)) and found["outcome"] == "cancelled" and found,
        what="the provider's seeing the cancel",
    )
    assert 3 <= row["output_tokens"] <= seen["output_tokens_sent"] < 1000


def test_a_budget_that_ends_in_the_middle_raises_its_class_and_keeps_the_text(stack: Stack) -> None:
    poor = stack.project(limit_usd="0.0005")

    async def scenario() -> tuple[BehestQuotaError, str]:
        async with _async(poor) as behest:
            stream = await behest.chat.completions.create(
                messages=QUESTION, stream=True, extra_body=_sim(output_tokens=5000)
            )
            with pytest.raises(BehestQuotaError) as cut:
                async for _ in stream:
                    pass
            with pytest.raises(BehestQuotaError) as refused:
                await behest.chat.completions.create(messages=QUESTION, stream=True)
            assert (refused.value.status, refused.value.partial_text) == (402, "")
            return cut.value, stream.text

    error, text = asyncio.run(scenario())
    assert text.startswith("This is simulated text")
    assert (error.status, error.code, error.partial_text) == (402, "quota_exceeded", text)
    assert error.details["budget"].endswith("/sessions")
    assert error.trace_id is not None
    assert len(error.trace_id) == 32


def test_a_provider_that_breaks_in_the_middle_is_a_server_error_with_the_text(client: BehestSync) -> None:
    stream = client.chat.completions.create(
        messages=QUESTION, stream=True, extra_body=_sim(output_tokens=20, error_event_after_chunks=3)
    )
    with pytest.raises(BehestServerError) as broken:
        list(stream)
    assert (broken.value.status, broken.value.code) == (502, "upstream_error")
    assert broken.value.partial_text == stream.text != ""


def test_a_rate_limit_tells_when_to_come_again(stack: Stack) -> None:
    project = stack.project()
    stack.apply(
        "apiVersion: behest.ai/v1alpha1\nkind: Tier\n"
        f"metadata: {{name: hasty, namespace: {project.namespace}}}\nspec: {{number: 7, requestsPerDay: 1}}\n"
    )
    within_one(DAY_S, takes_s=60)  # a day that ends in half a minute would be waited for
    with BehestSync(key=project.api_key, base_url=stack.base_url, tier=7, http_client=sync_http()) as behest:
        behest.chat.completions.create(messages=QUESTION)
        began_s = time.monotonic()
        with pytest.raises(BehestRateLimitError) as limited:
            behest.chat.completions.create(messages=QUESTION)
    assert time.monotonic() - began_s < 25, "nobody waits for the next day"
    assert (limited.value.status, limited.value.code) == (429, "rate_limited")
    assert 1 <= (limited.value.retry_after or 0) <= DAY_S


def test_other_errors_have_their_classes(project: Project, client: BehestSync) -> None:
    with pytest.raises(BehestBadRequestError) as bad:
        client.chat.completions.create(messages=QUESTION, n=0)
    assert (bad.value.status, bad.value.code, bad.value.param) == (400, "validation_error", "n")
    with pytest.raises(BehestNotFoundError):
        client.threads.get("no-such-thread")
    with pytest.raises(BehestForbiddenError):
        client.budgets.list(token=project.mint(session="s1"), session_id="another")
    with pytest.raises(BehestAuthError) as unknown:
        client.models.list(token="nonsense")
    assert (unknown.value.status, unknown.value.code) == (401, "invalid_token")
    stranger = BehestSync(key="behest_sk_live_" + "0" * 32, base_url=project.stack.base_url, http_client=sync_http())
    with stranger, pytest.raises(BehestAuthError):
        stranger.auth.mint(user_id="ann")


def test_tokens_can_be_signed_here(stack: Stack) -> None:
    key = SigningKey.generate()
    pem = "".join(f"      {line}\n" for line in key.public_pem().splitlines())
    project = stack.project(project=f"  signingKeys:\n  - kid: sk_here\n    publicKey: |\n{pem}")
    signing = BehestSync(
        key=key.private_pem().decode(),
        base_url=stack.base_url,
        kid="sk_here",
        tenant_id=project.namespace,
        project_id=project.project_id,
        http_client=sync_http(),
    )
    with signing as behest:
        assert behest.chat.completions.create(messages=QUESTION, user_id="bob").choices
        token = behest.auth.mint(user_id="bob")
        assert behest.models.list(token=token.value)
    assert [row["user_id"] for row in project.settled()] == ["bob"]


def test_usage_budgets_models_and_threads_of_a_user(project: Project, client: BehestSync) -> None:
    before = client.budgets.list(user_id="eve", session_id="s-eve")
    assert [budget.budget.partition("/")[2] for budget in before] == ["sessions"]
    client.chat.completions.create(messages=QUESTION, user_id="eve", session_id="s-eve")
    project.settled()
    used = wait_until(
        lambda: (found := client.usage.get(user_id="eve", granularity="hour")).totals.requests and found,
        what="the usage",
    )
    assert used.totals.requests == sum(part.requests for part in used.breakdown) == 1
    assert used.totals.cost_usd > 0
    billed = client.billing.usage(user_id="eve")
    assert [(row.session_id, row.requests) for row in billed.platform.by_session] == [("s-eve", 1)]
    (after,) = client.budgets.list(user_id="eve", session_id="s-eve")
    assert (after.limit, after.unit) == (before[0].limit, before[0].unit)
    assert float(after.spent) > 0
    assert "gpt-4o-mini" in [model.id for model in client.models.list()]
    assert client.threads.list(user_id="eve") == []
