"""Two tenants at once, in one ledger and one sidecar: neither sees, spends or learns of anything of the other's."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from stack import Project, Stack

READS = ("/v1/models", "/v1/budgets", "/v1/usage", "/v1/billing/usage", "/v1/threads")
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


def ask(stack: Stack, token: str, name: str) -> int:
    return httpx.post(
        stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {token}"},
        json={
            "model": f"marked-{name}",
            "messages": [{"role": "user", "content": "Hi"}],
            "sim": {"output_tokens": 2},
            "max_tokens": 5,
        },
        timeout=30,
    ).status_code


@pytest.mark.parametrize("seed", [1, 2])
def test_two_tenants_at_once_learn_nothing_of_each_other(stack: Stack, seed: int) -> None:
    # The same user and session ids, on purpose; even an admin's token sees its own project alone.
    projects = {name: marked(stack, name) for name in MODELS}
    tokens = {name: project.mint(user="same-user", session="s", role="admin") for name, project in projects.items()}
    secrets = {
        name: (f"marked-{name}", f"budget-{name}", f"{project.namespace}/") for name, project in projects.items()
    }
    chance = random.Random(seed)
    work = [(name, "ask") for name in MODELS for _ in range(REQUESTS)]
    work += [(name, path) for name in MODELS for path in READS for _ in range(4)]
    chance.shuffle(work)

    def do(item: tuple[str, str]) -> tuple[str, str, int, str]:
        name, what = item
        if what == "ask":
            return name, what, ask(stack, tokens[name], name), ""
        answer = httpx.get(stack.base_url + what, headers={"Authorization": f"Bearer {tokens[name]}"}, timeout=30)
        return name, what, answer.status_code, answer.text

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(do, work))
    for name, what, status, text in done:
        assert status == 200, (name, what)
        stranger = "other" if name == "one" else "one"
        for secret in secrets[stranger]:
            assert secret not in text, (name, what)
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
