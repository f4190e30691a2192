"""A stream of chunks for asyncio: reads, waits, connects again."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Self

import httpx2
from openai.types.chat import ChatCompletionChunk

from behest.calls import NETWORK_ERRORS, ChatCall
from behest.errors import BehestError
from behest.retries import Retries
from behest.stream_state import DRAIN_S, StreamState

__all__ = ["ChatStream"]


class ChatStream(StreamState):
    """The chunks of one answer.

    Leaving the loop (`break`, an exception, a cancelled task) ends the call: the provider stops, and nothing more is
    charged. With a `thread_id` a connection that is cut is made again, and the text goes on without gap or repetition.
    """

    def __init__(
        self, connect: Callable[[ChatCall], Awaitable[httpx2.Response]], call: ChatCall, retries: Retries
    ) -> None:
        """Made by the client: `await behest.chat.completions.create(..., stream=True)`."""
        super().__init__(call, retries)
        self._connect = connect
        self._answer: httpx2.Response | None = None
        self._body: AsyncIterator[bytes] | None = None

    async def begin(self) -> None:
        """Connect. The client does it."""
        try:
            await self._connected()
        except BehestError as failure:
            await self._connect_again(failure)

    async def __anext__(self) -> ChatCompletionChunk:
        """The next chunk. Unlike a loop it leaves the call open: close it, or use `async with`."""
        self._check_open()
        while not self._pending:
            if self._is_ended:
                raise StopAsyncIteration
            await self._more()
        return self._pending.popleft()

    async def __aiter__(self) -> AsyncGenerator[ChatCompletionChunk]:
        """A generator: Python closes it as soon as its loop is left, and with it the call."""
        try:
            while True:
                try:
                    chunk = await self.__anext__()
                except StopAsyncIteration:
                    return
                yield chunk
        finally:
            await self.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the call."""
        self._leave()
        await self._disconnect()

    async def _more(self) -> None:
        """One read, or what follows from the end of a connection."""
        reply = self._reply
        if reply.is_over:
            if reply.failure is not None:
                await self._disconnect()
                await self._connect_again(reply.failure)
                return
            self._is_ended = True
            await self._drain()
            await self._disconnect()
            return
        assert self._body is not None
        try:
            self._received(await anext(self._body))
        except StopAsyncIteration:
            reply.ended()
        except NETWORK_ERRORS as error:
            reply.ended(f"{type(error).__name__}: {error}".rstrip(": "))

    async def _drain(self) -> None:
        """The connection can be used again only when its body was read to the end."""
        body: Any = self._body
        with contextlib.suppress(TimeoutError, *NETWORK_ERRORS):
            async with asyncio.timeout(DRAIN_S):
                async for _ in body:
                    pass

    async def _connected(self) -> None:
        self._answer = await self._connect(self._next_call())
        self._body = self._answer.aiter_bytes()
        self._begun(self._answer.headers)

    async def _connect_again(self, failure: BehestError) -> None:
        while True:
            await asyncio.sleep(self._wait_s(failure))
            try:
                await self._connected()
            except BehestError as again:
                failure = again
            else:
                return

    async def _disconnect(self) -> None:
        if self._answer is not None:
            await self._answer.aclose()
