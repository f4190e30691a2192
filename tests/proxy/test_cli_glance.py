"""`behest ledger top` on a terminal: the books in characters, and no order to the terminal but its own."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from behest_ledger.configuration.records import BudgetRecord
from behest_ledger.configuration.status import BudgetStatus, SubjectStatus
from behest_ledger.store.overview import ModelBin, Overview, RecentRequest, SessionSpend
from behest_proxy.cli.glance import Glance, printable, usd
from behest_proxy.cli.main import main
from ledger.books import Books, keep_books, settlement
from ledger.sidecars import Sidecar
from stack import wait_until

NOON = datetime(2026, 4, 1, 12, tzinfo=UTC)
HOSTILE = "ann\x1b]0;owned\x07\x1b[2J"


def budget(spent: int, held: int, limit: int = 100, **more: Any) -> BudgetStatus:
    record: dict[str, Any] = {
        "tenant_id": "acme", "budget_id": "demo/money", "namespace": "demo", "name": "money", "scope": {},
        "workload_labels": None, "per": [], "unit": "tokens", "token_kind": "both", "limit_amount": limit,
        "period": "day", "alignment": "calendar", "time_zone": "UTC", "enforcement": "hard", "alert_thresholds": [],
        "suspended": False, "refusal": "quota", **more,
    }  # fmt: skip
    return BudgetStatus(record=BudgetRecord(**record), spent=spent, held=held, remaining=limit - spent - held)


def overview(**more: Any) -> Overview:
    session = SessionSpend(
        tenant_id="acme", project_id="demo/shop", user_id=HOSTILE, session_id="s" * 90, requests=1200, live=1,
        tokens=5, amount_pico=10**12, last_at=NOON,
    )  # fmt: skip
    request = RecentRequest(
        request_id="r", tenant_id="acme", project_id="demo/shop", user_id=HOSTILE, session_id="s1", model="small",
        outcome="completed", input_tokens=1, output_tokens=2, amount_pico=29, admitted_at=NOON, ended_at=NOON,
    )  # fmt: skip
    made: dict[str, Any] = {
        "live": 1, "live_pico": 10**10, "sessions": [session], "requests": [request], "budgets_left_out": 0,
        "bins": [ModelBin(begins_at=NOON, model="small", is_others=False, requests=1200, tokens=5, amount_pico=10**12)],
        "budgets": [budget(50, 25)],
        **more,
    }  # fmt: skip
    return Overview(**made)


def lines(found: Overview, *, width: int = 120, colour: bool = False, plain: bool = False) -> list[str]:
    return Glance(width=width, colour=colour, plain=plain).lines(found, at=NOON, hours=24, rows=5)


def test_what_is_held_is_another_part_of_the_bar_than_what_is_spent() -> None:
    (bar,) = [line for line in lines(overview()) if "demo/money" in line]
    assert "█" * 10 + "▒" * 5 + "·" * 5 in bar
    assert bar.split()[2:] == ["50", "25", "100", "50", "%", "Active"]
    (bar,) = [line for line in lines(overview(), plain=True) if "demo/money" in line]
    assert "#" * 10 + "=" * 5 + "." * 5 in bar
    assert bar.isascii()


@pytest.mark.parametrize(
    ("spent", "held", "expected"),
    [(0, 0, (0, 0)), (1, 1, (1, 1)), (1000, 0, (20, 0)), (99, 1, (19, 1)), (250, 50, (20, 0)), (0, 1000, (0, 20))],
)
def test_a_bar_is_never_longer_than_it_may_be(spent: int, held: int, expected: tuple[int, int]) -> None:
    found = lines(overview(budgets=[budget(spent, held)]))
    (bar,) = [line for line in found if "demo/money" in line]
    assert (bar.count("█"), bar.count("▒")) == expected
    assert bar.count("█") + bar.count("▒") + bar.count("·") == 20


@pytest.mark.parametrize("width", [10, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    long = budget(
        3 * 10**12, 10**9, 10**13, unit="usd", budget_id="a-namespace/a-budget-with-a-long-name", per=["session"]
    )
    full = msgspec.structs.replace(
        long, biggest=[SubjectStatus(subject=["shop/web/somebody/s1"], spent=10**12, held=10**9)]
    )
    found = lines(overview(budgets=[full, budget(50, 25), budget(275019, 15860, 420000)]), width=width)
    for line in found:
        assert len(line) <= max(width, 80)  # below that the numbers alone need more
    if width >= 200:
        assert any("shop/web" in line for line in found)


def test_numbers_of_budgets_stand_below_each_other() -> None:
    found = lines(overview(budgets=[budget(7, 1), budget(275019, 15860, 420000)]))
    head, first, second = [line for line in found if "demo/money" in line or "LIMIT" in line]
    for name, number, other in (("SPENT", " 7 ", " 275,019 "), ("LIMIT", " 100 ", " 420,000 ")):
        end = head.index(name) + len(name)
        assert first[:end].endswith(number[:-1])
        assert second[:end].endswith(other[:-1])
    assert first.index("Active") == second.index("Active") == head.index("STATE")


def test_ids_give_no_orders_to_the_terminal() -> None:
    for line in lines(overview()):
        assert line.isprintable(), line
    painted = "\n".join(lines(overview(), colour=True))
    assert re.fullmatch(r"\x1b\[\d+m", min(set(re.findall(r"\x1b[^m]*m", painted)), key=len))
    assert "\x07" not in painted
    assert "owned" in painted
    assert printable(HOSTILE) == "ann?]0;owned??[2J"


@pytest.mark.parametrize(
    ("amount_pico", "shown"),
    [(0, "0.00"), (10**12, "1.00"), (1_239_000_000_000, "1.23"), (29, "0.000000000029"), (123_456_789_000, "0.123")],
)
def test_money_is_short_and_says_something(amount_pico: int, shown: str) -> None:
    assert usd(amount_pico) == shown


async def _books(books: Books) -> None:
    await books.budget("money", 1000)
    sidecar = await Sidecar.start(books)
    await books.settle(settlement(await sidecar.admitted(), input=1, output=3))
    await sidecar.checkpoint(await sidecar.admitted(), input=2, output=5)


def test_once_prints_it_and_ends(
    database: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    keep_books(database, _books)
    assert main(["ledger", "top", "--once", "--database-url", database]) == 0
    told = capsys.readouterr().out
    assert "1 running, $0.000000000056 so far" in told
    assert "demo/money" in told
    assert "\x1b" not in told
    assert [line.split() for line in told.splitlines() if line.startswith("  s1")] == [
        ["s1", "ann", "1", "1", "11", "0.000000000089"]
    ]


def test_on_a_terminal_it_goes_on_until_it_is_told_to_stop_and_leaves_the_screen_as_it_was(database: str) -> None:
    keep_books(database, _books)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-I", "-m", "behest_proxy.cli.main", "ledger", "top", "--interval", "0.1"]
    shown = b""
    child = subprocess.Popen(
        [*command, "--database-url", database], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "COLUMNS": "100", "LINES": "30", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)

    def read() -> bytes:
        nonlocal shown
        with contextlib.suppress(OSError):
            shown += os.read(ours, 1 << 16)
        return shown

    try:
        wait_until(lambda: read().count(b"\x1b[H") >= 2, what="the second look")
        child.send_signal(signal.SIGINT)
        # What is left comes piece by piece, and then an error: nobody has the other end any more.
        os.set_blocking(ours, True)
        with contextlib.suppress(OSError):
            while part := os.read(ours, 1 << 16):
                shown += part
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    assert shown.startswith(b"\x1b[?1049h\x1b[?25l")
    assert shown.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")
    assert b"demo/money" in shown
    assert b"Ctrl-C ends" in shown


def test_a_ledger_that_is_away_at_the_beginning_is_said_and_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    nobody = "postgresql://behest@127.0.0.1:1/behest?sslmode=disable"
    assert main(["ledger", "top", "--once", "--database-url", nobody]) == 2
    assert "does not answer" in capsys.readouterr().err
