"""Retention: months that are old enough leave the tables, and what they came to stays as opening balances.

A month goes as a whole, with its holds, postings, requests, usage lines, corrections and the lists of its seals. What
its postings had come to, for each account of each window, is written down and sealed in the same transaction: so every
balance can still be recomputed, to the last unit, and the chain of seals still goes back to its beginning. Reports end
where the tables do. A month in which a request has not ended, or that is not sealed to its last row, stays.
"""

import datetime as dt
import logging

import asyncpg
import msgspec

from behest_ledger.store.pool import Connection

logger = logging.getLogger(__name__)

RETENTION_MONTHS = 13
"""Whole months before the current one that stay: a year can be compared with the same month of the last one."""
MONTH_TIMEOUT_S = 1800.0
"""To add up and detach what is due. Nobody waits for that but the keeper."""


class PutAway(msgspec.Struct, frozen=True):
    """What became of one month."""

    month: dt.date
    done: bool
    told: str
    """"detached" or "dropped", else why it stays."""


async def put_old_months_away(connection: Connection, *, kept_months: int, drop: bool) -> list[PutAway]:
    """Put away all months before the last `kept_months` whole ones, the oldest first; 0 keeps everything.

    What stays is tried again at the next call.
    """
    if not kept_months:
        return []
    rows = await connection.fetch("SELECT m AS month FROM ledger.old_months_v1($1) AS m", kept_months)
    return [await put_month_away(connection, row["month"], drop=drop) for row in rows]


async def put_month_away(connection: Connection, month: dt.date, *, drop: bool) -> PutAway:
    """Put one month away, whole, or not at all."""
    try:
        told: str = await connection.fetchval("SELECT ledger.put_month_away_v1($1, $2)", month, drop)
    except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
        told = str(error)
    done = told in ("detached", "dropped")
    if done:
        logger.info("month %s was put away: its tables are %s", f"{month:%Y-%m}", told)
    else:
        logger.warning("month %s is not put away yet: %s", f"{month:%Y-%m}", told)
    return PutAway(month, done, told)
