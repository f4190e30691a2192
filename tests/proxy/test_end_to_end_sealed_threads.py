"""Threads of a sidecar that has a key: what lies in PostgreSQL is nobody's words, what clients read is."""

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Server, own_database
from proxy.thread_clients import HI, Reader, messages_of, texts
from stack import Project, Stack, running_stack, wait_until

ASKED, SAID, KEYED = "quixotic marmalade", "Zebulon flew over the inlet.", "Only under a key."
"""What nobody else says."""
QUESTION = {"role": "user", "content": f"I keep {ASKED}."}
SIM = {"text": SAID, "continue_assistant": True}


@pytest.fixture(scope="module")
def sealed(template: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A system of its own, whose sidecar has a master key."""
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "master-key").write_text(base64.b64encode(os.urandom(32)).decode() + "\n")
    key_file = str(folder / "master-key")
    with own_database(template, "sealed") as dsn, running_stack(dsn, folder, BEHEST_MASTER_KEY_FILE=key_file) as stack:
        yield stack
        assert stack.verify().findings == []


def _found(stack: Stack, *words: str) -> set[tuple[str, str]]:
    """Which of these words stand in which table of the ledger, as text or as the bytes of it, in whatever column."""
    tables = stack.query(
        "SELECT relname AS name FROM pg_class WHERE relnamespace = 'ledger'::regnamespace AND relkind = 'r'"
    )
    looked = " UNION ALL ".join(
        f"SELECT '{table['name']}' AS place, w.word FROM ledger.\"{table['name']}\" t, unnest($1::text[]) AS w (word)"
        " WHERE strpos(t::text, w.word) > 0 OR strpos(t::text, encode(convert_to(w.word, 'UTF8'), 'hex')) > 0"
        for table in tables
    )
    return {(row["word"], row["place"]) for row in stack.query(looked, list(words))}


def _speak(stack: Stack) -> tuple[Project, Reader, Any]:
    """A whole turn, a reply that broke off, and an answer that is kept under its key."""
    project = stack.project()
    reader = Reader(project, "secrets")
    reader.stream(QUESTION, more={"X-Event-Ids": "1"}, sim=SIM)
    messages_of(reader, "secrets", number=2)
    broken = reader.stream(
        {"role": "user", "content": "Again."}, more={"X-Event-Ids": "1"}, sim={**SIM, "reset_after_chunks": 3}
    )
    assert broken.error is not None
    alone = Reader(project, None)
    assert alone.ask(HI, more={"Idempotency-Key": "k"}, sim={"text": KEYED}).is_success

    def is_written() -> bool:
        sql = "SELECT state FROM ledger.generation WHERE tenant_id = $1 ORDER BY state"
        return [row["state"] for row in stack.query(sql, project.namespace)] == ["broken", "whole", "whole"]

    wait_until(is_written, what="the writing of all that was said")
    return project, reader, broken


def test_without_a_key_the_database_has_the_words_so_that_looking_for_them_means_something(stack: Stack) -> None:
    _speak(stack)
    expected = {(ASKED, "thread_message"), (SAID, "thread_message"), (KEYED, "generation")}
    assert expected <= _found(stack, ASKED, SAID, KEYED)


def test_with_a_key_nobodys_words_are_in_the_database_and_their_client_reads_them(sealed: Stack) -> None:
    _, reader, broken = _speak(sealed)
    words = (ASKED, SAID, KEYED, "Zebulon", "Again.")
    assert _found(sealed, *words) == set()
    assert not [one for one in words if one in sealed.log.read_text()]

    def read() -> list[dict[str, Any]] | None:
        found: list[dict[str, Any]] = reader.get("/v1/threads/secrets/messages").json()
        return found if len(found) == 4 and found[3].get("last_event_id") == broken.ids[-1] else None

    messages = wait_until(read, what="the broken reply")
    assert texts(messages)[:3] == [("user", QUESTION["content"]), ("assistant", SAID), ("user", "Again.")]
    assert messages[3]["content"] == broken.text
    rest = reader.stream({"role": "user", "content": "Again."}, more={"Last-Event-ID": broken.ids[-1]}, sim=SIM)
    assert broken.text + rest.text == SAID
    again = reader.stream({"role": "user", "content": "Again."}, more={"Last-Event-ID": broken.ids[0]})
    assert again.ids == [*broken.ids[1:], *rest.ids], "a replay, from what was sealed"


def test_another_key_opens_nothing_and_says_so(sealed: Stack, tmp_path: Path) -> None:
    _, reader, _ = _speak(sealed)
    (tmp_path / "another").write_text(base64.b64encode(os.urandom(32)).decode())
    with sealed.another_sidecar(BEHEST_MASTER_KEY_FILE=str(tmp_path / "another")) as base_url:
        stranger = Reader(reader.project, "secrets", base_url=base_url)
        for answer in (stranger.get("/v1/threads/secrets/messages"), stranger.ask(QUESTION)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "server_error")
            assert "cannot be read here" in answer.json()["error"]["message"]
    assert texts(reader.get("/v1/threads/secrets/messages").json())[1] == ("assistant", SAID)


def test_a_deleted_thread_leaves_no_row_that_a_key_could_open(sealed: Stack) -> None:
    _, reader, _ = _speak(sealed)
    # Events of a reply are there for as long as its row is.
    sql = """SELECT (SELECT count(*) FROM ledger.thread_message WHERE tenant_id = $1) AS messages, (SELECT count(*)
             FROM ledger.generation WHERE tenant_id = $1 AND thread_key IS NOT NULL) AS replies"""
    (before,) = sealed.query(sql, reader.project.namespace)
    assert (before["messages"], before["replies"]) == (4, 2)
    assert reader.delete("/v1/threads/secrets").status_code == 204
    (after,) = sealed.query(sql, reader.project.namespace)
    assert (after["messages"], after["replies"]) == (0, 0)
