"""What the keeper that works tells: its rounds, how the books stand, and how every Budget does.

One keeper works at a time, so these numbers are there once. What was not read lately is not told at all: a keeper that
stands by, or has lost the database, leaves a gap and no false line.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import asyncpg

from behest_ledger.store.gauges import BooksGauges, BudgetGauges, read_gauges
from behest_ledger.store.pool import Connection
from behest_ledger.telemetry import names
from behest_ledger.telemetry.meter import Key, Meter, tellable

if TYPE_CHECKING:
    from behest_ledger.store.keeper import KeeperReport

logger = logging.getLogger(__name__)

ROUNDS_A_LOOK = 3
"""Between two looks; a round is 5 s."""
LOOK_TIMEOUT_S = 5.0
REST_FACTOR = 20
"""The database rests for so many times as long as a look took."""
STALE_S = 60.0
"""What was read is told for so long, or for as long as three looks are apart."""
_ID_CHARS_MAX = 400
"""Of a Budget's id: never cut, for two that are cut alike would be one."""


class KeeperWatch:
    """The instruments of one keeper. `meter` is read by whoever tells them, from any thread."""

    def __init__(self, meter: Meter, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._rounds = meter.counter(names.KEEPER_ROUNDS)
        self._duration = meter.histogram(names.KEEPER_DURATION)
        self._reaped = meter.counter(names.REAPED)
        self._suspended = meter.counter(names.SUSPENDED)
        self._policy_charges = meter.counter(names.POLICY_CHARGES)
        self._policy_cost = meter.counter(names.POLICY_COST)
        self._sealed_rows = meter.counter(names.SEALED_ROWS)
        for counter in (self._reaped, self._suspended, self._policy_charges, self._policy_cost, self._sealed_rows):
            counter.add((), 0)
        self._books: BooksGauges | None = None
        self._good_until_s = 0.0
        self._look_due_s = 0.0
        self._sealed_until_s: float | None = None
        self._told_slow = False

        def of_budgets(value: Callable[[BudgetGauges], float | None]) -> Callable[[], Mapping[Key, float]]:
            return lambda: self._of_budgets(value)

        gauge = meter.gauge
        gauge(names.BUDGET_LIMIT, of_budgets(lambda one: one.limit))
        gauge(names.BUDGET_SPENT, of_budgets(lambda one: one.spent))
        gauge(names.BUDGET_HELD, of_budgets(lambda one: one.held))
        gauge(names.BUDGET_REMAINING, of_budgets(lambda one: one.remaining))
        gauge(names.BUDGET_EXHAUSTED, of_budgets(lambda one: one.exhausted))
        gauge(names.BUDGET_PERIOD, of_budgets(lambda one: one.period_s))
        gauge(names.BUDGET_RESETS, of_budgets(lambda one: one.resets_at_s))
        gauge(names.BUDGETS_UNTOLD, lambda: self._of_books(lambda books: books.budgets_untold))
        gauge(names.HOLDERS, lambda: self._of_books(lambda books: books.holders))
        gauge(names.SUSPENSE, lambda: self._of_books(lambda books: books.suspense))
        gauge(names.SUSPENSE_AGE, lambda: self._of_books(lambda books: books.suspense_age_s))
        gauge(names.SEAL_LAG, self._seal_lag)

    def failed(self) -> None:
        """A round ended in an error."""
        self._rounds.add(("failed",))

    def done(self, report: "KeeperReport", seconds: float) -> None:
        """A round is over."""
        if not report.working:
            self._rounds.add(("stood_by",))
            self._books = self._sealed_until_s = None
            return
        self._rounds.add(("failed",) if report.failed else ("worked",))
        self._duration.record((), seconds)
        self._reaped.add((), len(report.fenced))
        self._suspended.add((), report.holds_to_suspense)
        self._policy_charges.add((), report.charged_requests)
        self._policy_cost.add((), report.charged_pico)
        self._sealed_rows.add((), report.sealed_rows)

    def sealed(self, oldest_s: float) -> None:
        """Everything that could be sealed is; the oldest transaction that could not be is so old (0: there is none)."""
        self._sealed_until_s = self._clock_s() - oldest_s

    async def look(self, connection: Connection, *, interval_s: float) -> None:
        """Read how the books stand, where it is time to. One that takes too long is given up, and is no failure."""
        begun_s = self._clock_s()
        if begun_s < self._look_due_s:
            return
        try:
            async with connection.transaction(readonly=True):
                await connection.execute(f"SET LOCAL statement_timeout = '{LOOK_TIMEOUT_S}s'")
                books = await read_gauges(connection)
        except asyncpg.QueryCanceledError:
            if not self._told_slow:
                logger.warning("budgets are not told of: to look at them took more than %.0f s", LOOK_TIMEOUT_S)
            self._told_slow = True
            self._look_due_s = self._clock_s() + REST_FACTOR * LOOK_TIMEOUT_S
            return
        self._told_slow = False
        self._books = books
        rest_s = max(interval_s, REST_FACTOR * (self._clock_s() - begun_s))
        self._look_due_s = begun_s + rest_s
        self._good_until_s = begun_s + max(STALE_S, 3 * rest_s)

    def _seen(self) -> BooksGauges | None:
        return self._books if self._clock_s() < self._good_until_s else None

    def _of_budgets(self, value: Callable[[BudgetGauges], float | None]) -> Mapping[Key, float]:
        seen = self._seen()
        found = [] if seen is None else [(one, value(one)) for one in seen.budgets]
        return {
            (tellable(one.tenant_id, _ID_CHARS_MAX), tellable(one.budget_id, _ID_CHARS_MAX), one.unit): number
            for one, number in found
            if number is not None
        }

    def _of_books(self, value: Callable[[BooksGauges], float]) -> Mapping[Key, float]:
        seen = self._seen()
        return {} if seen is None else {(): value(seen)}

    def _seal_lag(self) -> Mapping[Key, float]:
        return {} if self._sealed_until_s is None else {(): self._clock_s() - self._sealed_until_s}
