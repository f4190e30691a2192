"""What belongs to one HTTP request from the border on: its ids and the headers that every answer carries."""

import os
import re
import time
from collections.abc import Iterable
from typing import Any, cast
from uuid import UUID

from behest_ledger.configuration.snapshot import ProjectEntry
from behest_ledger.request_id import request_id

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")
"""W3C Trace Context, section 3.2; a later version may have more behind."""

EXPOSED_HEADERS = ", ".join(
    (
        "x-trace-id",
        "x-request-id",
        "retry-after",
        "x-should-retry",
        *(f"x-ratelimit-{what}-{unit}" for unit in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
    )
).encode()
"""What a browser lets scripts of other origins read of an answer. One by one: a `*` inside a name means nothing to it
(Fetch Standard, "Access-Control-Expose-Headers"), and one alone means nothing where credentials are sent."""


class RequestContext:
    """Made by the border, found by everybody else in the scope."""

    __slots__ = ("allow_origin", "by_pod", "host", "host_project", "origin", "rate_headers", "request_id", "trace_id")

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], *, by_pod: bool = False) -> None:
        self.by_pod = by_pod
        """Whether it came over the pod's own loopback, where the workload needs no token."""
        self.request_id: UUID = request_id(time.time_ns() // 1_000_000, int.from_bytes(os.urandom(10)))
        """Ours, and also the id of the hold: never a provider's or a client's."""
        self.trace_id = b""
        self.origin = b""
        self.host = b""
        self.host_project: ProjectEntry | None = None
        """The project whose slug the request's host is; only its tokens and API keys are good here."""
        self.rate_headers: list[tuple[bytes, bytes]] = []
        """How the rates of the caller's tier stand, once the ledger has said so."""
        self.allow_origin = False
        """Whether a script of that origin may read the answer."""
        for name, value in headers:
            if name == b"traceparent":
                match = _TRACEPARENT.fullmatch(value)
                if match and match[1].strip(b"0"):
                    self.trace_id = match[1]
            elif name == b"origin":
                self.origin = value
            elif name == b"host":
                self.host = value
        if not self.trace_id:
            self.trace_id = os.urandom(16).hex().encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that every answer carries."""
        headers = [(b"x-request-id", str(self.request_id).encode()), (b"x-trace-id", self.trace_id), *self.rate_headers]
        if self.origin:
            headers.append((b"vary", b"origin"))
            if self.allow_origin:
                headers.append((b"access-control-allow-origin", self.origin))
                headers.append((b"access-control-expose-headers", EXPOSED_HEADERS))
        return headers


def context_of(scope: Any) -> RequestContext:
    """The context of an ASGI scope that passed the border."""
    return cast("RequestContext", scope["behest"])
