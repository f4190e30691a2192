"""A stream of chunks for programs without asyncio: reads, waits, connects again."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import Self, cast

import httpx2
from openai.types.chat import ChatCompletionChunk

from behest.calls import NETWORK_ERRORS, ChatCall
from behest.errors import BehestError
from behest.retries import Retries
from behest.stream_state import DRAIN_S, StreamState

__all__ = ["ChatStreamSync"]


class ChatStreamSync(StreamState):
    """The chunks of one answer.

    Leaving the loop (`break`, an exception) ends the call: the provider stops, and nothing more is charged. With a
    `thread_id` a connection that is cut is made again, and the text goes on without gap or repetition.
    """

    def __init__(self, connect: Callable[[ChatCall], httpx2.Response], call: ChatCall, retries: Retries) -> None:
        """Made by the client: `behest.chat.completions.create(..., stream=True)`."""
        super().__init__(call, retries)
        self._connect = connect
        self._answer: httpx2.Response | None = None
        self._body: Iterator[bytes] = iter(())

    def begin(self) -> None:
        """Connect. The client does it."""
        try:
            self._connected()
        except BehestError as failure:
            self._connect_again(failure)

    def __next__(self) -> ChatCompletionChunk:
        """The next chunk. Unlike a loop it leaves the call open: close it, or use `with`."""
        self._check_open()
        while not self._pending:
            if self._is_ended:
                raise StopIteration
            self._more()
        return self._pending.popleft()

    def __iter__(self) -> Generator[ChatCompletionChunk]:
        """A generator: Python closes it as soon as its loop is left, and with it the call."""
        try:
            while True:
                try:
                    chunk = self.__next__()
                except StopIteration:
                    return
                yield chunk
        finally:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the call."""
        self._leave()
        self._disconnect()

    def _more(self) -> None:
        """One read, or what follows from the end of a connection."""
        reply = self._reply
        if reply.is_over:
            if reply.failure is not None:
                self._disconnect()
                self._connect_again(reply.failure)
                return
            self._is_ended = True
            self._drain()
            self._disconnect()
            return
        try:
            self._received(next(self._body))
        except StopIteration:
            reply.ended()
        except NETWORK_ERRORS as error:
            reply.ended(f"{type(error).__name__}: {error}".rstrip(": "))

    def _drain(self) -> None:
        """The connection can be used again only when its body was read to the end (HTTP/2: as it is)."""
        answer = self._answer
        assert answer is not None
        if answer.http_version == "HTTP/2":
            return
        # What reads the body now has its limit of time since it began: another one takes over where it stands.
        answer.request.extensions["timeout"]["read"] = DRAIN_S
        given_up_s = time.monotonic() + DRAIN_S
        with contextlib.suppress(httpx2.StreamError, *NETWORK_ERRORS):
            for _ in cast("httpx2.SyncByteStream", answer.stream):
                if time.monotonic() > given_up_s:
                    return

    def _connected(self) -> None:
        self._answer = self._connect(self._next_call())
        self._body = self._answer.iter_bytes()
        self._begun(self._answer.headers)

    def _connect_again(self, failure: BehestError) -> None:
        while True:
            time.sleep(self._wait_s(failure))
            try:
                self._connected()
            except BehestError as again:
                failure = again
            else:
                return

    def _disconnect(self) -> None:
        if self._answer is not None:
            self._answer.close()
