"""Behind nginx and Envoy, configured as docs/behind-a-proxy.md shows, a stream is what it is without them."""

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from fronts.caller import WIRES, Call, Wire, call
from fronts.programs import Front, envoy, nginx
from stack import Project, Stack, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]
PACES = [(200, 10), (100, 50), (50, 200)]
"""Chunks, and ms from one to the next. On a busy machine some of them meet on their way: then they come slower. What a
proxy buffers is never separate, at any pace."""
SEPARATE_LEAST = 0.9
ABORTS = 60
AT_ONCE = 10
ABORT_MOST_MS = 10_000.0
"""Sooner than anything but the abort itself could end them: the beat of an idle stream comes after 15 s. How long it
really takes is what is printed; 100 ms are promised."""


@pytest.fixture(scope="module", params=[nginx, envoy], ids=["nginx", "Envoy"])
def front(
    request: pytest.FixtureRequest, stack: Stack, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    page = repository / "docs" / "behind-a-proxy.md"
    with request.param(page, tmp_path_factory.mktemp("front"), stack.base_url) as started:
        yield started


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> Wire:
    return cast("Wire", request.param)


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


def _call(front: Front, wire: Wire, token: str, *, leave_after: int | None = None, **sim: Any) -> Any:
    body = {"messages": QUESTION, "sim": sim}
    return call(front.url, wire, token, body, certificate=front.certificate, leave_after=leave_after)


def test_events_come_one_by_one(front: Front, wire: Wire, project: Project) -> None:
    token = project.mint()
    shares: list[float] = []
    for chunks, interval_ms in PACES:
        made: Call = asyncio.run(_call(front, wire, token, output_tokens=chunks, chunk_interval_ms=interval_ms))
        assert made.events[-1] == b"[DONE]"
        assert len(made.events) >= chunks
        shares.append(made.reads / len(made.events))
        told = f"{shares[-1]:.0%} of {chunks} chunks, one each {interval_ms} ms, in reads of their own"
        print(f"\n{front.name}, {wire}: {told}")
        if shares[-1] >= SEPARATE_LEAST:
            return
    pytest.fail(f"events come together at every pace: {shares}")


def test_a_client_that_leaves_stops_the_provider(front: Front, wire: Wire, project: Project) -> None:
    token = project.mint()
    cancelled: dict[str, int] = {}

    def seen(calls: list[Call]) -> bool:
        for one in calls:
            row = project.stack.sim_request(one.request_id)
            if row is None or not row["cancelled_monotonic_ns"]:
                return False
            cancelled[one.request_id] = row["cancelled_monotonic_ns"]
        return True

    async def scenario() -> list[Call]:
        made: list[Call] = []
        for _ in range(ABORTS // AT_ONCE):
            work = [
                _call(front, wire, token, leave_after=5, output_tokens=100_000, chunk_interval_ms=20)
                for _ in range(AT_ONCE)
            ]
            calls: list[Call] = await asyncio.gather(*work)
            # A stream's reset must suffice: its connection is closed only after the provider saw it.
            await asyncio.to_thread(wait_until, partial(seen, calls), what="the provider's seeing all cancels")
            for one in calls:
                await one.close()
            made += calls
        return made

    made = asyncio.run(scenario())
    left = {one.request_id: one.left_ns for one in made}
    assert len(left) == ABORTS
    latencies_ms = sorted((at_ns - left[request_id]) / 1e6 for request_id, at_ns in cancelled.items())
    print(
        f"\n{front.name}, {wire}: abort to the provider's seeing it p50 {latencies_ms[ABORTS // 2]:.1f} ms,"
        f" p99 {latencies_ms[int(ABORTS * 0.99)]:.1f} ms, over {ABORTS} streams"
    )
    assert latencies_ms[-1] < ABORT_MOST_MS


def test_a_stream_that_its_budget_ends_says_so(front: Front, wire: Wire, stack: Stack) -> None:
    # 100 tokens of output at 0.6 USD a million, and what the question costs.
    project = stack.project(limit_usd="0.00006")
    made: Call = asyncio.run(_call(front, wire, project.mint(), output_tokens=10_000, chunk_interval_ms=1))
    *_, last, done = made.events
    assert done == b"[DONE]"
    assert json.loads(last)["error"]["code"] == "quota_exceeded"
    (row,) = project.settled()
    assert row["amount_pico"] <= 60_000_000
