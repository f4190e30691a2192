"""`Idempotency-Key` against the whole system: one request, one answer, one charge."""

import json
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import Server, own_database
from proxy.thread_clients import HI, Heard, Reader, messages_of, nothing_written
from stack import Project, Stack, running_stack, wait_until

SLOW = {"output_tokens": 40, "chunk_interval_ms": 10}


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project()


@pytest.fixture
def reader(project: Project, request: pytest.FixtureRequest) -> Reader:
    one = Reader(project, None)
    one.headers["Idempotency-Key"] = request.node.name.replace(" ", "")[:200]
    return one


def calls(project: Project, *, user: str = "u1") -> int:
    sql = "SELECT count(*) AS n FROM ledger.hold WHERE tenant_id = $1 AND attributes ->> 'user' = $2"
    return int(project.stack.query(sql, project.namespace, user)[0]["n"])


def side_by_side(number: int, work: Any) -> list[Any]:
    """The results of so many threads that begin together."""
    results: list[Any] = []
    together = threading.Barrier(number)

    def one() -> None:
        together.wait()
        results.append(work())

    started = [threading.Thread(target=one) for _ in range(number)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return results


def test_a_repeated_call_gets_the_same_body_and_is_charged_once(reader: Reader) -> None:
    before = calls(reader.project)
    first = reader.ask(HI, sim=SLOW)
    second = reader.ask(HI, sim=SLOW)
    assert (first.status_code, second.status_code) == (200, 200)
    assert second.json() == first.json()
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert calls(reader.project) == before + 1


def test_a_repeated_stream_gets_the_same_events(reader: Reader) -> None:
    before = calls(reader.project)
    first = reader.stream(HI, more={"X-Event-Ids": "1"}, sim=SLOW)
    second = reader.stream(HI, more={"X-Event-Ids": "1"}, sim=SLOW)
    plain = reader.stream(HI, sim=SLOW)
    assert first.is_done
    assert (second.text, second.ids, second.is_done) == (first.text, first.ids, True)
    assert (plain.text, plain.ids, plain.is_done) == (first.text, [], True)
    assert calls(reader.project) == before + 1


@pytest.mark.parametrize("stream", [True, False])
def test_ten_at_once_make_one_call(reader: Reader, stream: bool) -> None:
    before = calls(reader.project)

    def one() -> str:
        if stream:
            heard = reader.stream(HI, sim=SLOW)
            assert (heard.status, heard.is_done, heard.error) == (200, True, None)
            return heard.text
        answer = reader.ask(HI, sim=SLOW)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    texts = side_by_side(10, one)
    assert len(texts) == 10
    assert len(set(texts)) == 1
    assert calls(reader.project) == before + 1


def test_the_first_clients_leaving_does_not_end_the_others_answer(reader: Reader) -> None:
    slow = {"output_tokens": 150, "chunk_interval_ms": 20}
    heard: list[Heard] = []
    has_joined = threading.Event()
    with httpx.stream(
        "POST",
        reader.base_url + "/v1/chat/completions",
        headers=reader.headers,
        json={"messages": [HI], "stream": True, "sim": slow},
        timeout=30,
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        other = threading.Thread(target=lambda: heard.append(reader.stream(HI, begun=has_joined, sim=slow)))
        other.start()
        assert any(has_joined.is_set() for _ in lines), "it ended before the other came"
    other.join()
    assert (heard[0].status, heard[0].is_done, heard[0].error) == (200, True, None)

    def is_settled() -> bool:
        rows = reader.project.settled()
        return [row["outcome"] for row in rows if row["output_tokens"] == 150] == ["completed"]

    wait_until(is_settled, what="its one charge")


def test_another_body_under_the_key_is_a_conflict(reader: Reader) -> None:
    reader.ask(HI, sim=SLOW)
    answer = reader.ask({"role": "user", "content": "Something else"}, sim=SLOW)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    assert answer.headers["x-should-retry"] == "false"


def test_a_key_is_one_users_own(reader: Reader) -> None:
    first = reader.ask(HI, sim={"text": "For the first."})
    other = Reader(reader.project, None, user="u2")
    other.headers["Idempotency-Key"] = reader.headers["Idempotency-Key"]
    second = other.ask(HI, sim={"text": "For the second."})
    assert (first.status_code, second.status_code) == (200, 200)
    assert second.json()["choices"][0]["message"]["content"] == "For the second."


def test_what_cost_nothing_may_be_asked_again(reader: Reader) -> None:
    before = calls(reader.project)
    assert reader.ask(HI, sim={"status": 503}).status_code == 502
    wait_until(lambda: calls(reader.project) == before + 1, what="the first call")
    refused = reader.ask(HI, sim={"status": 503})
    assert refused.status_code == 502, refused.text
    assert calls(reader.project) == before + 2
    assert reader.ask(HI, model="no such model", n=500).json()["error"]["code"] == "validation_error"


def test_a_call_that_its_client_broke_off_is_charged_and_not_run_again(reader: Reader) -> None:
    before = calls(reader.project)
    sim = {"output_tokens": 500, "chunk_interval_ms": 20}
    first = reader.stream(HI, leave_after=10, sim=sim)
    ended = wait_until(
        lambda: (found := reader.stream(HI, sim=sim)).status == 200 and found, what="the end of the first call"
    )
    assert ended.text.startswith(first.text)
    assert (ended.is_done, ended.error["code"]) == (True, "cannot_continue")
    assert calls(reader.project) == before + 1


def test_on_a_thread_a_broken_call_goes_on_under_its_key_and_is_one_turn(reader: Reader) -> None:
    reader.headers["X-Thread-Id"] = reader.headers["Idempotency-Key"]
    sim = {"output_tokens": 40, "chunk_interval_ms": 10, "continue_assistant": True, "reset_after_chunks": 12}
    first = reader.stream(HI, more={"X-Event-Ids": "1"}, sim=sim)
    assert first.error is not None
    second = reader.stream(HI, more={"Last-Event-ID": first.ids[-1]}, sim=sim)
    assert (second.error, second.is_done) == (None, True)
    again = reader.stream(HI, sim=sim)
    assert again.text == first.text + second.text
    assert len(messages_of(reader, reader.headers["X-Thread-Id"], number=2)) == 2

    def is_settled() -> bool:
        return any(row["facts"].get("attempt") == 2 for row in reader.project.settled())

    wait_until(is_settled, what="the charge of the second attempt")


def test_across_two_sidecars_one_runs_it_and_the_other_says_so(stack: Stack, reader: Reader) -> None:
    before = calls(reader.project)
    with stack.another_sidecar() as base_url:
        elsewhere = Reader(reader.project, None, base_url=base_url)
        elsewhere.headers["Idempotency-Key"] = reader.headers["Idempotency-Key"]
        sim = {"output_tokens": 60, "chunk_interval_ms": 60}
        with httpx.stream(
            "POST",
            reader.base_url + "/v1/chat/completions",
            headers=reader.headers,
            json={"messages": [HI], "stream": True, "sim": sim},
            timeout=30,
        ) as answer:
            first = Heard()
            lines = answer.iter_lines()
            first.line(next(lines))
            meanwhile = elsewhere.stream(HI, sim=sim)
            assert (meanwhile.status, meanwhile.error and meanwhile.error["code"]) == (409, "in_progress")
            assert meanwhile.headers["retry-after"] == "1"
            for line in lines:
                first.line(line)
        then = wait_until(
            lambda: (found := elsewhere.stream(HI, sim=sim)).status == 200 and found, what="the stored answer"
        )
        assert (then.text, then.is_done) == (first.text, True)
    assert calls(reader.project) == before + 1


def test_a_key_outlives_the_sidecar_that_was_killed_but_not_for_ever(template: Server, tmp_path: Path) -> None:
    with (
        own_database(template, "keys") as dsn,
        running_stack(dsn, tmp_path, BEHEST_HOLDER_TTL_S="5", BEHEST_JOURNAL_DIR=str(tmp_path / "journal")) as stack,
    ):
        reader = Reader(stack.project(), "t")
        reader.headers["Idempotency-Key"] = "k"
        sim = {"output_tokens": 100, "chunk_interval_ms": 20, "continue_assistant": True}
        text, ids = "", list[str]()
        try:
            with (
                ExitStack() as unwritten,
                httpx.stream(
                    "POST",
                    reader.base_url + "/v1/chat/completions",
                    headers={**reader.headers, "X-Event-Ids": "1"},
                    json={"messages": [HI], "stream": True, "sim": sim},
                    timeout=30,
                ) as answer,
            ):
                for number, line in enumerate(answer.iter_lines()):
                    if line.startswith("id: "):
                        ids.append(line[4:])
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                    if number == 180:
                        unwritten.enter_context(nothing_written(stack, "generation_chunk"))
                    if number == 210:
                        stack.kill_sidecar()
        except httpx.HTTPError:
            pass
        stack.start_sidecar()
        wait_until(lambda: httpx.get(stack.admin_url + "/readyz").status_code == 200, what="the new life")
        refused = reader.stream(HI, more={"Last-Event-ID": ids[-1]}, sim=sim)
        # What came in the last half second before the kill is not stored: that is said, never guessed.
        assert (refused.status, refused.error and refused.error["code"]) == (409, "cannot_continue")
        assert refused.error is not None
        last = refused.error["details"]["last_event_id"]
        assert last in ids
        heard = reader.stream(HI, more={"Last-Event-ID": last}, sim=sim)
        assert (heard.status, heard.is_done, heard.error) == (200, True, None)
        whole = reader.stream(HI, sim=sim)
        assert whole.text.startswith(text[:20])
        assert whole.text.endswith(heard.text)
        assert stack.verify().findings == []
