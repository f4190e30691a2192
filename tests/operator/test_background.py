"""Tasks of the operator: none ends unseen."""

import asyncio
from typing import Any

import kopf
import pytest

from behest_operator.background import Background
from behest_proxy.cli.preflight import free_port


async def for_ever() -> None:
    await asyncio.Event().wait()


async def faulty() -> None:
    raise ValueError("no such time")


async def at_an_end() -> None:
    pass


@pytest.mark.parametrize(("work", "says"), [(faulty, "ValueError: no such time"), (at_an_end, "status ended")])
def test_a_task_that_ends_by_itself_stops_the_process_and_says_why(
    work: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        background = Background()
        background.begin("keeper", for_ever())
        background.begin("status", work())
        await asyncio.wait_for(background.stopped.wait(), 10)
        await background.end_all()

    asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    assert says in caplog.text


def test_a_task_that_is_ended_for_another_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        background = Background()
        background.begin("keeper", for_ever())
        await background.end("keeper")
        background.begin("keeper", for_ever())
        await background.end_all()
        assert not background.stopped.is_set()

    asyncio.run(main())
    assert caplog.text == ""


def test_kopf_ends_when_a_task_does() -> None:
    background = Background()
    registry = kopf.OperatorRegistry()
    ended: list[bool] = []

    @kopf.on.login(registry=registry)
    def log_in(**_: Any) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(server=f"http://127.0.0.1:{free_port(0)}")

    @kopf.on.startup(registry=registry)
    async def start(**_: Any) -> None:
        background.begin("status", faulty())

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        await background.end_all()
        ended.append(background.stopped.is_set())

    async def main() -> None:
        run = kopf.operator(registry=registry, standalone=True, clusterwide=True, stop_flag=background.stopped)
        await asyncio.wait_for(run, 30)

    asyncio.run(main())
    assert ended == [True]
