"""Two tenants at once, in one ledger and one sidecar: neither sees, spends or learns of anything of the other's."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from behest_proxy.app.openapi import openapi_document
from stack import Project, Stack

READS = [
    path.replace("{thread_id}", "same-thread")
    for path, operations in openapi_document()["paths"].items()
    for method, operation in operations.items()
    if method == "get" and operation["security"]
]
"""Every endpoint that reads, also those to come: what writes is `chat/completions`, mint, and deleting a thread."""
EXPORT = "/v1/billing/export"
MODELS = {"one": "gpt-4o-mini", "other": "gpt-4.1-nano"}
REQUESTS = 12


def marked(stack: Stack, name: str) -> Project:
    """A tenant whose model, budget and user names nobody else has."""
    return stack.project(
        upstream=f"  models: [{{name: marked-{name}, upstreamName: {MODELS[name]}}}, {{name: gpt-4o-mini}}]",
        more=f"""---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: budget-{name}}}
spec: {{scope: {{user: same-user}}, limit: {{requests: {REQUESTS}}}, window: {{period: Day}}}}
""",
    )


def ask(stack: Stack, token: str, name: str, **headers: str) -> int:
    return httpx.post(
        stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {token}", **headers},
        json={
            "model": f"marked-{name}",
            "messages": [{"role": "user", "content": f"Hi from marked-{name}"}],
            "sim": {"output_tokens": 2},
            "max_tokens": 5,
        },
        timeout=30,
    ).status_code


_work = [(name, "ask") for name in MODELS for _ in range(REQUESTS - 1)]
_work += [(name, "mint") for name in MODELS for _ in range(3)]
_work += [(name, "delete") for name in MODELS for _ in range(2)]
_work += [(name, path) for name in MODELS for path in READS for _ in range(3)]


@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(work=st.permutations(_work))
def test_two_tenants_hammering_at_once_never_see_spend_or_learn_of_each_others_rows(
    stack: Stack, work: list[tuple[str, str]]
) -> None:
    # The same user and session ids, on purpose; even an admin's token sees its own project alone.
    projects = {name: marked(stack, name) for name in MODELS}
    tokens = {name: project.mint(user="same-user", session="s", role="admin") for name, project in projects.items()}
    secrets = {
        name: (f"marked-{name}", f"budget-{name}", f"{project.namespace}/") for name, project in projects.items()
    }

    def do(item: tuple[str, str]) -> tuple[str, str, int, str]:
        name, what = item
        if what == "ask":
            return name, what, ask(stack, tokens[name], name), ""
        if what == "mint":
            return name, what, 200, projects[name].mint(user="same-user", session="s", role="admin")
        bearer = {"Authorization": f"Bearer {tokens[name]}"}
        if what == "delete":
            gone = httpx.delete(stack.base_url + "/v1/threads/same-thread", headers=bearer, timeout=30)
            return name, what, gone.status_code, gone.text
        answer = httpx.get(stack.base_url + what, headers=bearer, timeout=30)
        return name, what, answer.status_code, answer.text

    for name, token in tokens.items():
        assert ask(stack, token, name, **{"X-Thread-Id": "same-thread"}) == 200
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(do, work))
    for name, what, status, text in done:
        thread = what == "delete" or "same-thread" in what
        # How many exports run at once is the sidecar's limit, whoever asks.
        assert status in ((200, 204, 404) if thread else (200, 429) if what == EXPORT else (200,)), (name, what)
        stranger = "other" if name == "one" else "one"
        for secret in secrets[stranger]:
            assert secret not in text, (name, what)
        if what == "mint":
            # A token of one is a token of one: the project is in it, and nobody's word changes that.
            told = httpx.get(stack.base_url + "/v1/billing/usage", headers={"Authorization": f"Bearer {text}"}).json()
            assert told["project_id"] == projects[name].project_id
    for name, project in projects.items():
        rows = project.settled(number=REQUESTS)
        assert (len(rows), {row["model"] for row in rows}) == (REQUESTS, {f"marked-{name}"})
        # Each spent its own budget to the last request, and the other's model is a word that means nothing.
        budgets: dict[str, dict[str, Any]] = project.budgets(tokens[name])
        assert str(budgets[f"budget-{name}"]["remaining"]) == "0"
        assert ask(stack, tokens[name], name) == 402
        assert ask(stack, tokens[name], "other" if name == "one" else "one") == 400
        bill = httpx.get(stack.base_url + "/v1/billing/usage", headers={"Authorization": f"Bearer {tokens[name]}"})
        assert bill.json()["project_id"] == project.project_id
