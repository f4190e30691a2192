"""A scripted gateway for each test, and waits that take no time."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from behest.testing import Gateway, running_gateway


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    with running_gateway() as running:
        yield running


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of the clients, which are written down and skipped."""
    waited: list[float] = []
    sleep = asyncio.sleep

    async def skipped(delay: float) -> None:
        waited.append(delay)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", skipped)
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited
