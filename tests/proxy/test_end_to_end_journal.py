"""A sidecar comes back to a journal that is damaged, or another version's: it is told, and no hold is lost."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from behest_ledger.journal.folder import FORMAT
from behest_ledger.store.keeper import Keeper
from stack import Project, Stack, running_stack, wait_until


class _Reader(threading.Thread):
    """One client that counts the text it received, until its connection breaks."""

    def __init__(self, project: Project) -> None:
        super().__init__()
        self._url = project.stack.base_url + "/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {project.mint()}"}
        self.request_id = ""
        self.received = 0

    def run(self) -> None:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": "Tell me a story."}],
            "stream": True,
            "sim": {"output_tokens": 100_000, "chunk_interval_ms": 5},
        }
        try:
            with httpx.stream("POST", self._url, headers=self._headers, json=body, timeout=30) as answer:
                self.request_id = answer.headers["x-request-id"]
                for line in answer.iter_lines():
                    self.received += '"content":"' in line and '"content":""' not in line
        except httpx.TransportError:
            pass


def _killed_in_the_middle(stack: Stack, project: Project) -> list[_Reader]:
    """Three streams of a sidecar that was killed, each with a checkpoint."""
    readers = [_Reader(project) for _ in range(3)]
    for reader in readers:
        reader.start()
    wait_until(lambda: all(reader.received > 3 for reader in readers), what="the streams' begin")

    def checkpoints() -> bool:
        (row,) = stack.query(
            "SELECT count(*) AS n FROM ledger.hold WHERE state = 'open' AND checkpoint_output_tokens > 0"
        )
        return bool(row["n"] == 3)

    wait_until(checkpoints, what="the checkpoints")
    stack.kill_sidecar()
    for reader in readers:
        reader.join(30)
    return readers


def _damage_the_record_of(request_id: str, folder: Path) -> None:
    """One bit in the middle of the file, in the admission of this request."""
    for file in folder.glob("*.records"):
        data = bytearray(file.read_bytes())
        at = data.find(request_id.encode())
        if at >= 0:
            data[at] ^= 1
            file.write_bytes(data)
            return
    raise AssertionError("there is no record of it")


def _kept(stack: Stack, requests: int) -> None:
    """Let the keeper end what no journal will, until so many requests are in the books."""

    async def rounds() -> None:
        keeper = Keeper(stack.dsn, grace_s=0.0)
        try:
            async with asyncio.timeout(60):
                charged = 0
                while charged < requests:
                    charged += (await keeper.run_once()).charged_requests
                    await asyncio.sleep(0.2)
        finally:
            await keeper.aclose()

    stack.run(rounds())


@pytest.mark.parametrize("what", ["damaged", "another version's"])
def test_a_journal_that_cannot_be_used_is_told_and_the_keeper_ends_what_it_does_not_know(
    database: str, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "journal"
    with running_stack(database, tmp_path, BEHEST_JOURNAL_DIR=str(folder), BEHEST_HOLDER_TTL_S="3") as stack:
        project = stack.project()
        readers = _killed_in_the_middle(stack, project)
        if what == "damaged":
            lost = {readers[1].request_id}
            _damage_the_record_of(readers[1].request_id, folder)
        else:
            lost = {reader.request_id for reader in readers}
            (folder / "format").write_text(FORMAT.replace("1", "2", 1))
        stack.start_sidecar()
        told = {
            "damaged": "not all of the journal",
            "another version's": "another version's journal was put aside, unread",
        }[what]
        assert told in stack.log.read_text()
        if what != "damaged":
            (aside,) = folder.glob("aside-*")
            assert list(aside.glob("*.records")), "nothing of it is thrown away"

        # What the journal knows is settled to the token; the rest stays held, and is nobody else's.
        known = {row["request_id"]: row for row in project.settled(number=3 - len(lost))} if len(lost) < 3 else {}
        assert set(known) == {reader.request_id for reader in readers} - lost
        (row,) = stack.query(
            "SELECT sum(held + suspense)::bigint AS held FROM ledger.budget_window WHERE tenant_id = $1",
            project.namespace,
        )
        assert row["held"] > 0
        _kept(stack, len(lost))
        rows = {row["request_id"]: row for row in project.settled(number=3)}
        for reader in readers:
            row = rows[reader.request_id]
            assert row["outcome"] == "crashed"
            if reader.request_id in lost:
                # The last checkpoint: about a second of the stream may be missing, and nothing is charged beyond it.
                assert 0 < row["output_tokens"] <= reader.received + 64
                assert row["facts"]["policy"] == "checkpoint"
            else:
                assert reader.received <= row["output_tokens"] <= reader.received + 64
        (window,) = stack.query(
            "SELECT held, suspense, overrun FROM ledger.budget_window WHERE tenant_id = $1", project.namespace
        )
        assert set(window.values()) == {0}
        assert stack.verify().findings == []
        answer = httpx.post(
            stack.base_url + "/v1/chat/completions",
            headers={"Authorization": f"Bearer {project.mint()}"},
            json={"messages": [{"role": "user", "content": "Hi"}], "sim": {"output_tokens": 2}},
        )
        assert answer.status_code == 200
