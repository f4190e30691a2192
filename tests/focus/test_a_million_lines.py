"""A million lines: exported as they come, in the memory of a few thousand."""

import asyncio
import csv
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow.parquet
import pytest

from behest_ledger.store.pool import connect

LINES = 1_000_000
MEMORY_MIB_MAX = {"bill.csv": 80, "bill.parquet": 160}
"""Python, asyncpg and pyarrow take most of it; a row group of Parquet is the rest."""
_MEASURED = """
import os, resource, subprocess, sys, time
begun_s = time.monotonic()
status = subprocess.call(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss // 1024, used.ru_utime + used.ru_stime, time.monotonic() - begun_s)
sys.exit(status)
"""
"""Between the tests and the export: of what a process used at most, the system counts what had started it as well."""


async def _fill(dsn: str, begin: datetime) -> Decimal:
    """500,000 requests of two lines over ten days, as the ledger would have written them; what they cost in all."""
    connection = await connect(dsn)
    month = "date_trunc('month', $2::timestamptz, 'UTC')::date"
    request = "('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid"
    try:
        await connection.execute(
            f"INSERT INTO ledger.request SELECT 'acme', {month}, {request}, 'demo/p' || n % 5, 'demo', 'u' || n % 1000,"
            " 's' || n / 2, 'gpt-4o', jsonb_build_object('team', 't' || n % 7), 'completed', 'provider', 1, 2, 23,"
            " 'v1/openai/gpt-4o#0.1', false, '{\"requests\": 1}', $2, $2::timestamptz + n * interval '1.728 s', 1"
            " FROM generate_series(1, $1::bigint) AS n",
            LINES // 2,
            begin,
        )
        await connection.execute(
            f"INSERT INTO ledger.usage_line SELECT 'acme', {month}, {request}, 0, l.class, l.quantity, l.rate,"
            " l.quantity * l.rate, 'provider', 1 FROM generate_series(1, $1::bigint) AS n"
            " CROSS JOIN (VALUES ('input', 1, 3), ('output', 2, 10)) AS l (class, quantity, rate)",
            LINES // 2,
            begin,
        )
        await connection.execute("ANALYZE ledger.request, ledger.usage_line")
        await connection.execute("SELECT brin_summarize_new_values('ledger.request_default_ended_at_idx')")
    finally:
        await connection.close()
    return Decimal(LINES // 2 * 23).scaleb(-12)


@pytest.mark.parametrize("name", ["bill.csv", "bill.parquet"])
def test_they_are_exported_in_bounded_memory(database: str, tmp_path: Path, name: str) -> None:
    begin = datetime(2026, 4, 1, tzinfo=UTC)
    cost = asyncio.run(_fill(database, begin))
    path = tmp_path / name
    end = begin + timedelta(days=11)
    command = [sys.executable, "-I", "-m", "behest_proxy.cli.main", "ledger", "export", "--per-session"]
    times = ["--from", f"{begin:%Y-%m-%d}", "--to", f"{end:%Y-%m-%d}"]
    arguments = [*command, *times, "--database-url", database, "--output", str(path)]
    ran = subprocess.run(
        [sys.executable, "-I", "-c", _MEASURED, *arguments], stdout=subprocess.PIPE, check=True, text=True
    )
    memory_mib, cpu_s, took_s = map(float, ran.stdout.split())
    figures = f"{memory_mib:.0f} MiB, {cpu_s:.0f} s of CPU, {took_s:.0f} s in all, {LINES / took_s:,.0f} lines a second"
    sys.stderr.write(f"{name}: {figures}\n")
    assert memory_mib < MEMORY_MIB_MAX[name]
    if name.endswith(".csv"):
        with path.open(newline="") as file:
            costs = [Decimal(row["BilledCost"]) for row in csv.DictReader(file)]
    else:
        costs = pyarrow.parquet.read_table(path, columns=["BilledCost"]).column("BilledCost").to_pylist()
    assert len(costs) == LINES
    assert sum(costs) == cost
