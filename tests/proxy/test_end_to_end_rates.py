"""What a tier's caller is told of its rates, on answers, streams and refusals."""

import re
from typing import Any

import httpx

from behest_ledger.configuration.tiers import BUILTIN, builtin_tiers
from behest_ledger.store.configuration import apply_manifests
from stack import Project, Stack, within_one

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "sim": {"output_tokens": 9}}


def asked(project: Project, token: str, **more: Any) -> httpx.Response:
    return httpx.post(
        project.stack.base_url + "/v1/chat/completions",
        json={**BODY, **more},
        headers={"Authorization": f"Bearer {token}"},
    )


def told(answer: httpx.Response) -> dict[str, str]:
    return {
        name.removeprefix("x-ratelimit-"): value
        for name, value in answer.headers.items()
        if name.startswith("x-ratelimit-")
    }


def test_a_built_in_tier_is_told_with_every_answer_and_at_its_end_refuses(stack: Stack) -> None:
    project = stack.project()
    stack.run(apply_manifests(stack.dsn, builtin_tiers(project.namespace), default_tenant=project.namespace))
    stack.wait_until_read()
    within_one(60, takes_s=20)
    token = project.mint(tier=1)
    first = told(asked(project, token))
    assert (first["limit-requests"], first["remaining-requests"]) == ("10", "9")
    assert re.fullmatch(r"(1m0|[0-9]{1,2})s", first["reset-requests"])
    assert first["limit-tokens"] == "50000"
    row = project.settled()[-1]
    used = row["input_tokens"] + row["output_tokens"]
    streamed = told(asked(project, token, stream=True))
    assert streamed["remaining-requests"] == "8"
    # What the running request holds is not left: at most its worst case.
    assert 50_000 - used - 200 <= int(streamed["remaining-tokens"]) < 50_000 - used
    left = [told(asked(project, token))["remaining-requests"] for _ in range(8)]
    assert left == [str(number) for number in reversed(range(8))]
    refused = asked(project, token)
    assert (refused.status_code, told(refused)["remaining-requests"]) == (429, "0")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    # Another tier of the same user has rates of its own, and without a tier nothing is told.
    assert told(asked(project, project.mint(tier="pro")))["limit-requests"] == "60"
    assert told(asked(project, project.mint())) == {}
    assert [spec.number for spec in BUILTIN.values()] == [1, 2, 3]
