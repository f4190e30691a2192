"""Tokens and questions over the network, for programs without asyncio. What they mean is decided elsewhere."""

import contextlib
import threading
import time
from collections.abc import Generator
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

__all__ = ["SyncTransport"]

Answer = TypeVar("Answer")
_MINT_LOCKS = 64
"""Identities share locks, so that their number is bounded; two users rarely wait for each other."""


class SyncTransport:
    """One client's connections and tokens. For any number of threads."""

    def __init__(
        self,
        settings: Settings,
        http: httpx2.Client,
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
        self._cache_lock = threading.Lock()
        self._mint_locks = [threading.Lock() for _ in range(_MINT_LOCKS)]

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def retries(self) -> Retries:
        """For one call."""
        return Retries(self._retries_max)

    def token(self, identity: Identity) -> Token:
        """A good token for this identity: kept, signed here, or asked for, once for all who wait for it."""
        token = self._kept(identity)
        if token is not None:
            return token
        with self._mint_locks[hash(identity) % _MINT_LOCKS]:
            token = self._kept(identity)  # somebody else may have asked meanwhile
            if token is not None:
                return token
            with self._cache_lock:
                session_id = self._cache.session_for(identity)
            token = self._made(identity, session_id)
            with self._cache_lock:
                self._cache.put(identity, token)
            return token

    def _kept(self, identity: Identity) -> Token | None:
        with self._cache_lock:
            return self._cache.get(identity, time.time())

    def _made(self, identity: Identity, session_id: str) -> Token:
        now_s = time.time()
        if self._signer is not None:
            return self._signer.sign(identity, session_id=session_id, token_id=str(uuid4()), now_s=now_s)
        request = self._http.build_request(**mint_request(self.settings, identity, session_id))
        answer = self._asked(request, is_safe=True)
        return minted(answer, session_id=session_id, ttl_s=identity.ttl_s, now_s=now_s)

    def perform(self, call: Call[Answer], whom: Whom) -> Answer:
        """Ask a small question."""
        url = self.settings.base_url + call.path
        with self._believed(whom) as token:
            headers = headers_of(token, whom)
            request = self._http.build_request(call.method, url, params=dict(call.query), headers=headers)
            return call.parse(self._asked(request, is_safe=call.is_safe))

    def whole(self, call: ChatCall) -> Any:
        """A completion in one piece: its JSON."""
        with self._believed(call.whom) as token:
            request = self._http.build_request(**chat_request(self.settings, call, token))
            self._patience(request, call.timeout_s)
            return self._asked(request, is_safe=call.has_key)

    def connect(self, call: ChatCall) -> httpx2.Response:
        """Begin a stream, or go on with it. Raises `BehestError` where the answer is none."""
        with self._believed(call.whom) as token:
            request = self._http.build_request(**chat_request(self.settings, call, token))
            self._patience(request, call.timeout_s or self._timeout_s)
            answer = self._sent(request, is_stream=True)
            self._patience(answer.request, call.timeout_s or self._idle_timeout_s)
            return answer

    @staticmethod
    def _patience(request: httpx2.Request, silence_s: float | None) -> None:
        if silence_s is not None:
            request.extensions["timeout"]["read"] = silence_s

    @contextlib.contextmanager
    def _believed(self, whom: Whom) -> Generator[str]:
        """The token for a call; one that was not believed is not used again."""
        if given := whom.get("token"):
            yield given
            return
        identity = identity_of(self.settings, whom)
        token = self.token(identity)
        try:
            yield token.value
        except BehestAuthError as error:
            if not isinstance(error, BehestForbiddenError):
                with self._cache_lock:
                    self._cache.refuse(identity, token.value)
            raise

    def _asked(self, request: httpx2.Request, *, is_safe: bool) -> Any:
        retries = self.retries()
        while True:
            try:
                return decoded(self._sent(request).content)
            except BehestError as failure:
                # What answers with an error has charged nothing; what does not answer may have.
                safe = is_safe or not isinstance(failure, BehestConnectionError)
                wait_s = retries.wait_s(failure, is_safe=safe)
                if wait_s is None:
                    raise
            time.sleep(wait_s)

    def _sent(self, request: httpx2.Request, *, is_stream: bool = False) -> httpx2.Response:
        try:
            answer = self._http.send(request, stream=True)
            if answer.is_success and is_stream:
                return answer
            try:
                body = answer.read()
            finally:
                answer.close()
        except NETWORK_ERRORS as error:
            raise network_failure(error) from error
        if not answer.is_success:
            raise answer_error(answer.status_code, answer.headers, body)
        return answer
