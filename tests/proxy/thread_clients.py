"""A client of threads, and what it heard: for tests of what is kept."""

import asyncio
import json
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from behest_ledger.store.pool import connect
from stack import Project, Stack, wait_until

HI = {"role": "user", "content": "Hi"}


class Reader:
    """A client of one thread."""

    def __init__(self, project: Project, thread: str | None, *, user: str = "u1", base_url: str | None = None) -> None:
        self.project = project
        self.headers = {"Authorization": f"Bearer {project.mint(user=user)}"}
        if thread is not None:
            self.headers["X-Thread-Id"] = thread
        self.base_url = base_url or project.stack.base_url

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.base_url + path, headers=self.headers, timeout=30)

    def delete(self, path: str) -> httpx.Response:
        return httpx.delete(self.base_url + path, headers=self.headers, timeout=30)

    def ask(self, *messages: Any, more: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        """A call that does not stream."""
        return httpx.post(
            self.base_url + "/v1/chat/completions",
            headers={**self.headers, **(more or {})},
            json={"messages": list(messages), **body},
            timeout=30,
        )

    def stream(
        self,
        *messages: Any,
        leave_after: int | None = None,
        more: dict[str, str] | None = None,
        begun: threading.Event | None = None,
        **body: Any,
    ) -> "Heard":
        """A call that streams; its client may leave after so many events. `begun` is set at the first one."""
        heard = Heard()
        with httpx.stream(
            "POST",
            self.base_url + "/v1/chat/completions",
            headers={**self.headers, **(more or {})},
            json={"messages": list(messages), "stream": True, **body},
            timeout=30,
        ) as answer:
            heard.status = answer.status_code
            heard.headers = dict(answer.headers)
            if answer.status_code != 200:
                heard.error = json.loads(answer.read())["error"]
                return heard
            if leave_after == 0:
                return heard
            for line in answer.iter_lines():
                heard.line(line)
                if heard.events and begun is not None:
                    begun.set()
                if leave_after is not None and heard.events >= leave_after:
                    break
        return heard


class Heard:
    """What a client of a stream got."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.text = ""
        self.events = 0
        self.ids: list[str] = []
        self.error: dict[str, Any] | None = None
        self.is_done = False

    def line(self, line: str) -> None:
        if line.startswith("id: "):
            self.ids.append(line[4:])
        elif line == "data: [DONE]":
            self.is_done = True
        elif line.startswith("data: "):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                self.error = chunk["error"]
                return
            self.events += 1
            for choice in chunk["choices"]:
                self.text += choice["delta"].get("content") or ""


def sent_to_the_provider(project: Project, answer: httpx.Response | Heard) -> list[dict[str, Any]]:
    """The messages that the simulator was asked with."""
    headers = answer.headers
    seen = project.stack.sim_request(headers["x-request-id"])
    assert seen is not None
    found: list[dict[str, Any]] = seen["body"]["messages"]
    return found


def messages_of(reader: Reader, thread: str, *, number: int) -> list[dict[str, Any]]:
    """The thread's messages, once there are so many and the last reply is whole."""

    def found() -> list[dict[str, Any]] | None:
        answer = reader.get(f"/v1/threads/{thread}/messages")
        rows = answer.json()
        return rows if answer.status_code == 200 and len(rows) >= number and rows[-1]["complete"] else None

    rows: list[dict[str, Any]] = wait_until(found, what=f"{number} messages of {thread}")
    return rows


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


@contextmanager
def nothing_written(stack: Stack, table: str) -> Generator[None]:
    """What is written to this table of the ledger waits for the end of the block, and reading does not."""
    is_locked, is_over = threading.Event(), threading.Event()

    async def hold() -> None:
        connection = await connect(stack.dsn)
        try:
            async with connection.transaction():
                await connection.execute(f"LOCK TABLE ledger.{table} IN SHARE ROW EXCLUSIVE MODE")
                is_locked.set()
                await asyncio.to_thread(is_over.wait, 60)
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(lambda: asyncio.run(hold()))
        assert is_locked.wait(30)
        try:
            yield
        finally:
            is_over.set()
            held.result(30)
