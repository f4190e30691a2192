"""Nobody's words and nobody's keys are told: marked ones are sent through everything, and everything told is searched.

At `debug`, as JSON, with OTLP and the page for Prometheus, by requests that go well and by all that fail. The ledger is
searched too: there a thread's words have their tables, and nothing else has anything.
"""

import asyncio
import base64
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest

from behest_ledger.telemetry.logs import OUR_LOGGERS
from conftest import Server, execute, own_database
from stack import Project, Stack, running_stack, wait_until
from telemetry.receiver import Received, http_receiver
from telemetry.talkative_provider import WAYS, talkative_provider

FAST: Any = {"OTEL_METRIC_EXPORT_INTERVAL": "200", "OTEL_BSP_SCHEDULE_DELAY": "100"}
REPLIES = {"generation", "generation_chunk", "thread_message"}
KEPT = {
    "prompt": REPLIES,
    "answer": REPLIES,
    "system prompt": REPLIES | {"project"},
    "tool": REPLIES,
    "provider key": REPLIES,
}
"""What the ledger is meant to hold, and where: messages and replies, and this provider repeats all that it gets."""


def mark(kind: str) -> str:
    return f"marked-{kind.replace(' ', '-')}-{secrets.token_hex(8)}"


@dataclass
class Told:
    """A stack through which the secrets went, and what it told while they did."""

    stack: Stack
    received: Received
    secrets: dict[str, str]
    statuses: dict[str, int] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    page: str = ""
    log: str = ""


def with_login(dsn: str, name: str, password: str) -> str:
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{name}:{password}@{parts.netloc.rpartition('@')[2]}"))


def sent_through(told: Told, url: str) -> Project:
    """Everything that a client can do, well and badly, with secrets in every place that takes one."""
    stack, marked = told.stack, told.secrets
    project = stack.project(
        upstream_url=url,
        upstream="  credentials: {env: MARKED_PROVIDER_KEY}",
        project=f"  systemPrompt: {marked['system prompt']}",
    )
    marked["API key"] = project.api_key
    for way in WAYS:
        for stream in (True, False) if way in ("said", "refused", "failed") else (True,):
            marked[f"token of {way} {stream}"] = token = project.mint(user="ann", session=f"s-{stream}")
            answer = ask(project, token, marked, way=way, stream=stream, thread=stream)
            told.statuses[f"{way} {stream}"] = answer.status_code
    project = stack.project(limit_usd="0.00000001")
    marked["API key of the poor"] = project.api_key
    marked["token of the poor"] = token = project.mint()
    told.statuses["refused by the budget"] = ask(project, token, marked).status_code
    told.statuses["false token"] = ask(project, marked["false token"], marked).status_code
    told.statuses["false key"] = ask(project, marked["false key"], marked).status_code
    forged = token.rpartition(".")[0] + "." + base64.urlsafe_b64encode(marked["signature"].encode()).decode().strip("=")
    told.statuses["forged token"] = ask(project, forged, marked).status_code
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    for name, content in (
        ("no JSON", marked["prompt"].encode()),
        ("another shape", json.dumps({"messages": marked["prompt"]}).encode()),
        ("a broken text", b'{"messages": "' + marked["prompt"].encode() + b"\xff"),
    ):
        answer = httpx.post(stack.base_url + "/v1/chat/completions", headers=headers, content=content)
        told.statuses[name] = answer.status_code
    answer = httpx.get(f"{stack.base_url}/v1/{marked['path']}?key={marked['query']}", headers=headers)
    told.statuses["no such path"] = answer.status_code
    return project


def ask(
    project: Project,
    token: str,
    marked: dict[str, str],
    *,
    way: str = "said",
    stream: bool = True,
    thread: bool = False,
) -> httpx.Response:
    headers = {
        "Authorization": f"Bearer {token}",
        "Cookie": f"id={marked['cookie']}",
        "Baggage": f"account={marked['baggage']}",
        "X-Api-Key": marked["header"],
        "Idempotency-Key": f"{marked['idempotency key']}-{way}-{stream}",
        **({"X-Thread-Id": way} if thread else {}),
    }
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"{way} {marked['prompt']}"}],
        "tools": [{"type": "function", "function": {"name": "look", "description": marked["tool"], "parameters": {}}}],
        "stream": stream,
    }
    return httpx.post(project.stack.base_url + "/v1/chat/completions", headers=headers, json=body, timeout=30)


def tables_of(stack: Stack) -> dict[str, str]:
    """Every table of the ledger, as text."""
    names = stack.query(
        "SELECT relname FROM pg_class WHERE relnamespace = 'ledger'::regnamespace"
        " AND relkind IN ('r', 'p') AND NOT relispartition"
    )
    found: dict[str, str] = {}
    for name in (row["relname"] for row in names):
        rows = stack.query(f"SELECT to_jsonb(t)::text AS row FROM ledger.{name} t")
        found[name] = "\n".join(row["row"] for row in rows)
    return found


def without_the_ledger(told: Told, project: Project, template: Server, login: str) -> None:
    """The database refuses the sidecar's login: what it says of that is searched as well."""
    token = told.secrets["token of the poor"]
    ends = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{login}'"
    asyncio.run(execute(template.dsn, f"ALTER ROLE {login} NOLOGIN", ends))
    told.statuses["no ledger"] = ask(project, token, told.secrets).status_code
    wait_until(lambda: "WARN" in told.stack.log.read_text().upper(), what="a word about the ledger")
    asyncio.run(execute(template.dsn, f"ALTER ROLE {login} LOGIN"))


@pytest.fixture(scope="module")
def told(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    kinds = ("prompt", "answer", "system prompt", "provider key", "false token", "signature", "cookie", "baggage")
    marked = {kind: mark(kind) for kind in (*kinds, "header", "idempotency key", "tool", "path", "query", "password")}
    marked["false key"] = "behest_sk_live_" + secrets.token_hex(16)
    login, folder = f"behest_marked_{os.getpid()}", tmp_path_factory.mktemp("secrets")
    asyncio.run(execute(template.dsn, f"CREATE ROLE {login} LOGIN SUPERUSER PASSWORD '{marked['password']}'"))
    with (
        http_receiver() as received,
        talkative_provider(marked["answer"]) as url,
        own_database(template, "secrets") as dsn,
        running_stack(
            with_login(dsn, login, marked["password"]),
            folder,
            **FAST,
            OTEL_EXPORTER_OTLP_ENDPOINT=received.endpoint,
            OTEL_EXPORTER_OTLP_HEADERS=f"api-key={marked['header']}",
            BEHEST_LOG_LEVEL="debug",
            BEHEST_LOG_FORMAT="json",
            MARKED_PROVIDER_KEY=marked["provider key"],
        ) as stack,
    ):
        marked["signing key"] = "".join((folder / "signing.pem").read_text().splitlines()[1:-1])[40:80]
        found = Told(stack, received, marked)
        project = sent_through(found, url)
        found.tables = tables_of(stack)
        without_the_ledger(found, project, template, login)
        found.page = httpx.get(stack.admin_url + "/metrics").text
        stack.sidecar.terminate()
        stack.sidecar.wait(20)
        found.log = stack.log.read_text()
        yield found
    asyncio.run(execute(template.dsn, f"DROP ROLE {login}"))


def forms(secret: str) -> list[str]:
    """A secret as it might be told: plain, in base64, in hexadecimal; of a token its parts."""
    plain = [secret, *(part for part in secret.split(".")[1:] if len(part) > 20)]
    data = secret.encode()
    # Base64 of a text within another one begins at one of three places: what is the same in all is the middle.
    within = [base64.b64encode(b"\0" * at + data).decode()[4:-4] for at in range(3)]
    return [*plain, *within, data.hex()]


def leaks(told: Told, text: str) -> list[str]:
    return sorted(kind for kind, secret in told.secrets.items() if any(form in text for form in forms(secret)))


def test_the_secrets_were_sent_and_all_ways_to_fail_were_gone(told: Told) -> None:
    assert told.statuses == {
        "said True": 200, "said False": 200, "refused True": 400, "refused False": 400,
        "failed True": 502, "failed False": 502, "garbage True": 200, "broken True": 200, "error_event True": 200,
        "no_json True": 502, "cut True": 200, "refused by the budget": 402, "false token": 401, "false key": 401,
        "forged token": 401, "no JSON": 400, "another shape": 400, "a broken text": 400, "no such path": 404,
        "no ledger": 503,
    }  # fmt: skip
    assert told.received.spans
    assert "behest.cost" in told.received.metrics()
    lines = [json.loads(line) for line in told.log.splitlines()]
    assert {line.get("outcome") for line in lines} >= {"completed", "upstream_error"}


def test_no_line_of_the_log_has_a_secret(told: Told) -> None:
    assert leaks(told, told.log) == []


def test_no_span_and_no_metric_that_is_pushed_has_a_secret(told: Told) -> None:
    assert leaks(told, "\n".join(raw.decode("latin-1") for raw in told.received.raw)) == []


def test_the_page_for_prometheus_has_no_secret(told: Told) -> None:
    assert "behest_cost_USD_total" in told.page
    assert leaks(told, told.page) == []


def test_the_ledger_has_the_words_of_threads_where_they_belong_and_no_key_anywhere(told: Told) -> None:
    found = {table: leaks(told, text) for table, text in told.tables.items()}
    assert "prompt" in found["thread_message"], "else nothing would be found elsewhere either"
    for table, kinds in found.items():
        assert [kind for kind in kinds if table not in KEPT.get(kind, ())] == [], table


def test_the_search_finds_a_secret_in_each_of_its_forms(told: Told) -> None:
    secret = told.secrets["prompt"]
    for text in (f"x{secret}y", base64.b64encode(f"ab{secret}c".encode()).decode(), json.dumps({"a": secret})):
        assert leaks(told, text) == ["prompt"]


def test_libraries_stay_quiet_at_debug() -> None:
    from behest_ledger.telemetry.logs import configure

    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        configure("debug", "json")
        assert {logging.getLogger(name).getEffectiveLevel() for name in OUR_LOGGERS} == {logging.DEBUG}
        for library in ("asyncio", "h2", "hpack", "hypercorn", "asyncpg", "httpx", "opentelemetry", "urllib3", "kopf"):
            assert logging.getLogger(library).getEffectiveLevel() >= logging.WARNING, library
    finally:
        logging.getLogger().handlers[:], _ = before
        logging.getLogger().setLevel(before[1])
        for name in OUR_LOGGERS:
            logging.getLogger(name).setLevel(logging.NOTSET)
