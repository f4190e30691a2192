"""Seals: a chain of hashes over everything that was written, so that a changed row shows, whoever changed it.

Each tenant has one chain. A seal closes a batch: all rows of a month (postings, usage lines, requests, corrections)
whose transactions lie between two bounds, the upper one below every transaction that still ran. So a row that commits
late gets into a later batch, and never behind a seal. A seal's hash is over what it says and the hash before it. What
it says is the SHA-256 over a list of its sources (requests, acts of configuration), each with that over its rows.

Who can change rows can also change seals. Therefore `behest ledger verify` prints the newest seal of each tenant: noted
elsewhere, it vouches for everything before it.
"""

import datetime as dt
import re
from collections.abc import Sequence

import msgspec

from behest_ledger.store.findings import NAMED_MAX, Finding, Progress, first, named
from behest_ledger.store.pool import Connection

ROWS_TARGET = 100_000
"""Rows that one call should seal, so that it stays short. The span of transactions is adapted to that."""
SPAN_FIRST = 1024
SPAN_MAX = 2**30
SLICE_ROWS = 200_000
"""Rows that one query of a verification recomputes: they are sorted in memory."""

CHAIN = "a seal's hash is over what it says and the seal before it"
NUMBERS = "a tenant's seals are numbered without a gap, and follow each other"
SOURCES = "a seal says of its sources what it sealed"
ROWS = "every sealed row is as it was sealed, and none was added or lost"
MARK = "seals reach as far as the mark says, and no row is from a transaction to come"
OPENING = "what a month left behind is as it was sealed"
NOTED = "a seal that was noted is still in its chain"


class Seal(msgspec.Struct, frozen=True):
    """One link of a tenant's chain, as it is noted elsewhere."""

    tenant_id: str
    number: int
    hash: str

    def __str__(self) -> str:
        """The line that `parse_noted` reads."""
        return f"seal {self.number} {self.hash} {self.tenant_id}"


class Sealed(msgspec.Struct, frozen=True):
    """What was sealed."""

    seals: int
    rows: int
    more: bool
    """There are rows left that could be sealed."""


class Sealer:
    """Seals in pieces of about `ROWS_TARGET` rows. It remembers how many transactions make such a piece."""

    def __init__(self) -> None:
        self._span = SPAN_FIRST

    async def seal(self, connection: Connection, *, calls_max: int) -> Sealed:
        """Seal what can be sealed, in at most so many commits."""
        seals = 0
        rows = 0
        more = True
        for _ in range(calls_max):
            row = await connection.fetchrow("SELECT seals, sealed_rows, more FROM ledger.seal_v1($1)", self._span)
            if row["sealed_rows"] > ROWS_TARGET:
                self._span = max(self._span // 2, 1)
            elif row["more"] and row["sealed_rows"] < ROWS_TARGET // 4:
                self._span = min(self._span * 2, SPAN_MAX)
            seals += row["seals"]
            rows += row["sealed_rows"]
            more = row["more"]
            if not more:
                break
        return Sealed(seals, rows, more)


class HeldUp(msgspec.Struct, frozen=True, kw_only=True):
    """The oldest transaction that still runs: nothing that was written since it began can be sealed."""

    transaction: int
    age_s: float | None
    """None where this role may not see whose it is (`pg_read_all_stats`)."""
    whose: str

    def __str__(self) -> str:
        return f"transaction {self.transaction} of {self.whose}"


_HELD_UP = """
SELECT o.xid, coalesce(
           'the prepared transaction ' || quote_literal(p.gid) || ' in database ' || p.database,
           'process ' || a.pid || coalesce(' (' || nullif(a.application_name, '') || ')', '')
               || ' in database ' || a.datname || ', ' || a.state,
           'a session that this role may not see') AS whose,
       extract(epoch FROM clock_timestamp() - coalesce(p.prepared, a.xact_start))::float AS age_s
FROM (SELECT txid_snapshot_xmin(s) AS xid, txid_snapshot_xmax(s) AS next FROM txid_current_snapshot() AS s) AS o
LEFT JOIN pg_stat_activity a ON a.backend_xid = (o.xid & 4294967295)::text::xid
LEFT JOIN pg_prepared_xacts p ON p.transaction = (o.xid & 4294967295)::text::xid
WHERE o.xid < o.next
"""


async def held_up(connection: Connection) -> HeldUp | None:
    """What sealing waits for now, in whichever database of the server it is; None where it waits for nothing."""
    row = await connection.fetchrow(_HELD_UP)
    return HeldUp(transaction=row["xid"], age_s=row["age_s"], whose=row["whose"]) if row is not None else None


_NOTED_LINE = re.compile(r"seal (\d{1,18}) ([0-9a-f]{64}) (.+)")


def parse_noted(text: str) -> list[Seal]:
    """The seals in what `behest ledger verify` printed some time ago; other lines are passed over."""
    found = (_NOTED_LINE.fullmatch(line.strip()) for line in text.splitlines())
    return [Seal(line[3], int(line[1]), line[2]) for line in found if line is not None]


CHECKS: dict[str, str] = {
    CHAIN: """
        SELECT ledger.seal_name_v1(s), encode(ledger.seal_hash_v1(s), 'hex'), encode(s.hash, 'hex')
        FROM ledger.seal s WHERE s.hash <> ledger.seal_hash_v1(s)
        UNION ALL
        SELECT ledger.seal_name_v1(s), 'the hash before it, ' || encode(coalesce(b.hash, ''), 'hex'),
               encode(s.previous, 'hex')
        FROM ledger.seal s LEFT JOIN ledger.seal b ON b.tenant_id = s.tenant_id AND b.number = s.number - 1
        WHERE s.previous <> coalesce(b.hash, '')""",
    NUMBERS: """
        SELECT ledger.seal_name_v1(f.seal), f.expected || ', from ' || f.expected_from || ' on',
               f.number || ', from ' || f.tx_from || ' to ' || f.tx_until
        FROM (
            SELECT s AS seal, s.number, s.tx_from, s.tx_until, s.kind,
                   coalesce(lag(s.number) OVER chain, 0) + 1 AS expected,
                   CASE WHEN lag(s.tx_from) OVER chain = s.tx_from THEN s.tx_from
                        ELSE coalesce(lag(s.tx_until) OVER chain, 0) END AS expected_from
            FROM ledger.seal s WINDOW chain AS (PARTITION BY s.tenant_id ORDER BY s.number)) AS f
        WHERE f.number <> f.expected OR f.tx_from < f.expected_from OR f.tx_until < f.tx_from""",
    SOURCES: """
        SELECT ledger.seal_name_v1(s), encode(s.content, 'hex') || ' over ' || s.row_count || ' rows',
               CASE WHEN q.number IS NULL THEN 'no list of sources' ELSE
                   encode(ledger.seal_content_v1(q.sources, q.row_counts, q.digests), 'hex') || ' over '
                       || (SELECT sum(c) FROM unnest(q.row_counts) AS c) || ' rows' END
        FROM ledger.seal s LEFT JOIN ledger.seal_source q USING (tenant_id, month, number)
        WHERE s.kind = 'rows' AND CASE
            WHEN q.number IS NULL THEN NOT EXISTS (
                SELECT FROM ledger.seal o WHERE o.tenant_id = s.tenant_id AND o.month = s.month
                   AND o.kind = 'opening' AND o.number > s.number)
            ELSE ledger.seal_content_v1(q.sources, q.row_counts, q.digests) <> s.content
                OR (SELECT sum(c) FROM unnest(q.row_counts) AS c) <> s.row_count END""",
    MARK: """
        SELECT 'seal_progress', 'at least ' || s.last, coalesce(p.sealed_until::text, 'nothing')
        FROM (SELECT max(tx_until) AS last FROM ledger.seal) AS s LEFT JOIN ledger.seal_progress p ON true
        WHERE coalesce(p.sealed_until, 0) < s.last
        UNION ALL
        SELECT format('%s of source %s of %s', t.name, t.source_id, t.tenant_id), 'a transaction that began', t.tx::text
        FROM (SELECT txid_snapshot_xmax(txid_current_snapshot()) + tx_added AS next FROM ledger.seal_progress) AS n
        CROSS JOIN LATERAL (
            SELECT 'posting' AS name, tenant_id, source_id, tx FROM ledger.posting WHERE tx >= n.next
            UNION ALL SELECT 'usage line', tenant_id, request_id, tx FROM ledger.usage_line WHERE tx >= n.next
            UNION ALL SELECT 'request', tenant_id, request_id, tx FROM ledger.request WHERE tx >= n.next
            UNION ALL SELECT 'correction', tenant_id, request_id, tx FROM ledger.correction WHERE tx >= n.next) AS t""",
    OPENING: """
        SELECT format('%s of %s', to_char(coalesce(s.month, o.month), 'YYYY-MM'), coalesce(s.tenant_id, o.tenant_id)),
               coalesce(encode(s.content, 'hex') || ' over ' || s.row_count || ' balances', 'nothing put away'),
               coalesce(o.balances, 0) || ' balances'
        FROM (SELECT * FROM ledger.seal WHERE kind = 'opening') AS s
        FULL JOIN (SELECT tenant_id, month, count(*) AS balances FROM ledger.opening_balance GROUP BY 1, 2) AS o
            USING (tenant_id, month)
        WHERE s.content IS DISTINCT FROM ledger.opening_content_v1(o.tenant_id, o.month)
           OR s.row_count IS DISTINCT FROM coalesce(o.balances, 0)""",
}
"""Sentence -> query of (place, expected, found) that returns no row when the sentence is true."""

_EDGES = """
SELECT edge, sum(row_count)::bigint AS row_count FROM (
    SELECT tx_from AS edge, row_count FROM ledger.seal WHERE kind = 'rows' AND ($1::date IS NULL OR month = $1)
    UNION ALL SELECT tx_until, 0 FROM ledger.seal WHERE kind = 'rows' AND ($1::date IS NULL OR month = $1)
    -- A month that was put away was sealed to its last row, whatever that says of its transaction.
    UNION ALL SELECT CASE WHEN $1::date IS NULL THEN sealed_until ELSE 9223372036854775807 END, 0
    FROM ledger.seal_progress) AS e
GROUP BY 1 ORDER BY 1
"""

DIFFERENT = """
WITH said AS (
    SELECT s.tenant_id, s.month, s.tx_from, x.source_id, x.row_count, x.digest
    FROM ledger.seal s JOIN ledger.seal_source q USING (tenant_id, month, number)
    CROSS JOIN LATERAL unnest(q.sources, q.row_counts, q.digests) AS x (source_id, row_count, digest)
    WHERE s.kind = 'rows' AND s.tx_from = ANY (($1::bigint[])[:cardinality($1::bigint[]) - 1])
      AND ($2::date IS NULL OR s.month = $2)
), different AS (
    SELECT tenant_id, month, tx_from, source_id, said.row_count AS said_rows, said.digest AS said,
           found.row_count AS found_rows, found.digest AS found
    FROM said
    FULL JOIN ledger.sealed_rows_v1($1::bigint[]) AS found (tenant_id, month, tx_from, source_id, row_count, digest)
        USING (tenant_id, month, tx_from, source_id)
    WHERE said.digest IS DISTINCT FROM found.digest
)
SELECT format('source %s of %s in %s, %s', d.source_id, d.tenant_id, to_char(d.month, 'YYYY-MM'),
              coalesce('seal ' || s.number, 'under no seal')),
       coalesce(d.said_rows || ' rows, ' || left(encode(d.said, 'hex'), 16), 'no rows'),
       coalesce(d.found_rows || ' rows, ' || left(encode(d.found, 'hex'), 16), 'no rows')
FROM different d
LEFT JOIN ledger.seal s ON s.tenant_id = d.tenant_id AND s.month = d.month AND s.tx_from = d.tx_from AND s.kind = 'rows'
ORDER BY 1
"""
"""The sources that differ from what their seals say, between the bounds $1; of the month $2, where it is not null."""


async def check_rows(
    connection: Connection, progress: Progress, *, month: dt.date | None = None, different: str = DIFFERENT
) -> list[Finding]:
    """Recompute every seal from its rows, slice by slice, in the caller's snapshot.

    With a month, its seals alone: `different` is `DIFFERENT`, asked of the tables in which its rows are.
    """
    edges = [(row["edge"], row["row_count"]) for row in await connection.fetch(_EDGES, month)]
    findings: list[Finding] = []
    done = 0
    total = 1 + sum(rows for _, rows in edges)
    for bounds, rows in slices(edges):
        progress(ROWS if month is None else f"{month:%Y-%m}: {ROWS}", done / total)
        findings += await named(connection, ROWS, different, bounds, month)
        if len(findings) > NAMED_MAX:
            return first(ROWS, findings)
        done += rows
    return findings


def slices(edges: Sequence[tuple[int, int]]) -> list[tuple[list[int], int]]:
    """The bounds of each slice, with its rows: together all transactions from 0 to the last edge.

    `edges` are the bounds of the sealed batches, ascending, each with the rows that are sealed from there on.
    """
    made: list[tuple[list[int], int]] = []
    bounds = [0]
    rows = 0
    for edge, row_count in edges:
        if edge > bounds[-1]:
            bounds.append(edge)
            if rows >= SLICE_ROWS:
                made.append((bounds, rows))
                bounds, rows = [edge], 0
        rows += row_count
    if len(bounds) > 1:
        made.append((bounds, rows))
    return made


async def newest(connection: Connection) -> list[Seal]:
    """The last seal of each tenant, by tenant."""
    rows = await connection.fetch(
        "SELECT DISTINCT ON (tenant_id) tenant_id, number, encode(hash, 'hex') AS hash FROM ledger.seal"
        " ORDER BY tenant_id, number DESC"
    )
    return [Seal(row["tenant_id"], row["number"], row["hash"]) for row in rows]


async def check_noted(connection: Connection, noted: Sequence[Seal]) -> list[Finding]:
    """Name the noted seals that are not in the books any more, or are others."""
    rows = await connection.fetch(
        "SELECT tenant_id, number, encode(hash, 'hex') AS hash FROM ledger.seal"
        " JOIN unnest($1::text[], $2::bigint[]) AS n (tenant_id, number) USING (tenant_id, number)",
        [seal.tenant_id for seal in noted],
        [seal.number for seal in noted],
    )
    there = {(row["tenant_id"], row["number"]): row["hash"] for row in rows}
    return [
        Finding(NOTED, f"seal {seal.number} of {seal.tenant_id}", seal.hash, found or "no seal")
        for seal in noted
        if (found := there.get((seal.tenant_id, seal.number))) != seal.hash
    ]
