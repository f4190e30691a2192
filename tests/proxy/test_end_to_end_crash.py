"""`kill -9` of the sidecar in the middle of streams: what clients received is charged, once, and nothing stays held."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from stack import Project, Stack, running_stack, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]


class _Reader(threading.Thread):
    """One client that counts the text it received, until its connection breaks."""

    def __init__(self, project: Project, token: str, sim: dict[str, Any]) -> None:
        super().__init__()
        self._project, self._token, self.sim = project, token, sim
        self.request_id = ""
        self.received = 0
        self.ended = False

    def run(self) -> None:
        try:
            with (
                httpx.Client(timeout=30) as client,
                client.stream(
                    "POST",
                    self._project.stack.base_url + "/v1/chat/completions",
                    headers={"Authorization": f"Bearer {self._token}"},
                    json={"messages": QUESTION, "stream": True, "sim": self.sim},
                ) as answer,
            ):
                self.request_id = answer.headers["x-request-id"]
                for line in answer.iter_lines():
                    self.received += '"content":"' in line and '"content":""' not in line
                    self.ended = self.ended or line == "data: [DONE]"
        except httpx.TransportError:
            pass


def _until_all_run(stack: Stack, begun: list[_Reader]) -> None:
    """Wait until every stream has text, the short one has ended, and the silent one is with the provider."""
    *streams, short, silent = begun

    def silent_one_is_open() -> bool:
        return any(seen["body"].get("sim") == silent.sim and seen["outcome"] == "open" for seen in stack.sim_requests())

    wait_until(lambda: short.ended and all(stream.received for stream in streams), what="the streams' begin")
    wait_until(silent_one_is_open, what="the provider's silence")


def _held(stack: Stack, project: Project) -> int:
    (row,) = stack.query(
        "SELECT coalesce(sum(held + suspense), 0)::text AS held FROM ledger.budget_window WHERE tenant_id = $1",
        project.namespace,
    )
    return int(row["held"])


def test_a_killed_sidecar_settles_its_streams_when_it_comes_back(database: str, tmp_path: Path) -> None:
    with running_stack(database, tmp_path, BEHEST_JOURNAL_DIR=str(tmp_path / "journal")) as stack:
        project = stack.project()
        token = project.mint()
        randomness = random.Random(7)
        readers: list[_Reader] = []
        for _ in range(3):
            begun = [
                _Reader(project, token, {"output_tokens": 100_000, "chunk_interval_ms": randomness.choice([1, 3, 10])})
                for _ in range(12)
            ]
            begun.append(_Reader(project, token, {"output_tokens": 5}))
            begun.append(_Reader(project, token, {"head_delay_ms": 60_000}))
            for reader in begun:
                reader.start()
            _until_all_run(stack, begun)
            time.sleep(randomness.uniform(0.0, 0.7))
            stack.kill_sidecar()
            for reader in begun:
                reader.join(30)
            stack.start_sidecar()
            readers += begun
        rows = {row["request_id"]: row for row in project.settled(number=len(readers))}
        assert len(rows) == len(readers)
        assert _held(stack, project) == 0
        assert stack.verify().findings == []

        for reader in readers:
            if not reader.request_id:
                continue  # no head came before the kill: found below by what it was charged
            row = rows[reader.request_id]
            if row["outcome"] == "crashed":
                # A read of the provider's stream holds a few chunks of one token each.
                assert reader.received <= row["output_tokens"] <= reader.received + 64
                assert row["facts"]["recovered"]
            else:
                assert reader.ended
                assert row["output_tokens"] == reader.received
        crashed = [row for row in rows.values() if row["outcome"] == "crashed"]
        assert len(crashed) == 3 * 13
        before_the_head = [row for row in crashed if not row["output_tokens"]]
        assert {(row["input_tokens"], row["source"]) for row in before_the_head} == {(12, "local")}
        # And the budget goes on where it was.
        again = _Reader(project, token, {"output_tokens": 3})
        again.run()
        assert again.ended


def test_two_sidecars_do_not_share_a_journal(database: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    with running_stack(database, tmp_path, BEHEST_JOURNAL_DIR=str(tmp_path / "journal")):
        done = subprocess.run(
            [sys.executable, "-I", "-m", "behest_proxy.cli.main", "proxy"],
            env={
                "PATH": "/usr/bin:/bin",
                "BEHEST_DATABASE_URL": database,
                "BEHEST_SIGNING_KEY_FILE": str(tmp_path / "signing.pem"),
                "BEHEST_JOURNAL_DIR": str(tmp_path / "journal"),
                "BEHEST_BIND": "127.0.0.1:0",
                "BEHEST_ADMIN_BIND": "127.0.0.1:0",
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert "journal" in done.stderr
