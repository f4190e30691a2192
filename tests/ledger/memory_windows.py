"""Budgets and windows of the ledger in memory: what `0003_budgets.sql` does, on plain numbers.

Beside the balances there is an account book of their own for the postings, so that one can be held against the other.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

Key = tuple[str, UUID]
"""Tenant and request: what a hold is known by."""

_SPANS = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}


class Posting(NamedTuple):
    """One movement between two accounts of a window."""

    source_id: UUID
    window_id: int
    seq: int
    debit: str
    credit: str
    amount: int


class Window:
    """One period of one subject, with its balances."""

    __slots__ = (
        "budget_id", "ceiling", "ends_at", "held", "kind", "limit", "live", "overrun", "spent", "starts_at", "subject",
        "suspense", "tenant_id", "unit", "window_id",
    )  # fmt: skip

    def __init__(self, window_id: int, budget: dict[str, Any], subject: list[Any]) -> None:
        self.tenant_id: str = budget["tenant_id"]
        self.window_id = window_id
        self.budget_id: str = budget["budget_id"]
        self.subject = subject
        self.unit: str = budget["unit"]
        self.kind: str = budget["token_kind"]
        self.limit: int = budget["limit_amount"]
        self.ceiling: int | None = self.limit if budget["enforcement"] == "hard" else None
        self.starts_at = 0.0
        self.ends_at: float | None = None
        self.spent = self.held = self.suspense = self.overrun = self.live = 0

    @property
    def balance(self) -> int:
        """What is not available any more."""
        return self.spent + self.held + self.suspense

    def settle_ceiling(self) -> None:
        """A ceiling above a lowered limit falls with every release, never below the limit."""
        if self.ceiling is not None:
            self.ceiling = max(self.limit, self.balance)

    def runs(self, now_s: float) -> bool:
        """Whether its period has not ended."""
        return self.ends_at is None or self.ends_at > now_s

    def check(self) -> None:
        """The table's constraints. `live` may be below zero while leases admit for it."""
        if min(self.spent, self.held, self.suspense, self.overrun) < 0:
            raise asyncpg.CheckViolationError(f"a balance of window {self.window_id} is negative")
        if self.ceiling is not None and self.balance > self.ceiling:
            raise asyncpg.CheckViolationError(f"ceiling_holds: window {self.window_id}")

    def input_part(self, input_tokens: int, input_amount: int) -> int:
        """What the window must hold for some input."""
        if self.unit == "usd":
            return input_amount
        return 1 if self.unit in ("requests", "concurrency") else 0 if self.kind == "output" else input_tokens

    def output_rate(self, output_rate_pico: int) -> int:
        """What the window must hold for an output token."""
        if self.unit == "usd":
            return output_rate_pico
        return 0 if self.unit in ("requests", "concurrency") or self.kind == "input" else 1

    def charge(self, amount_pico: int, input_tokens: int, output_tokens: int, requests: int) -> int:
        """A charge in the window's unit."""
        if self.unit == "usd":
            return amount_pico
        if self.unit in ("requests", "concurrency"):
            return requests if self.unit == "requests" else 0
        return (input_tokens if self.kind != "output" else 0) + (output_tokens if self.kind != "input" else 0)


class Windows:
    """The budgets with their windows, and the postings."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        """`clock_s` is the database's clock, in seconds since 1970."""
        self.clock_s = clock_s
        self.budgets: dict[tuple[str, str], dict[str, Any]] = {}
        self.suspended_projects: set[tuple[str, str]] = set()
        self.windows: dict[int, Window] = {}
        self.current: dict[tuple[str, str, str], int] = {}
        """The one current window of each subject."""
        self.postings: list[Posting] = []
        self.accounts: dict[int, dict[str, int]] = {}
        """Per window: what its postings come to."""
        self.touched: set[int] = set()
        """The windows that something moved in since somebody last looked."""
        self.last_window = 0
        self._acts = 0
        self._by_tenant: dict[str, list[dict[str, Any]]] = {}

    def post(self, source_id: UUID, window_id: int, seq: int, debit: str, credit: str, amount: int) -> None:
        """Write one posting; nothing where the amount is zero."""
        if amount <= 0:
            return
        self.postings.append(Posting(source_id, window_id, seq, debit, credit, amount))
        account = self.accounts.setdefault(window_id, {})
        account[debit] = account.get(debit, 0) - amount
        account[credit] = account.get(credit, 0) + amount
        self.touched.add(window_id)

    def put_budget_v1(self, row: dict[str, Any]) -> None:
        """Write one budget. Its live windows take the new limit at once; a balance above it may only fall."""
        key = (row["tenant_id"], row["budget_id"])
        old = self.budgets.get(key)
        fixed = ("unit", "period", "alignment", "time_zone")
        if old is not None and any(old[name] != row[name] for name in fixed):
            raise asyncpg.CheckViolationError(f"budget {row['budget_id']}: unit, period ... are immutable")
        self.budgets[key] = {**row, "like": [(name, _like(text)) for name, text in row["scope"].items()]}
        of_tenant = [budget for (tenant, _), budget in self.budgets.items() if tenant == row["tenant_id"]]
        self._by_tenant[row["tenant_id"]] = sorted(of_tenant, key=lambda budget: str(budget["budget_id"]).encode())
        now_s = self.clock_s()
        source = self._act()
        limit = row["limit_amount"]
        for window in self.windows.values():
            if (window.tenant_id, window.budget_id) != key or not window.runs(now_s):
                continue
            more = limit - window.limit
            window.limit = limit
            window.ceiling = max(limit, window.balance) if row["enforcement"] == "hard" else None
            if more > 0:
                self.post(source, window.window_id, 0, "funding", "available", more)
            else:
                self.post(source, window.window_id, 0, "available", "funding", -more)
            self.touched.add(window.window_id)
            window.check()

    def matching(self, tenant_id: str, attributes: dict[str, Any]) -> list[dict[str, Any]]:
        """The budgets that bind a request, in the order in which their subjects are locked."""
        return [
            budget
            for budget in self._by_tenant.get(tenant_id, ())
            if all(like.fullmatch(str(attributes.get(name) or "")) for name, like in budget["like"])
            and _has_labels(attributes.get("labels"), budget["workload_labels"])
        ]

    def open_window_v1(self, budget: dict[str, Any], attributes: dict[str, Any]) -> Window:
        """The current window of a request's subject, opened where there is none or the last has ended."""
        subject = _subject(budget["per"], attributes)
        key = (budget["tenant_id"], budget["budget_id"], repr(subject))
        now_s = self.clock_s()
        found = self.current.get(key)
        if found is not None and self.windows[found].runs(now_s):
            return self.windows[found]
        self.last_window += 1
        window = Window(self.last_window, budget, subject)
        window.starts_at, window.ends_at = _bounds(budget, now_s)
        self.windows[window.window_id] = window
        self.current[key] = window.window_id
        self.post(self._act(), window.window_id, 0, "funding", "available", window.limit)
        self.touched.add(window.window_id)
        return window

    def refusal(self, budget: dict[str, Any], window: Window) -> dict[str, Any]:
        """The refusal that a caller is shown."""
        resets_at = retry_after_s = None
        if window.ends_at is not None:
            resets_at = datetime.fromtimestamp(window.ends_at, UTC).isoformat()
            retry_after_s = max(-int(-(window.ends_at - self.clock_s()) // 1), 1)
        return {
            "verdict": "refused",
            "reason": budget["refusal"],
            "budget": budget["budget_id"],
            "scope": budget["scope"],
            "subject": window.subject,
            "unit": budget["unit"],
            "window_id": window.window_id,
            "limit": str(window.limit),
            "spent": str(window.spent),
            "held": str(window.held + window.suspense),
            "remaining": str(max(window.limit - window.balance, 0)),
            "resets_at": resets_at,
            "retry_after_s": retry_after_s,
        }

    def _act(self) -> UUID:
        """An act of configuration: no request has an id as small as this."""
        self._acts += 1
        return UUID(int=self._acts)


def _bounds(budget: dict[str, Any], now_s: float) -> tuple[float, float | None]:
    """Of the periods only those of fixed length are known here, in UTC."""
    period, rolling = budget["period"], budget["alignment"] == "rolling"
    if period == "lifetime":
        return now_s, None
    if budget["time_zone"] != "UTC":
        raise ValueError("only UTC is known here")
    span_s = _SPANS[period].total_seconds()
    starts_s = now_s if rolling else now_s // span_s * span_s
    return starts_s, starts_s + span_s


def _subject(per: list[str], attributes: dict[str, Any]) -> list[Any]:
    return [
        [attributes.get("project"), attributes.get("user"), attributes.get("session")]
        if name == "session"
        else str(attributes.get(name) or "")
        for name in per
    ]


@lru_cache
def _like(pattern: str) -> re.Pattern[str]:
    """SQL's LIKE, without escapes."""
    parts = {"%": ".*", "_": "."}
    return re.compile("".join(parts.get(character) or re.escape(character) for character in pattern), re.DOTALL)


def _has_labels(labels: dict[str, str] | None, wanted: dict[str, str] | None) -> bool:
    return wanted is None or (labels is not None and wanted.items() <= labels.items())
