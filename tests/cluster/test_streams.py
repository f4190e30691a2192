"""What people see and do while answers stream: budgets that move, thresholds told as Events, suspension, deletion."""

import json
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import httpx
import openai
import pytest

from cluster.control_plane import ControlPlane
from cluster.operator_process import condition, eventually
from cluster.pods import Pod
from cluster.release import Release, running_release
from cluster.sql import rows

ENDED_IN_TIME_S = 20.0
"""Two seconds on a machine that does nothing else; one that is ten times as slow keeps it. The stream takes minutes."""
SLOW = {"output_tokens": 100_000, "chunk_interval_ms": 5}
STREAMS_MAX = 50


@pytest.fixture(scope="module")
def release(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    with running_release(control_plane, tmp_path_factory.mktemp("streams"), "s") as running:
        yield running


@dataclass
class Stream:
    """An answer that a client reads in a thread of its own."""

    client: openai.OpenAI
    sim: dict[str, Any]
    chunks: int = 0
    last_s: float = 0.0
    end: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def read(self) -> None:
        try:
            for _ in self.client.chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": "hello"}],
                stream=True,
                extra_body={"sim": self.sim},
            ):
                self.chunks += 1
                self.last_s = time.monotonic()
            self.end = "completed"
        except openai.APIStatusError as error:
            self.end = f"{error.status_code} {error.code}"
        except openai.APIError as error:
            self.end = str(error.code)
            self.details = error.body["details"] if isinstance(error.body, dict) else {}
        except (httpx.HTTPError, httpx.StreamError) as error:
            self.end = type(error).__name__


@contextmanager
def streaming(client: openai.OpenAI, sim: dict[str, Any]) -> Generator[Stream]:
    """A stream that has begun; at the end of the block its client goes, if it is still there."""
    stream = Stream(client, sim)
    thread = threading.Thread(target=stream.read, daemon=True)
    thread.start()
    eventually(lambda: stream.chunks or stream.end, what="the first chunk")
    assert not stream.end, stream
    try:
        yield stream
    finally:
        client.close()
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def application(release: Release, prefix: str, **budget: Any) -> Generator[tuple[str, Pod]]:
    """A namespace whose budget is in force, and a pod's sidecar in it; its containers are the test itself."""
    namespace = release.application(prefix)
    release.plane.apply(*release.resources(**budget), namespace=namespace)
    eventually(lambda: condition(release.plane, "budget", "shop", namespace, "Programmed", "True"), what="the budget")
    # The operator tells how it stands in a round of its own, after it was carried into the ledger.
    eventually(lambda: columns(release.plane, namespace)["REMAINING"], what="how the budget stands")
    pod = release.injected(namespace)
    pod.object["spec"]["containers"] = []
    try:
        pod.start()
        with client_of(pod) as client:
            eventually(lambda: client.models.list().data, what="the first answer")
        yield namespace, pod
    finally:
        pod.stop()
    assert pod.containers["behest"].process.returncode == 0
    assert "Traceback" not in pod.containers["behest"].text()


def client_of(pod: Pod) -> openai.OpenAI:
    return openai.OpenAI(base_url=pod.url(8079) + "/v1", api_key="behest-pod", max_retries=0)


def columns(plane: ControlPlane, namespace: str) -> dict[str, str]:
    """The line of `kubectl get budgets`, by its heads. A scope in words would break it: here it has none."""
    heads, line = plane.kubectl("get", "budgets", "--namespace", namespace).splitlines()
    # The columns begin where their heads do: LIMIT has a blank in its values.
    starts = [(head, heads.index(head)) for head in heads.split()]
    ends = [start for _, start in starts[1:]] + [len(line)]
    return {head: line[start:end].strip() for (head, start), end in zip(starts, ends, strict=True)}


def test_kubectl_shows_spent_held_and_remaining_move_while_a_stream_runs(
    control_plane: ControlPlane, release: Release
) -> None:
    with application(release, "moves", limit="0.05") as (namespace, pod):
        seen: list[tuple[Decimal, Decimal, Decimal]] = []

        def look() -> tuple[Decimal, Decimal, Decimal]:
            line = columns(control_plane, namespace)
            spent, held, left = (Decimal(line[name]) for name in ("SPENT", "HELD", "REMAINING"))
            assert line["LIMIT"] == "0.05 USD"
            if not seen or seen[-1] != (spent, held, left):
                seen.append((spent, held, left))
            return spent, held, left

        with streaming(client_of(pod), SLOW) as long:
            eventually(lambda: look()[1] > 0, what="a hold")
            held = look()[1]
            eventually(lambda: look()[1] != held, what="another hold")
            with client_of(pod) as client:
                client.chat.completions.create(
                    model="gpt-4o-mini",
                    messages=[{"role": "user", "content": "hello"}],
                    extra_body={"sim": {"output_tokens": 2000}},
                )
            eventually(lambda: look()[0] > 0, what="what the other request cost")
            assert not long.end
            assert look()[1] > 0
        eventually(lambda: look()[1] == 0, what="the end of the hold")
        final = look()
        assert all(spent + held + left == Decimal("0.05") for spent, held, left in seen), seen
        assert [spent for spent, _, _ in seen] == sorted(spent for spent, _, _ in seen), "what is spent is spent"
        assert len(seen) >= 4, seen
        assert final[0] > Decimal("0.0012"), "both streams were charged"


def test_each_threshold_is_one_event_and_exhaustion_is_a_phase_and_a_condition(
    control_plane: ControlPlane, release: Release
) -> None:
    with application(release, "alerts", limit="0.01", alertThresholds=[25, 50, 75, 100]) as (namespace, pod):
        with client_of(pod) as client:
            ends: list[str] = []
            while not ends or not ends[-1].startswith("402"):
                assert len(ends) < STREAMS_MAX, ends
                stream = Stream(client, {"output_tokens": 3000})
                stream.read()
                ends.append(stream.end)
        exhausted = eventually(
            lambda: (
                (found := condition(control_plane, "budget", "shop", namespace, "Exhausted"))
                and found["status"] == "True"
                and found
            ),
            what="the condition Exhausted",
        )
        assert exhausted["reason"] == "NothingLeft"
        assert columns(control_plane, namespace)["PHASE"] == "Exhausted"

        def told() -> dict[str, list[str]]:
            found: dict[str, list[str]] = {}
            for event in release.events(namespace):
                found.setdefault(event["reason"], []).append(event["message"])
            return found

        eventually(lambda: len(told().get("BudgetWarning", [])) >= 3, what="the Events of the thresholds")
        eventually(lambda: "BudgetExhausted" in told(), what="the Event of the end")
        reached = sorted(message.partition(":")[0] for message in told()["BudgetWarning"])
        # What is left at the end pays for no request, and so the last threshold may never be reached.
        assert set(reached) - {"100 % reached"} == {"25 % reached", "50 % reached", "75 % reached"}
        assert len(reached) == len(set(reached)), "each threshold is told once"
        assert len(told()["BudgetExhausted"]) == 1
        # It is enough again: the phase goes back, and the next end is told anew.
        control_plane.apply(
            *release.resources(limit="100", alertThresholds=[25, 50, 75, 100])[-1:], namespace=namespace
        )
        eventually(lambda: columns(control_plane, namespace)["PHASE"] == "Active", what="the phase Active")


@pytest.mark.parametrize("kind", ["Budget", "Project"])
def test_suspension_ends_live_streams(control_plane: ControlPlane, release: Release, kind: str) -> None:
    with application(release, "stop", limit="100") as (namespace, pod), streaming(client_of(pod), SLOW) as stream:
        control_plane.kubectl(
            "patch", kind.lower(), "shop", "--namespace", namespace, "--type=merge",
            "--patch", json.dumps({"spec": {"suspended": True}}),
        )  # fmt: skip
        switched_s = time.monotonic()
        eventually(lambda: stream.end, what="the end of the stream")
        assert stream.end == "forbidden"
        assert (stream.details["reason"], stream.details["what"]) == ("suspended", kind.lower())
        assert stream.last_s - switched_s < ENDED_IN_TIME_S
        with client_of(pod) as client:
            refused = Stream(client, {})
            refused.read()
        assert refused.end == "403 forbidden"
        if kind == "Budget":
            eventually(lambda: columns(control_plane, namespace)["PHASE"] == "Suspended", what="the phase Suspended")


def test_a_budget_that_is_deleted_while_it_pays_a_stream_goes_and_what_it_held_comes_back(
    control_plane: ControlPlane, release: Release
) -> None:
    with application(release, "gone", limit="100") as (namespace, pod):
        with streaming(client_of(pod), SLOW) as stream:
            sql = "SELECT state FROM ledger.hold WHERE tenant_id = $1"
            eventually(lambda: rows(release.dsn, sql, namespace), what="a hold")
            control_plane.kubectl("delete", "budget", "shop", "--namespace", namespace, "--timeout=90s")
            assert control_plane.kubectl("get", "budgets", "--namespace", namespace, "--output=name") == ""
            chunks = stream.chunks
            eventually(lambda: stream.chunks > chunks + 100 or stream.end, what="more of the answer")
            assert not stream.end, "without the budget nothing limits the project: the stream goes on"
        balances = """
            SELECT w.spent > 0 AS charged, w.held + w.suspense AS held, b.deleted_at IS NOT NULL AS deleted
            FROM ledger.budget_window w JOIN ledger.budget b USING (tenant_id, budget_id)
            WHERE w.tenant_id = $1 AND b.name = 'shop'
        """
        expected = [{"charged": True, "held": 0, "deleted": True}]
        eventually(lambda: rows(release.dsn, balances, namespace) == expected, what="the end of the hold")
