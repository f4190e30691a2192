"""`behest ledger top` on a terminal: what the built-in page shows, in characters, again and again.

What clients call themselves is shown by its printable characters only: an escape sequence in an id would be an order
to the terminal.
"""

import asyncio
import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TextIO

from behest_ledger.configuration.status import BudgetStatus
from behest_ledger.money import usd_from_pico

if TYPE_CHECKING:
    from behest_ledger.store.overview import Overview

REST_FACTOR = 20
"""The ledger rests for so many times as long as it was asked."""
_CENT_DIGITS = 2
_BAR_WIDTH, _BAR_WIDTH_MIN = 20, 6
_NAME_WIDTH, _WHO_WIDTH_MIN = 28, 8
_BUDGET_HEAD = ("SPENT", "HELD", "LIMIT", "", "STATE")
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_COLOURS = {
    "Active": "32",
    "Warning": "33",
    "Exhausted": "31",
    "Suspended": "31",
    "completed": "32",
    "quota_exceeded": "33",
    "client_cancelled": "2",
    "draining": "2",
}


class Glance:
    """Lines of a given width. Pure: it reads no clock and no terminal."""

    def __init__(self, *, width: int, colour: bool, plain: bool) -> None:
        """`plain`: the terminal knows ASCII only."""
        self._width = max(40, width)
        self._colour = colour
        self._marks = "#=." if plain else "█▒·"

    def lines(self, found: "Overview", *, at: datetime, hours: float, rows: int) -> list[str]:
        """All of it, with at most so many rows a table."""
        spent = sum(one.amount_pico for one in found.bins)
        requests = sum(one.requests for one in found.bins)
        running = f"{found.live} running, ${usd(found.live_pico)} so far" if found.live else "nothing runs"
        head = f"{hours:g} h until {at:%H:%M:%S} UTC   ${usd(spent)} spent   {requests:,} requests   {running}"
        lines = [self._paint("Behest", "1") + "  " + self._cut(head, self._width - 8), ""]
        lines.append(self._paint(f"BUDGETS   {self._marks[0]} spent  {self._marks[1]} held", "1"))
        lines += self._budgets(found.budgets[:rows])
        sessions = [
            (one.session_id, one.user_id, f"{one.requests:,}", str(one.live), f"{one.tokens:,}", usd(one.amount_pico))
            for one in found.sessions[:rows]
        ]
        lines += ["", self._paint("SESSIONS", "1")]
        lines += self._table(("SESSION", "USER", "REQUESTS", "LIVE", "TOKENS", "COST (USD)"), sessions, left=2)
        recent = [
            (
                f"{one.ended_at.astimezone(UTC):%H:%M:%S}",
                one.outcome,
                one.model,
                one.session_id,
                one.user_id,
                f"{one.input_tokens:,}",
                f"{one.output_tokens:,}",
                usd(one.amount_pico),
            )
            for one in found.requests[:rows]
        ]
        lines += ["", self._paint("RECENT REQUESTS", "1")]
        head_row = ("ENDED", "OUTCOME", "MODEL", "SESSION", "USER", "IN", "OUT", "COST (USD)")
        return lines + self._table(head_row, recent, left=5)

    def _budgets(self, budgets: Sequence[BudgetStatus]) -> list[str]:
        """A bar each, and its numbers in columns; where that is too wide, bars and then names are shorter."""
        if not budgets:
            return ["  none"]
        rows = [("BUDGET", *_BUDGET_HEAD, ""), *(self._budget(one) for one in budgets)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
        numbers = sum(widths[1:]) + 2 * len(widths[1:])
        name = min(widths[0], _NAME_WIDTH)
        bar = max(_BAR_WIDTH_MIN, min(_BAR_WIDTH, self._width - 4 - name - numbers))
        name = max(8, min(name, self._width - 4 - bar - numbers))
        lines: list[str] = []
        for row, status in zip(rows, [None, *budgets], strict=True):
            cells = [cell.rjust(width) for cell, width in zip(row[1:-2], widths[1:-1], strict=True)]
            phase = row[-2].ljust(widths[-1])
            drawn = "USED".ljust(bar) if status is None else self._bar(*_fullest(status), bar)
            line = f"  {self._cut(row[0], name).ljust(name)}  {drawn}  {'  '.join(cells)}  "
            rest = self._width - len(line) - widths[-1] - 2
            who = self._cut(row[-1], rest) if rest >= _WHO_WIDTH_MIN else ""
            shown = self._paint(phase, _COLOURS[row[-2]]) if row[-2] in _COLOURS else phase
            lines.append(f"{line}{shown}  {who}" if who else f"{line}{shown}".rstrip())
        return lines

    def _budget(self, status: BudgetStatus) -> tuple[str, ...]:
        """Name, what is spent and held, the limit, the share that is spent, a word for it, and whose window it is."""
        record, (spent, held, limit) = status.record, _fullest(status)
        shown = ["$" + usd(amount) if record.unit == "usd" else f"{amount:,}" for amount in (spent, held, limit)]
        share = f"{(200 * spent // limit + 1) // 2} %" if limit else "-"
        who = ", ".join(status.biggest[0].subject) if status.biggest else ""
        return (printable(record.budget_id), *shown, share, status.phase, who)

    def _bar(self, spent: int, held: int, limit: int, width: int) -> str:
        """Spent and held apart; what is there at all has at least one mark."""
        wide = 0 if not spent else max(1, min(width, spent * width // limit if limit else width))
        more = 0 if not held else max(1, held * width // limit if limit else width)
        more = min(more, width - wide)
        return self._marks[0] * wide + self._marks[1] * more + self._marks[2] * (width - wide - more)

    def _table(self, head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
        """Columns as wide as they need; where that is too much, the texts on the left are cut."""
        if not rows:
            return ["  none"]
        cells = [head, *([printable(cell) for cell in row] for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
        while sum(widths) + 2 * len(widths) > self._width and max(widths[:left]) > 8:
            widths[widths.index(max(widths[:left]))] -= 1
        return [self._row(row, widths, left) for row in cells]

    def _row(self, row: Sequence[str], widths: Sequence[int], left: int) -> str:
        shown: list[str] = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            text = self._cut(cell, width)
            text = text.ljust(width) if column < left else text.rjust(width)
            shown.append(self._paint(text, _COLOURS[cell]) if cell in _COLOURS else text)
        return "  " + "  ".join(shown).rstrip()

    def _cut(self, text: str, width: int) -> str:
        text = printable(text)
        return text if len(text) <= width else text[: max(0, width - 1)] + ("~" if self._marks[0] == "#" else "…")

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def _fullest(status: BudgetStatus) -> tuple[int, int, int]:
    """(spent, held, limit) of the subject that used most, or of the budget itself."""
    of = status.biggest[0] if status.biggest else status
    return of.spent, of.held, status.record.limit_amount


def printable(text: str) -> str:
    """The text with `?` for what is no printable character."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def usd(amount_pico: int) -> str:
    """USD for the eye: cents, and of less than a dollar three digits that say something."""
    whole, _, fraction = usd_from_pico(amount_pico).partition(".")
    digits = _CENT_DIGITS
    if whole in ("0", "-0"):
        digits = max(digits, len(fraction) - len(fraction.lstrip("0")) + 3)
    return f"{whole}.{fraction[:digits].ljust(_CENT_DIGITS, '0')}"


async def show(dsn: str, *, hours: float, rows: int, interval_s: float, once: bool, out: TextIO = sys.stdout) -> int:
    """Print it once, or on the whole screen again and again until SIGINT or SIGTERM.

    Raises `LedgerError` where the ledger cannot be read at the first time; later that is told, and tried again.
    """
    found = await _read(dsn, hours)
    plain = "utf" not in (getattr(out, "encoding", None) or "ascii").lower()
    if once:
        size = shutil.get_terminal_size((120, 24))
        glance = Glance(width=size.columns, colour=False, plain=plain)
        out.write("\n".join(glance.lines(found, at=datetime.now(UTC), hours=hours, rows=rows)) + "\n")
        return 0
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    out.write(_ENTER)
    try:
        await _again_and_again(dsn, found, stop, hours=hours, rows=rows, interval_s=interval_s, plain=plain, out=out)
    finally:
        out.write(_LEAVE)
        out.flush()
    return 0


async def _again_and_again(
    dsn: str,
    found: "Overview",
    stop: asyncio.Event,
    *,
    hours: float,
    rows: int,
    interval_s: float,
    plain: bool,
    out: TextIO,
) -> None:
    from behest_ledger.store.errors import LedgerError

    taken_s, trouble, at = 0.0, "", datetime.now(UTC)
    while not stop.is_set():
        size = shutil.get_terminal_size((120, 24))
        glance = Glance(width=size.columns, colour=True, plain=plain)
        fitting = min(rows, max(1, (size.lines - 12) // 3))
        lines = glance.lines(found, at=at, hours=hours, rows=fitting)
        _draw(out, [*lines[: size.lines - 1], printable(trouble)[: size.columns] or "Ctrl-C ends"], size.lines)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), max(interval_s, REST_FACTOR * taken_s))
            return
        begun_s = time.monotonic()
        try:
            found, trouble, at = await _read(dsn, hours), "", datetime.now(UTC)
        except LedgerError as error:
            trouble = f"the ledger's database does not answer, trying again ({error})"
        taken_s = time.monotonic() - begun_s


def _draw(out: TextIO, lines: Iterable[str], height: int) -> None:
    """Over what is there, without a moment in which nothing is."""
    shown = list(lines)
    shown = [*shown[: height - 1], shown[-1]] if len(shown) > height else shown
    out.write("\x1b[H" + "\x1b[K\r\n".join(shown) + "\x1b[K\x1b[J")
    out.flush()


async def _read(dsn: str, hours: float) -> "Overview":
    from behest_ledger.store.migrate import check_schema
    from behest_ledger.store.overview import read_overview
    from behest_ledger.store.pool import connect

    connection = await connect(dsn)
    try:
        await check_schema(connection)
        since = datetime.now(UTC) - timedelta(hours=hours)
        return await read_overview(connection, since=since, piece=timedelta(hours=hours))
    finally:
        await connection.close()
