"""The built-in page without a browser: who gets it, what it is told, and that nobody else learns anything."""

import json
from decimal import Decimal
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from behest_proxy.app.page import Page, _is_local  # pyright: ignore[reportPrivateUsage]
from behest_proxy.app.settings import Settings, from_environment
from stack import Project, Stack, wait_until

HOSTILE = "<img/src=x/onerror=alert(1)>\"'&amp;"
PATHS = ("/", "/icon.svg", "/page.css", "/page.js", "/page/now.json", "/page/sessions.json?q=s")


def spend(project: Project, *, user: str = "ann", session: str = "s1") -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "sim": {"output_tokens": 9}}
    headers = {"Authorization": f"Bearer {project.mint(user=user, session=session)}"}
    httpx.post(project.stack.base_url + "/v1/chat/completions", json=body, headers=headers).raise_for_status()


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    made = stack.project()
    spend(made)
    spend(made, user=HOSTILE, session=HOSTILE)
    made.settled(number=2)
    return made


def now(stack: Stack, name: str = "24h") -> Any:
    answer = httpx.get(f"{stack.admin_url}/page/now.json?range={name}", timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_what_it_is_told_is_what_the_books_say(project: Project, stack: Stack) -> None:
    def is_so() -> bool:  # what is told may be as old as the last who looked
        told = now(stack)
        assert sum(Decimal(one["usd"]) for one in told["bins"]) == Decimal(told["spent_usd"])
        truth = stack.query("SELECT count(*) AS requests, sum(amount_pico)::text AS amount FROM ledger.request_now")[0]
        return (told["requests_ended"], Decimal(told["spent_usd"])) == (
            truth["requests"],
            Decimal(truth["amount"]).scaleb(-12),
        )

    wait_until(is_so, what="the page's agreement with the books")


def test_ids_of_clients_come_as_data_and_nothing_else(project: Project, stack: Stack) -> None:
    answer = httpx.get(f"{stack.admin_url}/page/sessions.json", params={"q": HOSTILE, "range": "1h"}, timeout=30)
    assert answer.headers["content-type"] == "application/json"
    found = [one for one in answer.json()["sessions"] if one["project"] == project.project_id]
    assert [(one["session"], one["user"]) for one in found] == [(HOSTILE, HOSTILE)]
    page = httpx.get(stack.admin_url + "/").text
    assert "<script>" not in page
    assert "style=" not in page
    assert "onclick" not in page
    script = httpx.get(stack.admin_url + "/page.js").text
    for way_in in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert way_in not in script
    assert "http" not in script.replace("http://www.w3.org/2000/svg", "")  # works offline


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_forbids_what_it_does_not_need(stack: Stack, path: str) -> None:
    answer = httpx.get(stack.admin_url + path, timeout=30)
    assert answer.status_code == 200, answer.text
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [{"host": "attacker.example"}, {"host": "127.0.0.1.attacker.example:8081"}, {"sec-fetch-site": "cross-site"}],
    ids=str,
)
def test_another_name_or_another_sites_page_learns_nothing(stack: Stack, path: str, headers: dict[str, str]) -> None:
    answer = httpx.get(stack.admin_url + path, headers=headers)
    assert (answer.status_code, answer.text) == (403, "only from this machine: kubectl port-forward\n")


@pytest.mark.parametrize(
    ("client", "host", "expected"),
    [
        ("127.0.0.1", "localhost:8081", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "[::1]:8081", True),
        ("::ffff:127.0.0.1", "localhost:8081", True),
        ("::ffff:10.0.0.7", "localhost:8081", False),
        ("10.0.0.7", "localhost:8081", False),
        ("fd00::1", "[::1]:8081", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "behest.svc:8081", False),
        ("", "localhost", False),
        ("unix", "localhost", False),
    ],
)
def test_only_this_machines_loopback_is_answered(client: str, host: str, expected: bool) -> None:
    scope = {"type": "http", "client": (client, 1) if client else None, "headers": [(b"host", host.encode())]}
    assert _is_local(Request(scope)) is expected


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, True),
        ({"BEHEST_PAGE": "off"}, False),
        ({"BEHEST_WORKLOAD_NAME": "web"}, False),
        ({"BEHEST_WORKLOAD_NAME": "web", "BEHEST_PAGE": "on"}, True),
    ],
)
def test_beside_other_containers_of_a_pod_it_is_there_only_where_somebody_says_so(
    more: dict[str, str], expected: bool
) -> None:
    settings: Settings = from_environment(
        {"BEHEST_DATABASE_URL": "postgresql://x", "BEHEST_SIGNING_KEY_FILE": "/x", **more}
    )

    class Gateway:
        def __init__(self) -> None:
            self.settings = settings

    gateway: Any = Gateway()
    assert bool(Page(gateway).routes()) is expected


def test_what_makes_no_sense_is_refused(stack: Stack) -> None:
    for query in ("now.json?range=1y", "sessions.json", "sessions.json?q=", "sessions.json?q=" + "x" * 256):
        answer = httpx.get(f"{stack.admin_url}/page/{query}")
        assert answer.status_code == 400
        assert "problem" in answer.json()
    assert httpx.post(stack.admin_url + "/page/now.json").status_code == 405


def test_many_who_look_ask_the_ledger_once(project: Project, stack: Stack) -> None:
    times = {json.dumps(now(stack, "7d")["at"]) for _ in range(5)}
    assert len(times) <= 2
    looking = "application_name LIKE '%page' AND datname = current_database()"
    assert stack.query(f"SELECT count(*) AS n FROM pg_stat_activity WHERE {looking}")[0]["n"] <= 1
