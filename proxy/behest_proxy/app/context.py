"""What belongs to one HTTP request from the border on: its ids and the headers that every answer carries."""

import os
import re
import time
from collections.abc import Iterable
from typing import Any, cast
from uuid import UUID

from behest_ledger.configuration.snapshot import ProjectEntry
from behest_ledger.request_id import request_id

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
"""W3C Trace Context, section 3.2; a later version may have more behind."""
_TRACESTATE = re.compile(rb"[\x20-\x7e]{1,512}")
"""Section 3.3: passed on as it is, within the length that has to be."""

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

    __slots__ = (
        "allow_origin",
        "arrived_ns",
        "arrived_s",
        "by_pod",
        "call_span_id",
        "host",
        "host_project",
        "origin",
        "parent_id",
        "rate_headers",
        "request_id",
        "sampled",
        "span_id",
        "status",
        "told",
        "trace_id",
        "trace_state",
    )

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], *, by_pod: bool = False) -> None:
        self.by_pod = by_pod
        """Whether it came over the pod's own loopback, where the workload needs no token."""
        self.arrived_ns = time.time_ns()
        self.arrived_s = time.monotonic()
        self.request_id: UUID = request_id(self.arrived_ns // 1_000_000, int.from_bytes(os.urandom(10)))
        """Ours, and also the id of the hold: never a provider's or a client's."""
        self.trace_id = b""
        """Of the caller's trace, or one that begins here; hexadecimal, as are the ids of spans."""
        self.parent_id = b""
        """The caller's span; empty: the trace begins here."""
        self.trace_state = b""
        self.sampled = False
        """Whether the trace is told of: first the caller's word, then ours."""
        self.span_id, self.call_span_id = os.urandom(8).hex().encode(), os.urandom(8).hex().encode()
        """Of this request, and of its call to the provider."""
        self.status = 0
        """Of the answer; 0: there is none yet."""
        self.told: dict[str, Any] = {}
        """Attributes of this request's span that only an endpoint knows."""
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
                if match and match[1].strip(b"0") and match[2].strip(b"0"):
                    self.trace_id, self.parent_id = match[1], match[2]
                    self.sampled = bool(int(match[3], 16) & 1)
            elif name == b"tracestate":
                # A header that comes in parts is one list (RFC 9110, section 5.3).
                self.trace_state = self.trace_state + b"," + value if self.trace_state else value
            elif name == b"origin":
                self.origin = value
            elif name == b"host":
                self.host = value
        if not self.trace_id:
            self.trace_id = os.urandom(16).hex().encode()
        if not self.parent_id or not _TRACESTATE.fullmatch(self.trace_state):
            self.trace_state = b""

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log line about this request bears, so that it and the trace find each other."""
        return {
            "request_id": str(self.request_id),
            "trace_id": self.trace_id.decode("ascii"),
            "span_id": self.span_id.decode("ascii"),
        }

    def call_headers(self) -> list[tuple[bytes, bytes]]:
        """The trace as the provider is told of it (W3C Trace Context). `baggage` stays here: it is the caller's."""
        headers = [(b"traceparent", b"00-%b-%b-%02d" % (self.trace_id, self.call_span_id, self.sampled))]
        if self.trace_state:
            headers.append((b"tracestate", self.trace_state))
        return headers

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
