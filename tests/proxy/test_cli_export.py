"""`behest ledger export` and who looks on: a bar on a terminal, nothing of it in a pipe or a file."""

import contextlib
import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ledger.books import Books, keep_books, settlement

COMMAND = [sys.executable, "-I", "-m", "behest_proxy.cli.main", "ledger", "export"]


async def _two_hours(books: Books) -> None:
    for hours in (30, 2):
        one, _ = await books.admit()
        await books.settle(settlement(one, input=1, output=3))
        # Nobody may change a row of the books: for this, the triggers that say so are put aside.
        async with books.connection.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute(
                "UPDATE ledger.request SET ended_at = date_trunc('hour', clock_timestamp()) - $2::interval"
                " WHERE request_id = $1",
                one,
                timedelta(hours=hours),
            )


def _arguments(database: str, path: Path) -> list[str]:
    now = datetime.now(UTC)
    times = ["--from", f"{now - timedelta(days=3):%Y-%m-%d}", "--to", f"{now:%Y-%m-%dT%H:00Z}"]
    return [*COMMAND, *times, "--database-url", database, "--output", str(path)]


def test_a_bar_is_shown_on_a_terminal_and_wiped_away(database: str, tmp_path: Path) -> None:
    keep_books(database, _two_hours)
    ours, theirs = pty.openpty()
    child = subprocess.Popen(_arguments(database, tmp_path / "bill.csv"), stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # what a terminal says when nobody has its other end
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert child.wait(60) == 0
    bars = re.findall(r"\r\x1b\[K\[([#.]{24})\] +(\d+)%  \d{4}-\d\d-\d\d \d\d:00  ([\d,]+) rows", shown.decode())
    assert [rows for _, _, rows in bars] == ["2", "4"]
    assert 0 < int(bars[0][1]) < int(bars[1][1]) <= 100
    assert bars[0][0].count("#") < bars[1][0].count("#")
    assert shown.decode().endswith(f"\r\x1b[K4 rows: {tmp_path / 'bill.csv'}\r\n")


def test_there_is_no_bar_in_a_pipe(database: str, tmp_path: Path) -> None:
    keep_books(database, _two_hours)
    path = tmp_path / "bill.csv"
    ran = subprocess.run(_arguments(database, path), capture_output=True, check=True)
    assert (ran.stdout, ran.stderr.decode()) == (b"", f"4 rows: {path}\n")
    ran = subprocess.run(_arguments(database, path)[:-2], capture_output=True, check=True)
    assert (ran.stdout, ran.stderr) == (path.read_bytes(), b"")
