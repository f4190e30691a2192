"""Fetching an external issuer's key set: a bounded GET to an address that the configuration names, and nowhere else.

Whoever writes a project's configuration chooses the URL, so it is asked as a stranger would ask it: without
credentials, without following a redirect, https except on loopback, never an address of a private network by number,
and nothing of the answer is ever shown. A host name that resolves into a private network is asked all the same: issuers
inside a cluster are like that; where projects are written by people who must not reach it, forbid it in the network.
"""

import asyncio

from behest_ledger.configuration.validation import keys_url_problems
from behest_proxy.identity.external import KEYS_BYTES_MAX
from behest_proxy.upstream import UpstreamCall, UpstreamClient, UpstreamFailure, UpstreamRequest

FETCH_TIMEOUT_S = 5.0


async def fetch_keys(client: UpstreamClient, url: str) -> bytes:
    """The document at `url`. Raises `OSError` and `ValueError` saying why there is none."""
    for _, reason in keys_url_problems("", url):
        raise ValueError(reason)
    document: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    handler = _Document(document)
    request = UpstreamRequest(
        method="GET",
        url=url,
        headers=[(b"accept", b"application/json"), (b"accept-encoding", b"identity"), (b"user-agent", b"behest")],
        connect_timeout_s=FETCH_TIMEOUT_S,
        first_byte_timeout_s=FETCH_TIMEOUT_S,
        idle_timeout_s=FETCH_TIMEOUT_S,
    )
    call: UpstreamCall = client.send(request, handler)
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            return await document
    except TimeoutError:
        raise OSError(f"no whole answer within {FETCH_TIMEOUT_S:g} s") from None
    finally:
        call.cancel()


class _Document:
    """Collects an answer, up to its limit."""

    def __init__(self, done: "asyncio.Future[bytes]") -> None:
        self._done = done
        self._data = bytearray()

    def on_request_sent(self) -> None:
        """Nothing to do."""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Only a plain 200 will do: a redirect leads where nobody said."""
        if status != 200:
            self._fail(OSError(f"the answer is {status}"))
        elif any(name == b"content-encoding" and value.lower() != b"identity" for name, value in headers):
            self._fail(ValueError("the answer is compressed, though that was not asked for"))

    def on_data(self, data: bytes) -> None:
        """Keep it, if it is not too much."""
        self._data += data
        if len(self._data) > KEYS_BYTES_MAX:
            self._fail(ValueError(f"the answer is over {KEYS_BYTES_MAX} bytes"))

    def on_end(self) -> None:
        """All is there."""
        if not self._done.done():
            self._done.set_result(bytes(self._data))

    def on_failure(self, failure: UpstreamFailure) -> None:
        """Nothing more will come."""
        self._fail(OSError(failure.message))

    def on_broken(self) -> None:
        """Our own fault."""
        self._fail(OSError("the answer could not be taken"))

    def _fail(self, error: Exception) -> None:
        self._data.clear()
        if not self._done.done():
            self._done.set_exception(error)
