"""Two sidecars behind one PgBouncer in transaction mode, while sessions of the server end in the middle."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from behest_ledger.store.pool import connect
from bouncer import PROGRAM, WHY_NOT, bouncer
from ledger.tenant_roles import login
from stack import Project, Stack, running_stack, wait_until

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)

QUESTION: list[Any] = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture
def stacks(database: str, tmp_path: Path) -> Iterator[list[Stack]]:
    """Two sidecars, one ledger, one login for all tenants, three sessions of the server."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with login(database) as role, bouncer(role, size=3) as through:
        settings: dict[str, Any] = {"BEHEST_DATABASE_URL": through, "BEHEST_DATABASE_POOLER": "transaction"}
        with (
            running_stack(database, folders[0], **settings) as one,
            running_stack(database, folders[1], **settings) as two,
        ):
            yield [one, two]
            assert one.verify().findings == []


async def story(project: Project, token: str, tokens: int, begun: asyncio.Semaphore | None = None) -> str:
    """Stream to the end; how it ended. At its first text, or its end, it releases `begun`."""
    async with openai.AsyncOpenAI(
        base_url=project.stack.base_url + "/v1", api_key=token, max_retries=0, timeout=60
    ) as client:
        try:
            sim = {"output_tokens": tokens, "chunk_interval_ms": 2}
            async for _ in await client.chat.completions.create(
                model="gpt-4o-mini", messages=QUESTION, stream=True, extra_body={"sim": sim}
            ):
                if begun is not None:
                    begun.release()
                    begun = None
        except openai.APIError as error:
            return str(error.code)
        finally:
            if begun is not None:
                begun.release()
    return "completed"


def test_streams_of_two_sidecars_outlive_sessions_that_end(stacks: list[Stack], database: str) -> None:
    projects = [stack.project() for stack in stacks]
    tokens = [[project.mint(session=f"s{number}") for number in range(10)] for project in projects]

    async def kill_sessions(owner: Any, begun: asyncio.Semaphore) -> int:
        for _ in range(20):
            await begun.acquire()  # an admission whose session ends is no stream
        killed = 0
        for _ in range(5):
            await asyncio.sleep(0.4)
            killed += await owner.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename LIKE 'test\\_%'"
                " AND datname = current_database()"
            )
        return int(killed)

    async def main() -> tuple[list[str], int]:
        owner = await connect(database)
        begun = asyncio.Semaphore(0)
        killing = asyncio.create_task(kill_sessions(owner, begun))
        stories = [
            story(project, token, 1500, begun) for project, mine in zip(projects, tokens, strict=True) for token in mine
        ]
        try:
            return list(await asyncio.gather(*stories)), await killing
        finally:
            await owner.close()

    ends, killed = stacks[0].run(main())
    assert killed >= 5, "the sidecars have sessions through the pooler"
    assert set(ends) <= {"completed", "ledger_unavailable"}, ends
    assert ends.count("completed") >= 10, ends

    def all_ended() -> bool:
        rows = stacks[0].query("SELECT count(*) AS open FROM ledger.hold WHERE state IN ('open', 'suspense')")
        return bool(rows[0]["open"] == 0)

    wait_until(all_ended, what="every settlement")
    time.sleep(0.1)
    for project in projects:
        assert stacks[0].run(story(project, project.mint(session="later"), 50)) == "completed"
        assert project.all_settled()[-1]["outcome"] == "completed"
