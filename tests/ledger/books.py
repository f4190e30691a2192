"""Books to try things on: budgets, admissions and settlements with few words, against a real PostgreSQL."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec

from behest_ledger.charging import Outcome
from behest_ledger.holds import Admission, Answer, Extension, Granted, Refused, Settlement, UsageLine, void
from behest_ledger.request_id import request_id
from behest_ledger.store import holds
from behest_ledger.store.pool import connect, open_pool
from behest_ledger.store.verify import Finding, verify

TENANT = "acme"
HOLDER = UUID(int=7)
WHO = {"namespace": "demo", "project": "demo/shop", "user": "ann", "session": "s1", "model": "small", "tier": "free"}
INPUT_RATE = 3
OUTPUT_RATE = 10
"""Rates of all requests here, in pico-USD per token: small numbers that are easily added up."""

_PERIODS_S = {"minute": 60.0, "hour": 3600.0}
"""The others begin with a day."""
_ROOM_S = 10.0

_random = random.Random(0)


def new_id() -> UUID:
    """A request id of now."""
    return request_id(int(time.time() * 1000), _random.getrandbits(74))


def until_a_new_period_s(period: str, zone: str, now: datetime) -> float:
    """How long to wait so that a calendar's period does not end in the middle of a test; 0: it goes on for long."""
    local = now.astimezone(ZoneInfo(zone))
    of_day_s = local.hour * 3600 + local.minute * 60 + local.second + local.microsecond / 1e6
    length_s = _PERIODS_S.get(period, 86_400.0)
    left_s = length_s - of_day_s % length_s
    return left_s + 0.01 if left_s < _ROOM_S else 0.0


def admission(
    *,
    id: UUID | None = None,  # noqa: A002 - it is one
    input: int = 0,  # noqa: A002 - it is one
    need: int = 1,
    want: int | None = None,
    shares: int = 1,
    rate: int = OUTPUT_RATE,
    tenant: str = TENANT,
    **who: Any,
) -> Admission:
    """A request for `input` tokens in, and `need` to `want` tokens out."""
    return Admission(
        tenant_id=tenant,
        request_id=id or new_id(),
        holder_id=HOLDER,
        attributes={**WHO, **who},
        price_key="prices-1",
        input_tokens=input,
        input_amount_pico=input * INPUT_RATE,
        output_rate_pico=rate,
        need_tokens=need,
        want_tokens=need if want is None else want,
        shares=shares,
    )


def settlement(
    id: UUID,  # noqa: A002 - it is one
    *,
    input: int = 0,  # noqa: A002 - it is one
    output: int = 0,
    sent: bool = True,
    tenant: str = TENANT,
    facts: dict[str, Any] | None = None,
) -> Settlement:
    """The end of a request that used these tokens. Not sent: `void` of `behest_ledger.holds`."""
    if not sent:
        return void(tenant, id, Outcome.REFUSED)
    classes = [("input", input, INPUT_RATE), ("output", output, OUTPUT_RATE)]
    lines = [
        UsageLine(class_=name, quantity=quantity, rate_pico=rate, amount_pico=quantity * rate, source="provider")
        for name, quantity, rate in classes
        if quantity
    ]
    return Settlement(
        tenant_id=tenant,
        request_id=id,
        state="settled",
        outcome=Outcome.COMPLETED,
        source="provider",
        requests=1,
        input_tokens=input,
        output_tokens=output,
        amount_pico=sum(line.amount_pico for line in lines),
        lines=lines,
        facts=facts or {},
    )


def granted(answer: Answer) -> Granted:
    """The answer, which has to be a grant."""
    assert isinstance(answer, Granted), answer
    return answer


def refused(answer: Answer) -> Refused:
    """The answer, which has to be a refusal."""
    assert isinstance(answer, Refused), answer
    return answer


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The balances of a window."""

    window_id: int
    budget: str
    subject: list[Any]
    limit: int
    ceiling: int | None
    spent: int
    held: int
    suspense: int
    overrun: int
    live: int


class Books:
    """The ledger of one test, through one connection or pool."""

    def __init__(self, dsn: str, connection: Any) -> None:
        self.dsn = dsn
        self.connection = connection

    async def budget(
        self,
        name: str,
        limit: int,
        *,
        unit: Literal["usd", "tokens", "requests", "concurrency"] = "usd",
        scope: dict[str, str] | None = None,
        per: Sequence[str] = (),
        period: str = "lifetime",
        alignment: str = "calendar",
        zone: str = "UTC",
        kind: str = "both",
        refusal: str = "quota",
        enforcement: str = "hard",
        suspended: bool = False,
        tenant: str = TENANT,
        labels: dict[str, str] | None = None,
        thresholds: Sequence[int] = (),
    ) -> str:
        """Write a budget and return its id. Writing it again changes it.

        Where its period is about to end by the calendar, the next one is waited for.
        """
        if alignment == "calendar" and period != "lifetime":
            await asyncio.sleep(until_a_new_period_s(period, zone, datetime.now(UTC)))
        row = {
            "tenant_id": tenant,
            "budget_id": f"demo/{name}",
            "namespace": "demo",
            "name": name,
            "scope": scope or {},
            "workload_labels": labels,
            "per": list(per),
            "unit": unit,
            "token_kind": kind,
            "limit_amount": limit,
            "period": period,
            "alignment": alignment,
            "time_zone": zone,
            "enforcement": enforcement,
            "alert_thresholds": list(thresholds),
            "suspended": suspended,
            "refusal": refusal,
        }
        await self.connection.execute("SELECT ledger.put_budget_v1($1::text::jsonb)", msgspec.json.encode(row).decode())
        return f"demo/{name}"

    async def admit(self, **what: Any) -> tuple[UUID, Answer]:
        """Ask for an `admission(...)`."""
        asked = admission(**what)
        return asked.request_id, await holds.admit(self.connection, asked)

    async def extend(
        self,
        id: UUID,  # noqa: A002 - it is one
        seq: int,
        *,
        need: int,
        want: int | None = None,
        shares: int = 1,
        tenant: str = TENANT,
    ) -> Answer:
        """Ask for more output tokens."""
        asked = Extension(
            tenant_id=tenant, request_id=id, seq=seq, need_tokens=need, want_tokens=need if want is None else want
        )
        return (await holds.extend(self.connection, [asked], shares=shares))[id]

    async def settle(self, *settlements: Settlement) -> list[str]:
        """Settle a batch; "settled", "already" or "unknown" for each, with a "!" where there was an overrun."""
        results = {item.request_id: item for item in await holds.settle(self.connection, settlements)}
        assert set(results) == {item.request_id for item in settlements}
        return [
            results[item.request_id].result + ("!" if results[item.request_id].overrun else "") for item in settlements
        ]

    async def windows(self, budget: str | None = None) -> list[Window]:
        """All windows, the oldest first."""
        rows = await self.connection.fetch(
            "SELECT window_id, budget_id AS budget, subject::text AS subject, limit_amount::text AS limit,"
            " ceiling::text, spent::text, held::text, suspense::text, overrun::text, live FROM ledger.budget_window"
            " WHERE $1::text IS NULL OR budget_id = $1 ORDER BY window_id",
            budget and f"demo/{budget}",
        )
        return [
            msgspec.convert({**row, "subject": msgspec.json.decode(row["subject"])}, Window, strict=False)
            for row in map(dict, rows)
        ]

    async def window(self, budget: str) -> Window:
        """The only window of a budget."""
        (window,) = await self.windows(budget)
        return window

    async def balances(self, budget: str) -> tuple[int, int, int, int]:
        """(spent, held, overrun, live) of the only window of a budget."""
        window = await self.window(budget)
        return window.spent, window.held, window.overrun, window.live

    async def age(self, budget: str, back: str) -> None:
        """End the budget's windows now, as if they had begun earlier."""
        await self.connection.execute(
            "UPDATE ledger.budget_window SET ends_at = clock_timestamp(), starts_at = starts_at - $2::text::interval"
            " WHERE budget_id = $1 AND ends_at > clock_timestamp()",
            f"demo/{budget}",
            back,
        )

    async def count(self, table: str) -> int:
        """The rows of a table."""
        found: int = await self.connection.fetchval(f"SELECT count(*) FROM ledger.{table}")
        return found

    async def findings(self) -> list[Finding]:
        """What `verify` finds."""
        connection = await connect(self.dsn)
        try:
            return (await verify(connection)).findings
        finally:
            await connection.close()


def keep_books(dsn: str, work: Callable[[Books], Awaitable[None]], *, connections: int = 1, clean: bool = True) -> None:
    """Run `work` on the books of this database, and verify them afterwards."""

    async def main() -> None:
        pool = await open_pool(dsn, size=connections)
        books = Books(dsn, pool)
        try:
            await work(books)
            if clean:
                assert await books.findings() == []
        finally:
            await pool.close()

    asyncio.run(main())


def total(windows: Iterable[Window]) -> int:
    """What of the windows is not available any more."""
    return sum(window.spent + window.held + window.suspense for window in windows)
