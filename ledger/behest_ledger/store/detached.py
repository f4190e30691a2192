"""Months that were put away, looked at where their tables lie beside the books: `posting_2025_09_detached` and so on.

What such a month left behind are the seals of its rows, and the balances that its postings had come to. As long as its
tables are here, both can be recomputed, and everything that is true of a month's requests by themselves. There are no
checks of its own for that, where one row could be told by other words than when it was sealed: the queries of `verify`
are asked of a month by naming its tables as they are named in the queries (common table expressions), and what the
schema says of rows (how they are sealed, how they are charged now) is read out of the schema.

A table that was dropped or moved away is no error: then the opening balances, under their seal, are what is left.
"""

import datetime as dt
import re
from collections.abc import Mapping

import asyncpg
import msgspec

from behest_ledger.store import seals
from behest_ledger.store.findings import Finding, Progress, named
from behest_ledger.store.pool import Connection

TABLES = ("hold", "hold_line", "posting", "request", "usage_line", "correction", "seal_source")
"""What is looked at of a month. The sums of usage that left with it are neither sealed nor read any more."""
NEEDED_BY = {"request_now": frozenset({"request", "correction"})}
"""A view, and the tables that it reads."""

CARRIED = "what a month left behind is what its postings had come to"
_CARRIED = """
SELECT format('window %s of %s, account %s', window_id, tenant_id, account), coalesce(p.amount, 0),
       coalesce(o.amount, 0)
FROM (
    SELECT x.tenant_id, x.window_id, a.account, sum(a.amount) AS amount
    FROM ledger.posting x
    CROSS JOIN LATERAL (VALUES (x.credit, x.amount), (x.debit, -x.amount)) AS a (account, amount)
    GROUP BY 1, 2, 3) AS p
FULL JOIN (
    SELECT tenant_id, window_id, account, amount FROM ledger.opening_balance WHERE month = $1) AS o
  USING (tenant_id, window_id, account)
WHERE coalesce(p.amount, 0) <> coalesce(o.amount, 0)
"""

_LISTS = """
SELECT CASE WHEN s.tenant_id IS NULL THEN format('list %s of %s in %s', number, tenant_id, to_char(month, 'YYYY-MM'))
            ELSE ledger.seal_name_v1(s) END,
       CASE WHEN s.tenant_id IS NULL THEN 'no list' ELSE
           encode(s.content, 'hex') || ' over ' || s.row_count || ' rows' END,
       CASE WHEN q.tenant_id IS NULL THEN 'no list of sources' ELSE
           encode(ledger.seal_content_v1(q.sources, q.row_counts, q.digests), 'hex') || ' over '
               || (SELECT sum(c) FROM unnest(q.row_counts) AS c) || ' rows' END
FROM (SELECT * FROM ledger.seal WHERE kind = 'rows' AND month = $1) AS s
FULL JOIN ledger.seal_source q USING (tenant_id, month, number)
WHERE s.tenant_id IS NULL OR q.tenant_id IS NULL
   OR ledger.seal_content_v1(q.sources, q.row_counts, q.digests) <> s.content
   OR (SELECT sum(c) FROM unnest(q.row_counts) AS c) <> s.row_count
"""

_MONTHS = """
SELECT month, array_remove(array_agg(DISTINCT name), NULL) AS tables FROM (
    SELECT DISTINCT month, NULL AS name FROM ledger.seal WHERE kind = 'opening'
    UNION ALL
    SELECT to_date(found[2], 'YYYY_MM'), found[1]
    FROM pg_catalog.pg_class c
    CROSS JOIN LATERAL regexp_match(c.relname, '^([a-z_]+)_([1-9][0-9]{3}_(?:0[1-9]|1[0-2]))_detached$') AS found
    WHERE c.relnamespace = 'ledger'::regnamespace AND c.relkind = 'r' AND found[1] = ANY ($1::text[])) AS m
GROUP BY month ORDER BY month
"""


class MonthAway(msgspec.Struct, frozen=True):
    """A month that was put away, and which of its tables are still here."""

    month: dt.date
    tables: frozenset[str]

    def __str__(self) -> str:
        missing = [table_of(table, self.month) for table in TABLES if table not in self.tables]
        away = f"month {self.month:%Y-%m} was put away, and"
        if not missing:
            return f"{away} its tables are here"
        if not self.tables:
            return f"{away} its tables are not here (dropped, or moved away): its balances are what is left"
        return (
            f"{away} some of its tables are not here (dropped, or moved away): {', '.join(missing)}; what needs them"
            " was not looked at"
        )


def table_of(table: str, month: dt.date) -> str:
    """The name that a table of a month has once it is put away."""
    return f"{table}_{month:%Y_%m}_detached"


async def hold_still(connection: Connection, *, detached: bool) -> list[MonthAway]:
    """The months that were put away, the oldest first; until this transaction ends none is put away besides.

    It is the first statement of a transaction, so that its snapshot is younger than what it waited for. With `detached`
    their tables are not dropped until then either.
    """
    await connection.execute(f"LOCK TABLE {', '.join(f'ledger.{table}' for table in TABLES)} IN ACCESS SHARE MODE")
    months: list[MonthAway] = []
    for row in await connection.fetch(_MONTHS, list(TABLES)):
        here = {table for table in row["tables"] if not detached or await _held(connection, table, row["month"])}
        months.append(MonthAway(row["month"], frozenset(here)))
    return months


async def _held(connection: Connection, table: str, month: dt.date) -> bool:
    """Whether the table is still there: then it stays until the transaction ends."""
    try:
        async with connection.transaction():
            await connection.execute(f"LOCK TABLE ledger.{table_of(table, month)} IN ACCESS SHARE MODE")
    except asyncpg.UndefinedTableError:
        return False
    return True


async def check_month(
    connection: Connection, away: MonthAway, checks: Mapping[str, str], progress: Progress
) -> list[Finding]:
    """Ask these checks of a month, and whether it came to what it left behind.

    `checks` have no parameters. Those that need a table that is not here are not asked.
    """
    view: str = await connection.fetchval("SELECT pg_catalog.pg_get_viewdef('ledger.request_now'::regclass)")
    asked = [(check, query, ()) for check, query in checks.items()] + [(CARRIED, _CARRIED, (away.month,))]
    findings: list[Finding] = []
    for number, (check, query, arguments) in enumerate(asked):
        if needed(query) <= away.tables:
            progress(f"{away.month:%Y-%m}: {check}", number / len(asked))
            found = await named(connection, check, asked_of(query, away, view), *arguments)
            findings += [msgspec.structs.replace(each, place=f"{away.month:%Y-%m}, {each.place}") for each in found]
    return findings


async def check_seals(connection: Connection, away: MonthAway, progress: Progress) -> list[Finding]:
    """Recompute the seals of a month from its rows, slice by slice, as far as its tables are here."""
    findings: list[Finding] = []
    if needed(_LISTS) <= away.tables:
        findings += await named(connection, seals.SOURCES, asked_of(_LISTS, away), away.month)
    told: str = await connection.fetchval(
        "SELECT prosrc FROM pg_catalog.pg_proc WHERE oid = 'ledger.sealed_rows_v1(bigint[])'::regprocedure"
    )
    query = seals.DIFFERENT.replace(
        "ledger.sealed_rows_v1($1::bigint[])", f"({told.replace('p_bounds', '($1::bigint[])').strip().rstrip(';')})"
    )
    if needed(query) <= away.tables:
        # The settings of the function: what it makes of a row is the same in every session.
        await connection.execute("SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO, YMD'")
        findings += await seals.check_rows(connection, progress, month=away.month, different=asked_of(query, away))
    return findings


_MONTHLY = re.compile(rf"\bledger\.({'|'.join([*TABLES, *NEEDED_BY])})\b")


def needed(query: str) -> frozenset[str]:
    """The tables of a month that a query reads."""
    return frozenset[str]().union(
        *(NEEDED_BY.get(found[1], frozenset({found[1]})) for found in _MONTHLY.finditer(query))
    )


def asked_of(query: str, away: MonthAway, request_now: str = "") -> str:
    """The query as it is asked of a month that was put away. `request_now` is what that view says."""
    # Nothing comes from outside: these are our own queries, and the names of our own tables.
    names = {table: f"TABLE ledger.{table_of(table, away.month)}" for table in TABLES if table in away.tables}
    if request_now and needed(request_now) <= away.tables:
        names["request_now"] = _unqualified(request_now)
    begin = ", ".join(f"{name} AS NOT MATERIALIZED ({told})" for name, told in names.items())
    return f"WITH {begin} SELECT * FROM ({_unqualified(query)}) AS asked"  # noqa: S608


def _unqualified(query: str) -> str:
    return _MONTHLY.sub(r"\1", query.strip().rstrip(";"))
