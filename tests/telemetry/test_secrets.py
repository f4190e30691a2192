"""Nobody's words and nobody's keys are told: marked ones are sent through everything, and everything told is searched.

At `debug`, as JSON, with OTLP and the page for Prometheus, by requests that go well and by all that fail. The ledger is
searched too: there a thread's words have their tables, and nothing else has anything. Then the keeper works on all of
that, by what goes well and by what fails, and what it tells is searched.
"""

import asyncio
import base64
import json
import logging
import os
import secrets
import subprocess
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest

from behest_ledger.store.pool import connect
from behest_ledger.telemetry.logs import OUR_LOGGERS
from behest_proxy.cli.preflight import free_port
from conftest import Server, execute, own_database
from ledger.books import Books
from ledger.sidecars import Sidecar
from stack import BEHEST, Project, Stack, process, running_stack, wait_until
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
    keeper: "Keeper | None" = None


@dataclass
class Keeper:
    """A keeper that looked after the ledger in which the secrets are, and what it told."""

    dsn: str
    metrics: str
    received: Received
    log: Path
    page: str = ""
    refused: str = ""

    def has_said(self, words: str) -> None:
        wait_until(lambda: words in self.log.read_text(), what=f"the keeper's {words!r}")


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


@contextmanager
def kept(told: Told, dsn: str, folder: Path) -> Generator[Keeper]:
    """A keeper that has everything to do: a dead sidecar's requests, a budget at its threshold, threads too old."""
    address, log = f"127.0.0.1:{free_port(0)}", folder / "keeper.log"
    how = ["--interval", "0.1", "--grace-hours", "0", "--policy", "hold", "--metrics", address]
    keep = [*BEHEST, "ledger", "keep", *how]
    asyncio.run(left_to_do(dsn, told.secrets["row"]))
    with http_receiver() as received:
        environment: dict[str, str] = {
            **FAST,
            "BEHEST_DATABASE_URL": dsn,
            "OTEL_EXPORTER_OTLP_ENDPOINT": received.endpoint,
            "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={told.secrets['header']}",
        }
        with process(keep, environment=environment, log=log) as child:
            keeper = Keeper(dsn, address, received, log)
            # The row that it cannot write is in what PostgreSQL says of it, but for its message.
            keeper.has_said('violates check constraint "nothing_any_more"')
            asyncio.run(execute(dsn, "ALTER TABLE ledger.request DROP CONSTRAINT nothing_any_more"))
            keeper.has_said("were charged by policy hold")
            keeper.has_said("threads that were not used for their time")
            wait_until(lambda: CHARGED in page_of(address), what="the keeper's count of what it charged")
            yield keeper
            keeper.page = page_of(address)
            child.terminate()
            child.wait(20)
        # A `/` in a password, not encoded: what reads the URL takes the part before it for a port, and would say so.
        password = told.secrets["password"]
        told.secrets["part of the password"] = password[:-1]
        broken = dsn.replace(password, password[:-1] + "/" + password[-1:])
        ended = subprocess.run([*keep, "--database-url", broken], capture_output=True, text=True, timeout=30)
        keeper.refused = f"{ended.returncode} {ended.stdout}{ended.stderr}"


CHARGED = "behest_keeper_policy_charges_total 1.0"


def page_of(address: str) -> str:
    return httpx.get(f"http://{address}/metrics").text


async def left_to_do(dsn: str, row: str) -> None:
    connection = await connect(dsn)
    try:
        books = Books(dsn, connection)
        await books.budget("alerted", 100, thresholds=[1])
        sidecar = await Sidecar.start(books)
        await sidecar.admitted(need=2, thread=row)
        await sidecar.die()
        await connection.execute("UPDATE ledger.thread SET updated_at = now() - interval '1 year'")
        await connection.execute("ALTER TABLE ledger.request ADD CONSTRAINT nothing_any_more CHECK (false) NOT VALID")
    finally:
        await connection.close()


def without_the_ledger(told: Told, project: Project, template: Server, login: str) -> None:
    """The database refuses the sidecar's login: what it says of that is searched as well."""
    token = told.secrets["token of the poor"]
    ends = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{login}'"
    asyncio.run(execute(template.dsn, f"ALTER ROLE {login} NOLOGIN", ends))
    told.statuses["no ledger"] = ask(project, token, told.secrets).status_code
    wait_until(lambda: "WARN" in told.stack.log.read_text().upper(), what="a word about the ledger")
    if told.keeper is not None:
        told.keeper.has_said("is not permitted to log in")
    asyncio.run(execute(template.dsn, f"ALTER ROLE {login} LOGIN"))


@pytest.fixture(scope="module")
def told(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    kinds = ("prompt", "answer", "system prompt", "provider key", "false token", "signature", "cookie", "baggage")
    others = ("header", "idempotency key", "tool", "path", "query", "password", "row")
    marked = {kind: mark(kind) for kind in (*kinds, *others)}
    marked["false key"] = "behest_sk_live_" + secrets.token_hex(16)
    login, folder = f"behest_marked_{os.getpid()}", tmp_path_factory.mktemp("secrets")
    asyncio.run(execute(template.dsn, f"CREATE ROLE {login} LOGIN SUPERUSER PASSWORD '{marked['password']}'"))
    with (
        http_receiver() as received,
        talkative_provider(marked["answer"]) as url,
        own_database(template, "secrets") as dsn,
        running_stack(
            own_dsn := with_login(dsn, login, marked["password"]),
            folder,
            **FAST,
            OTEL_EXPORTER_OTLP_ENDPOINT=received.endpoint,
            OTEL_EXPORTER_OTLP_HEADERS=f"api-key={marked['header']}",
            BEHEST_LOG_LEVEL="debug",
            BEHEST_LOG_FORMAT="json",
            BEHEST_PROVIDER_KEY_ENV=f"MARKED_PROVIDER_KEY={url.removesuffix('/v1')}",
            MARKED_PROVIDER_KEY=marked["provider key"],
        ) as stack,
    ):
        marked["signing key"] = "".join((folder / "signing.pem").read_text().splitlines()[1:-1])[40:80]
        found = Told(stack, received, marked)
        project = sent_through(found, url)
        found.tables = tables_of(stack)
        with kept(found, own_dsn, folder) as found.keeper:
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


def test_the_keeper_did_everything_and_told_no_secret(told: Told) -> None:
    assert told.keeper is not None
    log = told.keeper.log.read_text()
    for did in ("is dead: fenced", "went to suspense", "alerted", "is not permitted to log in"):
        assert did in log, log
    assert leaks(told, log) == []
    assert CHARGED in told.keeper.page
    assert leaks(told, told.keeper.page) == []
    assert "behest.keeper.policy_charges" in told.keeper.received.metrics()
    assert leaks(told, "\n".join(raw.decode("latin-1") for raw in told.keeper.received.raw)) == []


def test_a_url_that_cannot_be_read_is_refused_without_being_told(told: Told) -> None:
    assert told.keeper is not None
    assert told.keeper.refused.startswith("2 behest: ")
    assert "the database's URL cannot be read: write %2F for /" in told.keeper.refused
    assert leaks(told, told.keeper.refused) == []


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
