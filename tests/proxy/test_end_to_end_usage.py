"""What clients are told of their usage equals the books, whoever asks, however the time is written."""

import json
from decimal import Decimal
from typing import Any

import httpx
import pytest

from stack import Project, Stack

BODY = {"messages": [{"role": "user", "content": "hi"}], "sim": {"output_tokens": 9}}


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    made = stack.project()
    for user, session in (("ann", "s1"), ("ann", "s2"), ("bob", "s3")):
        headers = {"Authorization": f"Bearer {made.mint(user=user, session=session)}"}
        httpx.post(stack.base_url + "/v1/chat/completions", json=BODY, headers=headers).raise_for_status()
    made.settled(number=3)
    return made


def ask(project: Project, path: str, *, user: str = "ann", **mint: Any) -> httpx.Response:
    token = project.mint(user=user, session=None, **mint)
    return httpx.get(project.stack.base_url + path, headers={"Authorization": f"Bearer {token}"})


def answer(project: Project, path: str, **who: Any) -> Any:
    response = ask(project, path, **who)
    assert response.status_code == 200, response.text
    return json.loads(response.content, parse_float=Decimal)


def books(project: Project, *users: str) -> dict[str, Any]:
    rows = [row for row in project.settled(number=3) if row["user_id"] in users]
    return {
        "requests": len(rows),
        "input_tokens": sum(row["input_tokens"] for row in rows),
        "output_tokens": sum(row["output_tokens"] for row in rows),
        "cost_usd": Decimal(sum(row["amount_pico"] for row in rows)).scaleb(-12),
    }


@pytest.mark.parametrize("granularity", ["minute", "hour", "day"])
def test_a_user_sees_their_own_and_the_totals_are_the_sum_of_the_breakdown(project: Project, granularity: str) -> None:
    told = answer(project, f"/v1/usage?granularity={granularity}&tz=Asia/Kathmandu")
    mine = books(project, "ann")
    assert told["totals"] == {**mine, "tokens": mine["input_tokens"] + mine["output_tokens"]}
    for name, value in told["totals"].items():
        assert sum(part[name] for part in told["breakdown"]) == value
    assert all(part["timestamp"].endswith("+05:45") for part in told["breakdown"])


def test_the_usage_of_others_is_for_higher_roles_only(project: Project) -> None:
    refused = ask(project, "/v1/usage?user_id=bob")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert answer(project, "/v1/usage?user_id=ann")["totals"]["requests"] == 2
    for role in ("admin", "dashboard-service"):
        theirs = answer(project, "/v1/usage?user_id=bob", role=role)["totals"]
        assert theirs["cost_usd"] == books(project, "bob")["cost_usd"]
        assert answer(project, "/v1/usage", role=role)["totals"]["requests"] == 3
        assert answer(project, "/v1/usage?user_id=eve", role=role)["breakdown"] == []


@pytest.mark.parametrize(
    "begin",
    [
        "2026-04-01T00:00:00 00:00",
        "2026-04-01",
        "2026-04-01T00:00:00.000Z",
        "2026-04-01T02:00:00+02:00",
        "2026-04-01 00:00",
    ],
)
def test_times_are_taken_as_published_clients_write_them(project: Project, begin: str) -> None:
    # The text as it is in the URL: httpx would encode it.
    told = answer(project, f"/v1/usage?from={begin}".replace(" ", "%20"))
    assert told["totals"]["requests"] == 2
    assert answer(project, f"/v1/usage?to={begin}".replace(" ", "%20"))["breakdown"] == []
    assert answer(project, f"/v1/billing/usage?from={begin}".replace(" ", "%20"))["platform"]["requests"] == 2


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=yesterday", "from"),
        ("to=0001-01-01T00:00:00%2B14:00", "to"),
        ("to=9999-12-31T23:59:59-12:00", "to"),
        ("from=2026-04-02&to=2026-04-01", "from"),
        ("granularity=week", "granularity"),
        ("granularity=minute&from=2020-01-01", "granularity"),
        ("tz=Mars/Olympus", "tz"),
        ("tz=../../etc/passwd", "tz"),
        ("user_id=%00", "user_id"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_named(project: Project, query: str, param: str) -> None:
    refused = ask(project, f"/v1/usage?{query}", role="admin")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_the_bill_is_split_by_model_and_session(project: Project) -> None:
    told = answer(project, "/v1/billing/usage", role="admin")
    assert told["project_id"] == project.project_id
    whole = books(project, "ann", "bob")
    assert {name: told["platform"][name] for name in whole} == whole
    assert [row["model"] for row in told["platform"]["by_model"]] == ["gpt-4o-mini"]
    assert sorted(row["session_id"] for row in told["platform"]["by_session"]) == ["s1", "s2", "s3"]
    assert told["byok"]["requests"] == 0
    assert answer(project, "/v1/billing/usage")["platform"]["requests"] == 2
