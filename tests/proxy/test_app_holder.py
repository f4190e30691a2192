"""The sidecar's word that it lives: renewed, reckoned from when it was sent, and lost for good when it is lost."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from behest_ledger.store import holders
from behest_ledger.store.errors import LedgerUnavailableError
from behest_proxy.app import holder as module
from behest_proxy.app.holder import Holder, boot_time_s
from stack import Stack, running_stack, wait_until

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]


class _Ledger:
    """The ledger's answers to a holder, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: list[Any]) -> None:
        self.registered: list[Any] = []
        self.renewed: list[Any] = []
        self._answers = answers
        monkeypatch.setattr(module, "RENEW_S", 0.0)
        monkeypatch.setattr(holders, "register", self.register)
        monkeypatch.setattr(holders, "renew", self.renew)

    async def register(self, _pool: Any, holder_id: Any, _name: str, _ttl_s: float) -> None:
        self.registered.append(holder_id)

    async def renew(self, _pool: Any, holder_id: Any, _ttl_s: float) -> bool:
        self.renewed.append(holder_id)
        if not self._answers:
            raise asyncio.CancelledError
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)


def _played(monkeypatch: pytest.MonkeyPatch, answers: list[Any], *, age_s: float = 0.0) -> tuple[Holder, _Ledger, int]:
    ledger = _Ledger(monkeypatch, answers)
    lost: list[None] = []
    holder = Holder(name="test", on_lost=lambda: lost.append(None), checkpoints=list, on_busy=lambda requests: None)

    async def scenario() -> None:
        await holder.register(None)
        holder.deadline_s -= age_s
        with pytest.raises(asyncio.CancelledError):
            await holder.run(None)

    asyncio.run(scenario())
    return holder, ledger, len(lost)


def test_a_renewal_counts_from_when_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    before_s = boot_time_s()
    holder, ledger, lost = _played(monkeypatch, [True, True])
    assert before_s + 119 <= holder.deadline_s <= boot_time_s() + 119
    assert holder.lives
    assert lost == 0
    assert set(ledger.renewed) == {holder.holder_id}


def test_an_outage_changes_nothing_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    holder, _, lost = _played(monkeypatch, [LedgerUnavailableError("away")] * 3)
    assert holder.lives
    assert lost == 0


def test_a_fault_of_our_own_does_not_end_the_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    holder, ledger, lost = _played(monkeypatch, [ValueError("a fault"), True, True])
    assert len(ledger.renewed) == 4
    assert holder.lives
    assert lost == 0


def test_past_the_deadline_the_streams_end(monkeypatch: pytest.MonkeyPatch) -> None:
    holder, _, lost = _played(monkeypatch, [LedgerUnavailableError("away")], age_s=120)
    assert not holder.lives
    assert lost == 1


def test_a_fenced_holder_begins_again_under_another_id(monkeypatch: pytest.MonkeyPatch) -> None:
    holder, ledger, lost = _played(monkeypatch, [False, True])
    assert lost == 1
    first, second = ledger.registered
    assert first != second
    assert ledger.renewed == [first, second, second]
    assert holder.lives


def _until(stack: Stack, sql: str, is_so: Callable[[Any], bool], what: str) -> Any:
    return wait_until(lambda: (rows := stack.query(sql)) and is_so(rows[0]) and rows[0], what=what)


def test_a_fenced_sidecar_ends_its_streams_and_serves_on(database: str, tmp_path: Path) -> None:
    with running_stack(database, tmp_path) as stack:
        project = stack.project()
        headers = {"Authorization": f"Bearer {project.mint()}"}
        body = {"messages": QUESTION, "stream": True, "sim": {"output_tokens": 10_000, "chunk_interval_ms": 10}}
        with httpx.stream(
            "POST", stack.base_url + "/v1/chat/completions", headers=headers, json=body, timeout=30
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            row = _until(
                stack,
                "SELECT checkpoint_output_tokens AS tokens FROM ledger.hold WHERE state = 'open'",
                lambda found: found["tokens"] > 0,
                "a checkpoint",
            )
            assert row["tokens"] > 0
            stack.query("UPDATE ledger.holder SET fenced_at = clock_timestamp() RETURNING 1")
            text = "\n".join(lines)
        assert '"code":"ledger_unavailable"' in text
        assert text.rstrip().endswith("data: [DONE]")
        (settled,) = project.settled()
        assert settled["outcome"] == "ledger_unavailable"

        def is_served() -> bool:
            url = stack.base_url + "/v1/chat/completions"
            return httpx.post(url, headers=headers, json={"messages": QUESTION}, timeout=30).status_code == 200

        wait_until(is_served, what="service under another id")
        assert stack.verify().findings == []
