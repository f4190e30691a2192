"""Tokens and questions over the network, for asyncio. What they mean is decided elsewhere."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any, TypeVar
from uuid import uuid4

import httpx2

from behest.calls import (
    NETWORK_ERRORS,
    Call,
    ChatCall,
    Whom,
    chat_request,
    decoded,
    headers_of,
    identity_of,
    mint_request,
    network_failure,
)
from behest.errors import BehestAuthError, BehestConnectionError, BehestError, BehestForbiddenError, answer_error
from behest.retries import Retries
from behest.settings import Settings
from behest.tokens import Identity, Signer, Token, TokenCache, minted

__all__ = ["AsyncTransport"]

Answer = TypeVar("Answer")


class AsyncTransport:
    """One client's connections and tokens. For one event loop."""

    def __init__(
        self,
        settings: Settings,
        http: httpx2.AsyncClient,
        *,
        retries_max: int,
        tokens_max: int,
        timeout_s: float,
        idle_timeout_s: float,
    ) -> None:
        self.settings = settings
        self._http = http
        self._retries_max = retries_max
        self._timeout_s = timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._signer = Signer(settings) if settings.mode == "signing" else None
        self._cache = TokenCache(size=tokens_max, new_session_id=lambda: str(uuid4()))
        self._minting: dict[Identity, asyncio.Task[Token]] = {}
        """So that many calls at once for one user ask for one token."""

    async def aclose(self) -> None:
        """Ask for no more tokens, and close the connections."""
        for task in list(self._minting.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, BehestError):
                await task
        await self._http.aclose()

    def retries(self) -> Retries:
        """For one call."""
        return Retries(self._retries_max)

    async def token(self, identity: Identity) -> Token:
        """A good token for this identity: kept, signed here, or asked for, once for all who wait for it."""
        token = self._cache.get(identity, time.time())
        if token is not None:
            return token
        if self._signer is not None:
            session_id = self._cache.session_for(identity)
            token = self._signer.sign(identity, session_id=session_id, token_id=str(uuid4()), now_s=time.time())
            self._cache.put(identity, token)
            return token
        task = self._minting.get(identity)
        if task is None:
            task = asyncio.create_task(self._mint(identity))
            self._minting[identity] = task
            task.add_done_callback(lambda done: self._minted(identity, done))
        # Whoever stops waiting does not take the token from the others.
        return await asyncio.shield(task)

    def _minted(self, identity: Identity, task: asyncio.Task[Token]) -> None:
        del self._minting[identity]
        if not task.cancelled() and task.exception() is None:
            self._cache.put(identity, task.result())

    async def _mint(self, identity: Identity) -> Token:
        session_id, now_s = self._cache.session_for(identity), time.time()
        request = self._http.build_request(**mint_request(self.settings, identity, session_id))
        answer = await self._asked(request, is_safe=True)
        return minted(answer, session_id=session_id, ttl_s=identity.ttl_s, now_s=now_s)

    async def perform(self, call: Call[Answer], whom: Whom) -> Answer:
        """Ask a small question."""
        url = self.settings.base_url + call.path
        async with self._believed(whom) as token:
            headers = headers_of(token, whom)
            request = self._http.build_request(call.method, url, params=dict(call.query), headers=headers)
            return call.parse(await self._asked(request, is_safe=call.is_safe))

    async def whole(self, call: ChatCall) -> Any:
        """A completion in one piece: its JSON."""
        async with self._believed(call.whom) as token:
            request = self._http.build_request(**chat_request(self.settings, call, token))
            self._patience(request, call.timeout_s)
            return await self._asked(request, is_safe=call.has_key)

    async def connect(self, call: ChatCall) -> httpx2.Response:
        """Begin a stream, or go on with it. Raises `BehestError` where the answer is none."""
        async with self._believed(call.whom) as token:
            request = self._http.build_request(**chat_request(self.settings, call, token))
            self._patience(request, call.timeout_s or self._timeout_s)
            answer = await self._sent(request, is_stream=True)
            self._patience(answer.request, call.timeout_s or self._idle_timeout_s)
            return answer

    @staticmethod
    def _patience(request: httpx2.Request, silence_s: float | None) -> None:
        if silence_s is not None:
            request.extensions["timeout"]["read"] = silence_s

    @contextlib.asynccontextmanager
    async def _believed(self, whom: Whom) -> AsyncGenerator[str]:
        """The token for a call; one that was not believed is not used again."""
        if given := whom.get("token"):
            yield given
            return
        identity = identity_of(self.settings, whom)
        token = await self.token(identity)
        try:
            yield token.value
        except BehestAuthError as error:
            if not isinstance(error, BehestForbiddenError):
                self._cache.refuse(identity, token.value)
            raise

    async def _asked(self, request: httpx2.Request, *, is_safe: bool) -> Any:
        retries = self.retries()
        while True:
            try:
                return decoded((await self._sent(request)).content)
            except BehestError as failure:
                # What answers with an error has charged nothing; what does not answer may have.
                safe = is_safe or not isinstance(failure, BehestConnectionError)
                wait_s = retries.wait_s(failure, is_safe=safe)
                if wait_s is None:
                    raise
            await asyncio.sleep(wait_s)

    async def _sent(self, request: httpx2.Request, *, is_stream: bool = False) -> httpx2.Response:
        try:
            answer = await self._http.send(request, stream=True)
            if answer.is_success and is_stream:
                return answer
            try:
                body = await answer.aread()
            finally:
                await answer.aclose()
        except NETWORK_ERRORS as error:
            raise network_failure(error) from error
        if not answer.is_success:
            raise answer_error(answer.status_code, answer.headers, body)
        return answer
