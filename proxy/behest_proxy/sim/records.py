"""What the simulator remembers of each request, for tests that must know what really happened upstream."""

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

MAX_RECORDS = 10_000
_MAX_MEMBER_BYTES = 2_048
_MAX_MEMBERS = 64
_MAX_HEADERS = 32
_MAX_HEADER_BYTES = 256
_SECRET_HEADERS = frozenset({b"authorization", b"proxy-authorization", b"api-key", b"x-api-key", b"cookie"})


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request and what became of it.

    `*_at` is `time.time()`, `*_ns` is `time.time_ns()`, `*_monotonic_ns` is CLOCK_MONOTONIC, which every
    process of one Linux machine shares; a request is received when its body is whole. `outcome` is `open` until
    the answer ended, then `completed`, `refused`, `reset`, `ended_early`, `error_event` or `stalled` as it was
    told to, or `cancelled` where the client went first.
    """

    id: str
    method: str
    path: str
    http_version: str
    headers: dict[str, str]
    received_at: float
    received_ns: int
    received_monotonic_ns: int
    model: str | None = None
    body: dict[str, Any] | None = None
    prompt_tokens: int = 0
    status: int | None = None
    outcome: str = "open"
    chunks_sent: int = 0
    output_tokens_sent: int = 0
    body_bytes_sent: int = 0
    reported_usage: dict[str, Any] | None = None
    first_chunk_monotonic_ns: int | None = None
    last_chunk_monotonic_ns: int | None = None
    ended_at: float | None = None
    ended_ns: int | None = None
    ended_monotonic_ns: int | None = None
    cancelled_at: float | None = None
    cancelled_ns: int | None = None
    cancelled_monotonic_ns: int | None = None
    reset_code: int | None = None
    """The error code of the client's RST_STREAM; None where the connection closed."""

    def end(self, outcome: str) -> None:
        """Stamps the end of the answer. A stall is not an end: the client may still go."""
        self.outcome = outcome
        if outcome != "stalled":
            self.ended_at, self.ended_ns, self.ended_monotonic_ns = _now()

    def cancel(self, reset_code: int | None) -> None:
        """Stamps that the client went before the end."""
        self.outcome = "cancelled"
        self.cancelled_at, self.cancelled_ns, self.cancelled_monotonic_ns = _now()
        self.ended_at, self.ended_ns, self.ended_monotonic_ns = (
            self.cancelled_at,
            self.cancelled_ns,
            self.cancelled_monotonic_ns,
        )
        self.reset_code = reset_code


def _now() -> tuple[float, int, int]:
    monotonic_ns = time.monotonic_ns()
    return time.time(), time.time_ns(), monotonic_ns


class RequestLog:
    """The latest requests, oldest first; the oldest go when there are more than `MAX_RECORDS`."""

    def __init__(self) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=MAX_RECORDS)
        self._count = 0

    def __len__(self) -> int:
        return len(self._records)

    def add(
        self,
        *,
        method: str,
        path: str,
        http_version: str,
        headers: Iterable[tuple[bytes, bytes]],
        request_id: str | None,
    ) -> RequestRecord:
        """Remembers a request that has just come in; without `request_id` it gets one of ours."""
        self._count += 1
        received_at, received_ns, received_monotonic_ns = _now()
        record = RequestRecord(
            id=request_id or f"sim-{self._count}",
            method=method,
            path=path,
            http_version=http_version,
            headers=_bounded_headers(headers),
            received_at=received_at,
            received_ns=received_ns,
            received_monotonic_ns=received_monotonic_ns,
        )
        self._records.append(record)
        return record

    def find(self, *, request_id: str | None = None, limit: int | None = None) -> list[RequestRecord]:
        """The records, of this id only if one is given, and the latest `limit` of them."""
        found = [record for record in self._records if request_id is None or record.id == request_id]
        return found if limit is None else found[max(0, len(found) - limit) :]

    def clear(self) -> None:
        """Forgets all requests; those that are still open go on."""
        self._records.clear()


def _bounded_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    kept: dict[str, str] = {}
    for name, value in headers:
        if len(kept) >= _MAX_HEADERS:
            break
        shown = b"(not kept)" if name in _SECRET_HEADERS else value[:_MAX_HEADER_BYTES]
        kept[name.decode("latin-1")] = shown.decode("latin-1")
    return kept


def bounded_body(body: bytes) -> dict[str, Any] | None:
    """The members of a JSON object; a long one is replaced by its size, and None stands for no object."""
    try:
        members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        kept: dict[str, Any] = {}
        for name, value in list(members.items())[:_MAX_MEMBERS]:
            size = len(bytes(value))
            is_long = size > _MAX_MEMBER_BYTES
            kept[name] = f"({size} bytes)" if is_long else msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return kept
