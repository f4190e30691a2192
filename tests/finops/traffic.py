"""Requests of two teams with two models that end in every usual way, and a Prometheus that sees them come."""

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from behest_ledger.telemetry.meter import Meter
from behest_ledger.telemetry.prometheus import serve_metrics
from behest_operator.certificates import renewed
from behest_operator.watch import OperatorWatch
from behest_proxy.cli.preflight import free_port
from conftest import Server, execute, own_database
from finops.prometheus import SCRAPE_S, Prometheus, prometheus
from readers import Reader
from stack import BEHEST, Project, Stack, process, running_stack, wait_until, within_one

TEAMS = {"search": "cc-7", "ads": "cc-9"}
MODELS = ("gpt-4o-mini", "gpt-4o")
QUESTION = [{"role": "user", "content": "Tell me a story."}]
LOGIN = f"behest_grafana_{os.getpid()}"
GRANTS = (
    f"CREATE ROLE {LOGIN} LOGIN PASSWORD 'of-grafana'",
    f"GRANT USAGE ON SCHEMA ledger TO {LOGIN}",
    (
        "GRANT SELECT ON ledger.request, ledger.correction, ledger.request_now, ledger.budget, ledger.budget_window"
        f" TO {LOGIN}"
    ),
    f"GRANT EXECUTE ON FUNCTION ledger.session_tenants_v1() TO {LOGIN}",
    f"INSERT INTO ledger.tenant_role (role_name) VALUES ('{LOGIN}')",
)
"""What docs/telemetry.md says of Grafana's login."""


POOR = """
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: poor, namespace: {namespace}}}
spec:
  scope: {{project: app, user: poor}}
  limit: {{amount: "0.0000001", currency: USD}}
  window: {{period: Day}}
"""

HOURLY = """
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {{name: hourly, namespace: {namespace}}}
spec:
  scope: {{project: app}}
  limit: {{requests: 1000}}
  window: {{period: Hour}}
"""
RULES = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "behest" / "alerts" / "behest.yaml"
POD = {"metadata": {"labels": {"behest.ai/inject": "true"}, "annotations": {"behest.ai/project": "shop"}},
       "spec": {"containers": [{"name": "app", "image": "app"}]}}  # fmt: skip
REVIEWED, RECONCILED = 3, 4


@dataclass
class Seen:
    stack: Stack
    prometheus: Prometheus
    projects: dict[str, Project]
    """By team."""
    reader_dsn: str
    """As Grafana connects."""
    since_s: float = 0.0
    """What came later is in Prometheus with a sample before it."""

    def window(self) -> str:
        """A range that begins there, for an expression that is asked now."""
        return f"{round((time.time() - self.since_s) * 1000) + 200}ms"

    def told_too_much(self) -> float:
        """By how much `increase` may pass what came: it goes on to the window's ends, a scrape's time at each."""
        seconds = time.time() - self.since_s
        return seconds / (seconds - 3 * SCRAPE_S)

    def ledger(self, sql: str) -> Any:
        """One value, of the requests since then where it says `{since}`."""
        ((value,),) = [row.values() for row in self.stack.query(sql.format(since=f"to_timestamp({self.since_s})"))]
        return value


def ask(project: Project, session: str, user: str = "ann", **body: Any) -> httpx.Response:
    return httpx.post(
        project.stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {project.mint(user=user, session=session)}"},
        json={"messages": QUESTION, **body},
        timeout=30,
    )


def round_of(project: Project, session: str, times: int) -> None:
    """So many of each: answers of both models, a client that leaves, a provider that fails, and one that is refused."""
    for number in range(times):
        for model in MODELS:
            sim = {"output_tokens": 5 + number}
            assert ask(project, session, model=model, stream=True, sim=sim).status_code == 200
        assert ask(project, session, sim={"status": 500}).status_code == 502
        leave(project, session)
        assert ask(project, session, user="poor").status_code == 402


def leave(project: Project, session: str) -> None:
    token = project.mint(user="ann", session=session)
    body = {"messages": QUESTION, "stream": True, "sim": {"output_tokens": 500, "chunk_interval_ms": 5}}
    url, headers = project.stack.base_url + "/v1/chat/completions", {"Authorization": f"Bearer {token}"}
    with httpx.stream("POST", url, headers=headers, json=body, timeout=30) as answer:
        for number, _ in enumerate(answer.iter_lines()):
            if number > 10:
                return


def ended(seen: Seen) -> float:
    return seen.prometheus.number("sum(behest_stream_outcomes_total)")


def settle(seen: Seen, number: int) -> None:
    """Wait until the ledger has so many requests, and Prometheus has seen them twice."""
    wait_until(lambda: seen.ledger("SELECT count(*)::int FROM ledger.request") == number, what=f"{number} requests")
    wait_until(lambda: ended(seen) == number, what="Prometheus's look at them")
    seen.prometheus.wait_for_samples(time.time() + SCRAPE_S)


@contextmanager
def keeper(dsn: str, folder: Path) -> Generator[str]:
    """One that tells of itself: its address."""
    address = f"127.0.0.1:{free_port(0)}"
    arguments = [*BEHEST, "ledger", "keep", "--interval", "0.2", "--metrics", address, "--database-url", dsn]
    with process(arguments, environment={}, log=folder / "keeper.log"):
        yield address


@contextmanager
def webhook(folder: Path) -> Generator[tuple[str, Callable[[], None]]]:
    """One that tells of itself: the address of its metrics, and how to let it look at a pod."""
    address, probes = f"127.0.0.1:{free_port(0)}", f"127.0.0.1:{free_port(0)}"
    certificates = renewed(None, names=["localhost"], now=datetime.now(UTC))
    (folder / "tls.crt").write_bytes(certificates.leaf)
    (folder / "tls.key").write_bytes(certificates.leaf_key)
    (folder / "template.json").write_text('{"image": "behest"}')
    environment = {
        "BEHEST_INJECTION_TEMPLATE": str(folder / "template.json"),
        "BEHEST_WEBHOOK_TLS_DIR": str(folder),
        "BEHEST_WEBHOOK_BIND": address,
        "BEHEST_WEBHOOK_PROBE_BIND": probes,
    }
    trusted = ssl.create_default_context(cadata=certificates.ca_bundle.decode())
    request = {"uid": "1", "kind": {"kind": "Pod"}, "namespace": "demo", "object": POD}
    review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}

    def look() -> None:
        url = f"https://localhost:{address.rpartition(':')[2]}/inject"
        assert httpx.post(url, json=review, verify=trusted).json()["response"]["patch"]

    with process([*BEHEST, "webhook"], environment=environment, log=folder / "webhook.log"):
        yield probes, look


@contextmanager
def operator() -> Generator[tuple[str, OperatorWatch]]:
    """An operator's instruments at an address; what it does itself needs a cluster."""
    meter, address = Meter(), f"127.0.0.1:{free_port(0)}"
    end = serve_metrics(meter, address)
    try:
        yield address, OperatorWatch(meter)
    finally:
        end()


@contextmanager
def traffic(template: Server, folder: Path) -> Generator[Seen]:
    """A round of requests, so that every series is there, and then the ones that count; one goes on meanwhile."""
    within_one(3600, takes_s=180)
    with (
        own_database(template, "dashboards") as dsn,
        running_stack(dsn, folder) as stack,
        keeper(dsn, folder) as kept_at,
        webhook(folder) as (reviewed_at, look),
        operator() as (operated_at, operated),
        prometheus(
            folder,
            {
                "behest": [urlsplit(stack.admin_url).netloc],
                "keeper": [kept_at],
                "webhook": [reviewed_at],
                "operator": [operated_at],
            },
            RULES,
        ) as running,
    ):
        asyncio.run(execute(dsn, *GRANTS))
        parts = urlsplit(dsn)
        login = urlunsplit(parts._replace(netloc=f"{LOGIN}:of-grafana@{parts.netloc.rpartition('@')[2]}"))
        projects = {
            team: stack.project(project=f"  attribution: {{team: {team}, costCenter: {center}}}", limit_usd="0.9")
            for team, center in TEAMS.items()
        }
        stack.apply("---".join(POOR.format(namespace=project.namespace) for project in projects.values()))
        stack.apply(HOURLY.format(namespace=projects["ads"].namespace))
        seen = Seen(stack, running, projects, login)
        try:
            for team in TEAMS:
                round_of(projects[team], "first", 1)
            look()
            operated.reconciled("Budget", "accepted", 0.01)
            settle(seen, 4 * len(TEAMS))
            seen.since_s = time.time()
            # What comes before the first sample in the window would be lost to `increase`.
            running.wait_for_samples(seen.since_s)
            for times, team in enumerate(TEAMS, start=2):
                round_of(projects[team], f"session-{team}", times)
            for _ in range(REVIEWED):
                look()
            for _ in range(RECONCILED):
                operated.reconciled("Budget", "accepted", 0.01)
            long = Reader(
                stack.base_url, projects["ads"].mint(session="long"), output_tokens=400, chunk_interval_ms=1000
            )
            long.begun()
            settle(seen, 4 * len(TEAMS) + 4 * (2 + 3))
            yield seen
        finally:
            asyncio.run(execute(dsn, f"DROP OWNED BY {LOGIN}"))
            asyncio.run(execute(template.dsn, f"DROP ROLE {LOGIN}"))
