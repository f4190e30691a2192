"""An event loop for tests of things that wait: no time passes but that which is told."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _Selector(selectors.SelectSelector):
    """Nobody waits: the time that would have been waited is only told."""

    waited_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everybody waits for somebody"
        self.waited_s += timeout
        return super().select(0)


class Clockwork(asyncio.SelectorEventLoop):
    """An event loop whose time passes as fast as things are done in it."""

    def __init__(self) -> None:
        self.selector = _Selector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.waited_s


def run(work: Coroutine[None, None, None]) -> None:
    """Run to the end, at once, however long it takes."""
    with asyncio.Runner(loop_factory=Clockwork) as runner:
        runner.run(work)
