"""Threads against the whole system: what is remembered, for whom, and that a broken reply goes on."""

import random
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import httpx
import openai
import pytest

from proxy.thread_clients import HI, Heard, Reader, messages_of, nothing_written, sent_to_the_provider, texts
from stack import Project, Stack, wait_until


@pytest.fixture(scope="module")
def project(stack: Stack) -> Project:
    return stack.project(project="  systemPrompt: You are kind.\n  memory: {window: 6}")


@pytest.fixture
def reader(project: Project, request: pytest.FixtureRequest) -> Reader:
    return Reader(project, request.node.name.replace("[", "-").replace("]", "")[:200])


def test_a_thread_remembers_what_was_said_and_begins_with_the_projects_prompt(reader: Reader) -> None:
    first = reader.ask(HI, sim={"text": "Hello, friend."})
    assert first.status_code == 200, first.text
    thread = reader.headers["X-Thread-Id"]
    messages_of(reader, thread, number=2)
    second = reader.stream({"role": "user", "content": "How are you?"}, sim={"text": "Fine."})
    assert (second.text, second.is_done) == ("Fine.", True)
    assert texts(sent_to_the_provider(reader.project, second)) == [
        ("system", "You are kind."),
        ("user", "Hi"),
        ("assistant", "Hello, friend."),
        ("user", "How are you?"),
    ]
    messages = messages_of(reader, thread, number=4)
    assert texts(messages) == [
        ("user", "Hi"),
        ("assistant", "Hello, friend."),
        ("user", "How are you?"),
        ("assistant", "Fine."),
    ]
    assert [message["id"] for message in messages] == [1, 2, 3, 4]
    assert all(message["complete"] for message in messages)
    one = reader.get(f"/v1/threads/{thread}").json()
    assert (one["id"], one["messages"]) == (thread, 4)
    assert thread in [each["id"] for each in reader.get("/v1/threads").json()]
    last = reader.get(f"/v1/threads/{thread}/messages?limit=1&before=4").json()
    assert texts(last) == [("user", "How are you?")]


def test_a_client_that_sends_everything_again_is_not_heard_twice(reader: Reader) -> None:
    thread = reader.headers["X-Thread-Id"]
    reader.ask(HI, sim={"text": "Hello."})
    said = messages_of(reader, thread, number=2)
    again = [{"role": one["role"], "content": one["content"]} for one in said]
    answer = reader.ask(*again, {"role": "user", "content": "And now?"}, sim={"text": "Now this."})
    assert texts(sent_to_the_provider(reader.project, answer))[1:] == [*texts(said), ("user", "And now?")]
    assert texts(messages_of(reader, thread, number=4)) == [
        *texts(said),
        ("user", "And now?"),
        ("assistant", "Now this."),
    ]


def test_the_window_of_memory_is_the_projects_and_begins_with_a_question(reader: Reader) -> None:
    for number in range(5):
        reader.ask({"role": "user", "content": f"question {number}"}, sim={"text": f"Answer {number}."})
    answer = reader.ask({"role": "user", "content": "last"}, sim={"text": "Done."})
    sent = texts(sent_to_the_provider(reader.project, answer))
    assert sent[:2] == [("system", "You are kind."), ("user", "question 2")]
    assert len(sent) == 1 + 6 + 1


def test_another_users_thread_of_the_same_name_is_another_thread_and_is_not_found(reader: Reader) -> None:
    thread = reader.headers["X-Thread-Id"]
    reader.ask(HI, sim={"text": "For the first."})
    messages_of(reader, thread, number=2)
    other = Reader(reader.project, thread, user="u2")
    for path in (f"/v1/threads/{thread}", f"/v1/threads/{thread}/messages"):
        assert (other.get(path).status_code, other.get(path).json()["error"]["code"]) == (404, "not_found")
    assert other.delete(f"/v1/threads/{thread}").status_code == 404
    assert other.get("/v1/threads").json() == []
    answer = other.ask(HI, sim={"text": "For the second."})
    assert texts(sent_to_the_provider(reader.project, answer))[1:] == [("user", "Hi")]
    assert texts(messages_of(other, thread, number=2))[1] == ("assistant", "For the second.")
    assert texts(messages_of(reader, thread, number=2))[1] == ("assistant", "For the first.")


def test_a_threads_name_may_have_what_a_path_has(project: Project) -> None:
    reader = Reader(project, "a/b%2Fc?d")
    reader.ask(HI, sim={"text": "Hello."})
    path = "/v1/threads/a%2Fb%252Fc%3Fd"
    wait_until(lambda: reader.get(path).status_code == 200, what="the thread")
    assert reader.get(path).json()["id"] == "a/b%2Fc?d"
    assert len(reader.get(path + "/messages").json()) == 2
    assert reader.delete(path + "/messages").status_code == 405
    assert reader.get(path + "/else").status_code == reader.get("/v1/threads/").status_code == 404
    assert reader.delete(path).status_code == 204


def test_a_deleted_thread_is_gone_with_its_messages_and_the_chunks_of_its_replies(reader: Reader) -> None:
    thread = reader.headers["X-Thread-Id"]
    heard = reader.stream(HI, more={"X-Event-Ids": "1"}, sim={"text": "A secret word."})
    assert heard.ids
    messages_of(reader, thread, number=2)
    tables = ("thread", "thread_message", "generation", "generation_chunk")

    def rows(table: str) -> int:
        sql = f"SELECT count(*) AS n FROM ledger.{table} WHERE tenant_id = $1"
        if table == "thread":
            sql += f" AND thread_id = '{thread}'"
        elif table == "generation_chunk" or table == "generation":
            sql += f" AND generation_id = '{heard.ids[0].split('-')[0]}'"
        else:
            sql += f" AND thread_key = '{key}'"
        return int(reader.project.stack.query(sql, reader.project.namespace)[0]["n"])

    key = reader.project.stack.query("SELECT thread_key FROM ledger.thread WHERE thread_id = $1", thread)[0][
        "thread_key"
    ]
    assert all(rows(table) > 0 for table in tables)
    answer = reader.delete(f"/v1/threads/{thread}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert [rows(table) for table in tables] == [0, 0, 0, 0]
    assert reader.get(f"/v1/threads/{thread}").status_code == 404
    assert reader.delete(f"/v1/threads/{thread}").status_code == 404


def test_a_call_that_a_budget_refuses_leaves_no_thread(stack: Stack) -> None:
    poor = Reader(stack.project(limit_usd="0.00000001"), "t")
    assert poor.ask(HI).status_code == 402
    assert poor.get("/v1/threads").json() == []


def test_a_suspended_project_neither_speaks_nor_remembers(stack: Stack) -> None:
    project = stack.project()
    reader = Reader(project, "t")
    reader.ask(HI, sim={"text": "Hello."})
    messages_of(reader, "t", number=2)
    stack.apply(
        f"""
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: app, namespace: {project.namespace}}}
spec: {{tenant: {project.namespace}, suspended: true}}
"""
    )
    for answer in (reader.ask(HI), reader.get("/v1/threads"), reader.get("/v1/threads/t/messages")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    ("more", "body", "status"),
    [
        ({"X-Thread-Id": "with space"}, {}, 400),
        ({}, {"n": 2}, 400),
        ({"Last-Event-ID": "nonsense"}, {"stream": True}, 400),
        ({"Last-Event-ID": "0" * 32 + "-1"}, {"stream": True}, 409),
    ],
)
def test_what_a_thread_cannot_do_is_refused_by_name(
    reader: Reader, more: dict[str, str], body: dict[str, Any], status: int
) -> None:
    answer = reader.ask(HI, more=more, **body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == ("cannot_continue" if status == 409 else "validation_error")


@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=["whole", "streamed"])
def test_who_has_the_answer_finds_it_in_the_thread_at_once(reader: Reader, more: dict[str, Any]) -> None:
    for number in range(1, 6):
        reader.ask({"role": "user", "content": f"Question {number}"}, sim={"text": "Yes."}, **more)
        messages = reader.get(f"/v1/threads/{reader.headers['X-Thread-Id']}/messages").json()
        assert len(messages) == 2 * number
        assert messages[-1]["complete"] is True
        assert messages[-1]["content"]
        assert "last_event_id" not in messages[-1]


@contextmanager
def others_speaking(project: Project) -> Generator[None]:
    """The writer of threads has something to write all the time: nobody's turn is written at once."""
    is_over = threading.Event()

    def speak(name: str) -> None:
        other = Reader(project, name)
        while not is_over.is_set():
            other.ask(HI, sim={"text": "Yes."})

    with ThreadPoolExecutor(2) as pool:
        speaking = [pool.submit(speak, f"other-{number}") for number in range(2)]
        try:
            yield
        finally:
            is_over.set()
            for one in speaking:
                one.result(30)


@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=["whole", "streamed"])
def test_who_has_the_answer_finds_its_thread_and_can_delete_it_at_once(reader: Reader, more: dict[str, Any]) -> None:
    with others_speaking(reader.project):
        for number in range(30):
            thread = reader.headers["X-Thread-Id"] = f"at-once-{number}"
            reader.ask(HI, sim={"text": "Yes."}, **more)
            if number % 3 == 0:
                assert thread in [one["id"] for one in reader.get("/v1/threads").json()]
            elif number % 3 == 1:
                assert reader.get(f"/v1/threads/{thread}").json().get("messages") == 2
            while (deleted := reader.delete(f"/v1/threads/{thread}")).status_code == 503:
                pass  # written so late, on a busy machine, that nobody can be sure: asked again
            assert deleted.status_code == 204
            assert reader.get(f"/v1/threads/{thread}/messages").status_code == 404


def test_what_cannot_be_written_yet_is_not_said_to_be_deleted(reader: Reader) -> None:
    thread = reader.headers["X-Thread-Id"]
    with nothing_written(reader.project.stack, "thread"):
        reader.ask(HI, sim={"text": "Yes."})
        answer = reader.delete(f"/v1/threads/{thread}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
        assert answer.headers["retry-after"] == "1"
    wait_until(lambda: reader.delete(f"/v1/threads/{thread}").status_code == 204)
    assert reader.get(f"/v1/threads/{thread}").status_code == 404


# Reconnecting

TEXT = "One two three four five six seven eight nine ten eleven twelve. " * 4
SLOW = {"text": TEXT, "chunk_interval_ms": 4, "continue_assistant": True}


def cut_again_and_again(project: Project, thread: str, numbers: random.Random) -> int:
    """Read one reply to its end over a connection that breaks; returns how often it broke."""
    reader = Reader(project, thread)
    text, last, attempts, ids = "", "", 0, list[str]()
    while True:
        attempts += 1
        sim = dict(SLOW)
        by_provider = numbers.random() < 0.4
        if by_provider and attempts == 1:
            sim["reset_after_chunks"] = numbers.randrange(0, 50)
        more = {"Last-Event-ID": last} if last else {"X-Event-Ids": "1"}
        heard = reader.stream(HI, leave_after=None if by_provider else numbers.randrange(0, 12), more=more, sim=sim)
        assert heard.status == 200, heard.error
        text += heard.text
        ids += heard.ids
        last = heard.ids[-1] if heard.ids else last
        if heard.is_done and heard.error is None:
            break
        assert attempts < 60
    assert text == TEXT
    assert len({one.split("-")[0] for one in ids}) == 1
    assert [int(one.split("-")[1]) for one in ids] == list(range(1, len(ids) + 1)), "neither a gap nor a repetition"
    assert texts(messages_of(reader, thread, number=2)) == [("user", "Hi"), ("assistant", TEXT)]
    return attempts - 1


def test_clients_with_ids_that_lose_their_connections_again_and_again_read_the_uncut_text(stack: Stack) -> None:
    project = stack.project()
    names = [f"cut-{case}" for case in range(20)]
    with ThreadPoolExecutor(6) as pool:
        cuts = list(pool.map(cut_again_and_again, repeat(project), names, map(random.Random, names)))
    assert sum(cuts) >= 20
    project.all_settled()
    rows = stack.query(
        "SELECT attributes ->> 'thread' AS thread, sum(output_tokens) AS output, count(*) AS requests"
        " FROM ledger.request_now WHERE project_id = $1 GROUP BY 1",
        project.project_id,
    )
    assert sorted(row["thread"] for row in rows) == sorted(names)
    whole = Reader(project, "uncut").stream(HI, sim=SLOW)
    assert whole.text == TEXT
    exactly = project.all_settled()[-1]["output_tokens"]
    # What is delivered is billed once; a word that was cut in two by a provider's restart may be one token more.
    for row in rows:
        assert exactly <= row["output"] <= exactly + row["requests"], row


def test_without_ids_a_reply_that_the_provider_broke_goes_on_where_it_was(reader: Reader) -> None:
    first = reader.stream(HI, sim={**SLOW, "reset_after_chunks": 20})
    assert first.error is not None
    assert first.error["code"] == "upstream_error"
    second = reader.stream(HI, sim=SLOW)
    assert second.error is None
    assert first.text + second.text == TEXT
    sent = sent_to_the_provider(reader.project, second)
    assert sent[-2] == {"role": "assistant", "content": first.text}
    assert "Continue it exactly where it ends" in sent[-1]["content"]
    (row,) = [row for row in reader.project.all_settled() if row["request_id"] == second.headers["x-request-id"]]
    assert row["facts"]["attempt"] == 2
    third = reader.stream(HI, sim={"text": "Another turn."})
    assert third.text == "Another turn."
    assert len(messages_of(reader, reader.headers["X-Thread-Id"], number=4)) == 4


def test_who_has_only_read_the_threads_messages_goes_on_where_the_broken_reply_ends(reader: Reader) -> None:
    first = reader.stream(HI, more={"X-Event-Ids": "1"}, sim={**SLOW, "reset_after_chunks": 20})
    path = f"/v1/threads/{reader.headers['X-Thread-Id']}/messages"

    def broken() -> dict[str, Any] | None:
        last = reader.get(path).json()[-1]
        return last if last["content"] == first.text else None

    last = wait_until(broken, what="the broken reply's text")
    assert last["complete"] is False
    assert last["last_event_id"] == first.ids[-1]
    rest = reader.stream(HI, more={"Last-Event-ID": last["last_event_id"]}, sim=SLOW)
    assert last["content"] + rest.text == TEXT
    messages = messages_of(reader, reader.headers["X-Thread-Id"], number=2)
    assert texts(messages) == [("user", "Hi"), ("assistant", TEXT)]
    assert not any("last_event_id" in message for message in messages)


def test_the_messages_of_a_thread_have_what_its_client_has_read_of_a_reply_that_is_still_under_way(
    reader: Reader,
) -> None:
    path = f"/v1/threads/{reader.headers['X-Thread-Id']}/messages"
    heard, looked = Heard(), 0
    url, headers = reader.base_url + "/v1/chat/completions", {**reader.headers, "X-Event-Ids": "1"}
    body = {"messages": [HI], "stream": True, "sim": {**SLOW, "chunk_interval_ms": 20}}
    with httpx.stream("POST", url, headers=headers, json=body, timeout=30) as answer:
        for line in answer.iter_lines():
            heard.line(line)
            if heard.text and heard.events in (2, 9, 30) and line.startswith("data: {"):
                question, reply = reader.get(path).json()
                assert question["content"] == "Hi"
                assert reply["content"].startswith(heard.text)
                assert TEXT.startswith(reply["content"])
                assert int(reply["last_event_id"].partition("-")[2]) >= heard.events
                looked += 1
    assert looked == 3
    assert heard.text == TEXT


def test_a_whole_reply_is_replayed_from_any_event_and_costs_nothing(reader: Reader) -> None:
    heard = reader.stream(HI, more={"X-Event-Ids": "1"}, sim={"text": "All of it is here."})
    messages_of(reader, reader.headers["X-Thread-Id"], number=2)
    before = len(reader.project.all_settled())
    for number in (0, 1, 3, len(heard.ids)):
        generation = heard.ids[0].split("-")[0]
        again = reader.stream(HI, more={"Last-Event-ID": f"{generation}-{number}"})
        assert (again.status, again.is_done, again.error) == (200, True, None)
        assert again.ids == heard.ids[number:]
    assert len(reader.project.all_settled()) == before
    assert len(messages_of(reader, reader.headers["X-Thread-Id"], number=2)) == 2


def test_what_does_not_stream_goes_on_too_and_is_given_whole(reader: Reader) -> None:
    first = reader.ask(HI, sim={**SLOW, "reset_after_chunks": 9})
    assert first.status_code == 502
    second = reader.ask(HI, sim=SLOW)
    assert second.json()["choices"][0]["message"]["content"] == TEXT
    assert second.json()["usage"]["completion_tokens"] < 60


def test_the_callers_own_limit_holds_for_all_attempts_together(reader: Reader) -> None:
    first = reader.stream(HI, max_tokens=30, sim={**SLOW, "reset_after_chunks": 20})
    second = reader.stream(HI, max_tokens=30, sim=SLOW)
    seen = reader.project.stack.sim_request(second.headers["x-request-id"])
    assert seen is not None
    assert seen["body"]["max_completion_tokens" if "max_completion_tokens" in seen["body"] else "max_tokens"] == 10
    assert TEXT.startswith(first.text + second.text)


@pytest.mark.parametrize("capability", ["None", "Prefix", "ContinueFinalMessage"])
def test_how_a_provider_continues_is_its_own(stack: Stack, capability: str) -> None:
    project = stack.project(upstream=f"  capabilities: {{continuation: {capability}}}")
    reader = Reader(project, "t")
    first = reader.stream(HI, sim={**SLOW, "reset_after_chunks": 10})
    second = reader.stream(HI, sim=SLOW)
    if capability == "None":
        assert (second.status, second.error and second.error["code"]) == (409, "cannot_continue")
        assert second.headers["x-should-retry"] == "false"
        assert reader.stream({"role": "user", "content": "Another one"}, sim={"text": "Yes."}).text == "Yes."
        return
    assert first.text + second.text == TEXT
    seen = project.stack.sim_request(second.headers["x-request-id"])
    assert seen is not None
    last = seen["body"]["messages"][-1]
    assert last["content"] == first.text
    if capability == "Prefix":
        assert last["prefix"] is True
    else:
        assert (seen["body"]["continue_final_message"], seen["body"]["add_generation_prompt"]) == (True, False)


def test_a_reply_that_broke_inside_a_tool_call_cannot_be_continued(reader: Reader) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    reader.stream(HI, tools=tools, sim={"tool_calls": 1, "output_tokens": 40, "reset_after_chunks": 5})
    heard = reader.stream(HI, tools=tools)
    assert (heard.status, heard.error and heard.error["code"]) == (409, "cannot_continue")


def test_a_reply_that_still_runs_for_a_client_that_is_gone_unnoticed_is_taken_over(reader: Reader) -> None:
    with httpx.stream(
        "POST",
        reader.base_url + "/v1/chat/completions",
        headers={**reader.headers, "X-Event-Ids": "1"},
        json={"messages": [HI], "stream": True, "sim": {**SLOW, "chunk_interval_ms": 120}},  # six seconds in all
        timeout=30,
    ) as answer:
        first = Heard()
        lines = answer.iter_lines()
        for line in lines:
            first.line(line)
            if first.events >= 8:
                break
        second = reader.stream(HI, more={"Last-Event-ID": first.ids[-1]}, sim=SLOW)
        assert (second.status, second.error) == (200, None)
        for line in lines:
            first.line(line)
    assert first.error is not None
    assert first.error["code"] == "conflict"
    # What the first connection got beyond its last id, the second one got again: by its ids that is seen.
    known = dict.fromkeys(first.ids[:8])
    assert first.ids[8 : len(first.ids)] == second.ids[: len(first.ids) - 8]
    assert len(known) == 8
    assert second.text
    assert TEXT.endswith(second.text)


def test_another_sidecar_takes_a_broken_reply_over(stack: Stack, reader: Reader) -> None:
    with stack.another_sidecar() as base_url:
        first = reader.stream(HI, more={"X-Event-Ids": "1"}, leave_after=15, sim=SLOW)
        elsewhere = Reader(reader.project, reader.headers["X-Thread-Id"], base_url=base_url)
        second = elsewhere.stream(HI, more={"Last-Event-ID": first.ids[-1]}, sim=SLOW)
        assert (second.status, second.error) == (200, None)
        assert first.text + second.text == TEXT


def test_the_unmodified_openai_client_repeats_a_call_and_reads_on(reader: Reader) -> None:
    text = ""
    with openai.OpenAI(
        base_url=reader.base_url + "/v1", api_key=reader.headers["Authorization"].partition(" ")[2], max_retries=0
    ) as client:
        for attempt in range(6):
            sim = {**SLOW, "reset_after_chunks": 10} if attempt == 0 else SLOW
            stream = client.chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": "Hi"}],
                stream=True,
                extra_headers={"X-Thread-Id": reader.headers["X-Thread-Id"]},
                extra_body={"sim": sim},
            )
            try:
                for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
            except openai.APIError:
                continue
            break
    assert text == TEXT
