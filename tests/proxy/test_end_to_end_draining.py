"""Two hundred streams, and the sidecar is told to stop; and before that, more connections than it may have."""

import asyncio
import json
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx

from stack import Project, Stack, running_stack, wait_until

STREAMS, CONNECTIONS_MAX, TOO_MANY = 200, 220, 30
IDLE_KIB_MAX, STREAM_KIB_MAX = 115 * 1024, 90
"""Bounds with room: 102 MiB and 20 to 30 KiB were measured (docs/performance.md)."""
SHORT: dict[str, Any] = {"output_tokens": 10, "first_chunk_delay_ms": 1200, "chunk_interval_ms": 5}
"""A stream that ends by itself within the grace period."""
LONG: dict[str, Any] = {"output_tokens": 10_000, "chunk_interval_ms": 100}


def _rss_kib(stack: Stack) -> int:
    lines = Path(f"/proc/{stack.sidecar.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


def _refused(stack: Stack) -> float:
    lines = httpx.get(stack.admin_url + "/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("behest_connections_refused_total"))


def _connects_too_often(stack: Stack) -> None:
    address = httpx.URL(stack.base_url)
    with ExitStack() as opened:
        closed = 0
        for _ in range(CONNECTIONS_MAX + TOO_MANY):
            client = opened.enter_context(socket.create_connection((address.host, address.port or 0), timeout=10))
            with suppress(ConnectionError):
                client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            try:
                closed += client.recv(1) == b""
            except ConnectionError:
                closed += 1
        assert closed == TOO_MANY
    assert _refused(stack) == closed

    def is_served() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(stack.base_url + "/openapi.json").status_code == 200
        return False

    wait_until(is_served, what="the sidecar's noticing that they are gone")


async def _ask(client: httpx.AsyncClient, project: Project, token: str, sim: dict[str, Any]) -> str:
    answer = await client.post(
        project.stack.base_url + "/v1/chat/completions",
        headers={"Authorization": f"Bearer {token}"},
        json={"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True, "sim": sim},
    )
    assert answer.status_code == 200
    return answer.text


async def _stopped_under_load(project: Project) -> tuple[list[str], float]:
    """All answers in the order in which they were asked for, half of them long, and when the sidecar was told."""
    stack, token = project.stack, project.mint()
    before_kib = _rss_kib(stack)
    # Over HTTP/1.1: a connection each. httpx gives up its HTTP/2 connections at our GOAWAY, with the streams on them.
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(timeout=30, limits=limits) as client:
        ways = [LONG] * (STREAMS // 2) + [SHORT] * (STREAMS // 2)
        asked = [asyncio.create_task(_ask(client, project, token, sim)) for sim in ways]
        async with asyncio.timeout(60):
            while len(await asyncio.to_thread(stack.sim_requests)) < STREAMS:
                assert not any(task.done() for task in asked[: STREAMS // 2])
                await asyncio.sleep(0.02)
        assert (_rss_kib(stack) - before_kib) / STREAMS < STREAM_KIB_MAX
        told_at = time.time()
        stack.sidecar.send_signal(signal.SIGTERM)
        return await asyncio.gather(*asked), told_at


def test_what_ends_within_the_grace_period_ends_normally_and_the_rest_is_told_and_all_of_it_is_in_the_books(
    database: str, tmp_path: Path
) -> None:
    most = str(CONNECTIONS_MAX)
    with running_stack(database, tmp_path, BEHEST_DRAIN_S="2.5", BEHEST_EDGE_CONNECTIONS_MAX=most) as stack:
        assert _rss_kib(stack) < IDLE_KIB_MAX
        _connects_too_often(stack)
        project = stack.project()
        texts, told_at = stack.run(_stopped_under_load(project))
        assert stack.sidecar.wait(60) == 0

        assert all(text.endswith("data: [DONE]\n\n") for text in texts)
        for text in texts[: STREAMS // 2]:
            *_, terminal, _, _ = text.split("\n\n")
            assert json.loads(terminal.removeprefix("data: "))["error"]["code"] == "draining"
        for text in texts[STREAMS // 2 :]:
            assert '"finish_reason":"stop"' in text
            assert '"error"' not in text
        seen = stack.sim_requests()
        assert any(row["outcome"] == "completed" and row["ended_at"] > told_at for row in seen)

        rows = project.settled(number=STREAMS)
        assert Counter(row["outcome"] for row in rows) == {"completed": STREAMS // 2, "draining": STREAMS // 2}
        assert all(row["output_tokens"] == 10 for row in rows if row["outcome"] == "completed")
        sent = {row["id"]: row["output_tokens_sent"] for row in seen}
        assert all(0 < row["output_tokens"] <= sent[row["request_id"]] for row in rows if row["outcome"] == "draining")
        assert stack.query("SELECT 1 FROM ledger.budget_window WHERE held <> 0") == []
        assert stack.verify().findings == []
