"""The database goes away in the middle of a thread's reply: it goes on, and is kept or says that it was not."""

from collections.abc import Callable, Iterator

import httpx
import pytest

from conftest import Server, own_database
from outage import Away, away_stack
from proxy.thread_clients import HI, Heard, Reader, messages_of, texts
from stack import wait_until

TEXT = "One two three four five six seven eight nine ten eleven twelve. " * 20
SIM = {"text": TEXT, "chunk_interval_ms": 5, "continue_assistant": True}
WITH_IDS = {"X-Event-Ids": "1"}


@pytest.fixture
def away(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Away]:
    """A sidecar of one's own, for one of these tests kills it."""
    with own_database(template, "threads") as dsn, away_stack(dsn, tmp_path_factory.mktemp("outage")) as started:
        started.until_ready()
        yield started
        started.wire.back()


def _heard(
    reader: Reader,
    more: dict[str, str],
    *,
    at: int,
    then: Callable[[], object],
    leave_at: int | None = None,
    end: Callable[[], object] | None = None,
) -> Heard:
    """A stream in whose middle, after `at` events, something happens; its client may leave, or something end it."""
    heard = Heard()
    body = {"messages": [HI], "stream": True, "sim": SIM}
    url, headers = reader.base_url + "/v1/chat/completions", {**reader.headers, **more}
    try:
        with httpx.stream("POST", url, headers=headers, json=body, timeout=30) as answer:
            heard.status, heard.headers = answer.status_code, dict(answer.headers)
            for line in answer.iter_lines():
                before = heard.events
                heard.line(line)
                if heard.events == at and before < at:
                    then()
                if leave_at is not None and heard.events >= leave_at:
                    if end is None:
                        break
                    end()
                    leave_at = None
    except httpx.TransportError:
        assert end is not None
    return heard


@pytest.mark.parametrize("how", ["away", "stall"])
def test_a_reply_goes_on_without_the_database_and_is_kept_when_that_is_back(away: Away, how: str) -> None:
    project, _ = away.project()
    reader = Reader(project, "t")
    heard = _heard(reader, WITH_IDS, at=60, then=getattr(away.wire, how))
    assert (heard.text, heard.error, heard.is_done) == (TEXT, None, True)
    away.wire.back()
    away.until_ready()
    assert texts(messages_of(reader, "t", number=2)) == [("user", "Hi"), ("assistant", TEXT)]
    again = reader.stream(HI, more={"Last-Event-ID": heard.ids[9]}, sim=SIM)
    assert (again.ids, again.is_done, again.error) == (heard.ids[10:], True, None)
    (row,) = away.all_is_settled(project, requests=1)
    assert row["outcome"] == "completed"
    uncut = Reader(away.stack.project(), "uncut")
    uncut.stream(HI, sim=SIM)
    assert row["output_tokens"] == uncut.project.settled()[0]["output_tokens"]


@pytest.mark.parametrize("how", ["away", "stall"])
def test_a_reply_that_its_client_lost_in_the_outage_goes_on_without_a_gap(away: Away, how: str) -> None:
    project, _ = away.project()
    reader = Reader(project, "t")
    first = _heard(reader, WITH_IDS, at=60, then=getattr(away.wire, how), leave_at=120)
    refused = reader.stream(HI, more={"Last-Event-ID": first.ids[-1]}, sim=SIM)
    assert (refused.status, refused.error and refused.error["code"]) == (503, "ledger_unavailable")
    away.wire.back()
    away.until_ready()
    rest = reader.stream(HI, more={"Last-Event-ID": first.ids[-1]}, sim=SIM)
    assert (rest.status, rest.error) == (200, None)
    assert first.text + rest.text == TEXT
    assert texts(messages_of(reader, "t", number=2)) == [("user", "Hi"), ("assistant", TEXT)]
    rows = away.all_is_settled(project, requests=2)
    uncut = Reader(away.stack.project(), "uncut")
    uncut.stream(HI, sim=SIM)
    exactly = uncut.project.settled()[0]["output_tokens"]
    # A word that was cut in two may be one token more.
    assert exactly <= sum(row["output_tokens"] for row in rows) <= exactly + 1


def test_what_a_killed_sidecar_could_not_write_is_named_and_the_reply_goes_on_from_what_was(away: Away) -> None:
    project, _ = away.project()
    reader = Reader(project, "t")
    first = _heard(reader, WITH_IDS, at=160, then=away.wire.away, leave_at=220, end=away.stack.kill_sidecar)
    assert not first.is_done
    away.wire.back()
    away.stack.start_sidecar()
    away.until_ready()

    def refused() -> Heard | None:
        # Until the ledger counts the killed one as dead its reply may still be under way.
        heard = reader.stream(HI, more={"Last-Event-ID": first.ids[-1]}, sim=SIM)
        return heard if heard.status == 409 else None

    told = wait_until(refused, what="the answer about the lost events").error
    assert told["code"] == "cannot_continue"
    kept = told["details"]["last_event_id"]
    last = reader.get("/v1/threads/t/messages").json()[-1]
    assert (last["complete"], last["last_event_id"]) == (False, kept)
    assert kept in first.ids[:-1]
    rest = reader.stream(HI, more={"Last-Event-ID": kept}, sim=SIM)
    assert last["content"] + rest.text == TEXT
    killed, continued = away.all_is_settled(project, requests=2)
    # The journal counts what was delivered, also what the store has not; the rest is charged once more, as it was said.
    assert killed["output_tokens"] >= len(first.text.split())
    assert continued["output_tokens"] >= len(rest.text.split())
