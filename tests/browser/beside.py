"""Work for asyncio beside Playwright, whose event loop occupies the thread of the tests."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stack import Stack

_thread = ThreadPoolExecutor(1, thread_name_prefix="beside")


def beside(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in the one other thread, and return what it gives or raises."""
    return _thread.submit(work, *arguments).result()


class StackBeside(Stack):
    """A stack that can be asked while a browser runs."""

    def run(self, work: Any) -> Any:
        """As its own, in the other thread."""
        return beside(super().run, work)

    def close(self) -> None:
        """As its own, in the other thread."""
        beside(super().close)

    @classmethod
    def of(cls, stack: Stack) -> "StackBeside":
        """The same stack."""
        return cls(**vars(stack))
