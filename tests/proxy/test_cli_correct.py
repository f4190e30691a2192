"""`behest ledger correct` from the command line, against a real PostgreSQL."""

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from behest_ledger.corrections import CorrectionsRefusedError
from behest_proxy.cli.correct import read_corrections
from behest_proxy.cli.main import main
from ledger.books import Books, keep_books, settlement

ONE = UUID("01a204f1-93e1-7d87-96e7-a024204f7c00")
TWO = UUID("01a204f1-93e1-7d87-96e7-a024204f7c01")


def correct(*argv: str) -> int:
    return main(["ledger", "correct", *argv])


def two_requests(dsn: str) -> list[UUID]:
    ids: list[UUID] = []

    async def work(books: Books) -> None:
        await books.budget("money", 10**13)
        for _ in range(2):
            one, _ = await books.admit(input=2, need=3)
            await books.settle(settlement(one, input=2, output=3))
            ids.append(one)

    keep_books(dsn, work)
    return ids


def totals(dsn: str) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []

    async def work(books: Books) -> None:
        rows = await books.connection.fetch(
            "SELECT r.input_tokens, r.output_tokens, r.amount_pico::bigint, c.correction_id, c.reason"
            " FROM ledger.request_now r LEFT JOIN ledger.correction c USING (tenant_id, month, request_id)"
            " ORDER BY r.request_id"
        )
        found.extend(tuple(row) for row in rows)

    keep_books(dsn, work)
    return found


def test_a_csv_file_is_tried_applied_and_applied_once(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = two_requests(database)
    file = tmp_path / "november.csv"
    file.write_text(
        "request_id,class,quantity,rate_pico,reason\n"
        f"{one},output,5,,invoice 11\n"
        f"{two},input,1000000000000,1,invoice 11\n"
        f"\n{two},output,0,,invoice 11\n"
    )
    wanted = ["--file", str(file), "--id", "2026-11", "--database-url", database]
    assert correct(*wanted, "--dry-run") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown[:3]] == [
        ["REQUEST", "OLD", "(USD)", "NEW", "(USD)", "DIFFERENCE", "RESULT"],
        [str(one), "0.000000000036", "0.000000000056", "+0.00000000002", "corrected"],
        [str(two), "0.000000000036", "1", "+0.999999999964", "corrected"],
    ]
    assert shown[3] == "2 of 2 requests would be corrected: nothing was changed, +0.999999999984 USD"
    assert totals(database) == [(2, 3, 36, None, None)] * 2
    assert correct(*wanted) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 requests corrected, +0.999999999984 USD"
    assert totals(database) == [(2, 5, 56, "2026-11", "invoice 11"), (10**12, 0, 10**12, "2026-11", "invoice 11")]
    assert correct(*wanted) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 2 requests corrected, 0 USD"


def test_jsonl_takes_the_providers_usage(database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = two_requests(database)
    file = tmp_path / "november.jsonl"
    usage = {"prompt_tokens": 4, "completion_tokens": 1}
    lines = [
        {"request_id": str(one), "usage": usage},
        {"request_id": str(two), "class": "output", "quantity": 2, "reason": "told by mail", "tenant_id": "acme"},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    assert correct("--file", str(file), "--reason", "invoice", "--database-url", database) == 0
    assert "-0.00000000001" in capsys.readouterr().out
    (first, second) = totals(database)
    assert first[:3] == (4, 1, 22)
    assert second[:3] == (2, 2, 26)
    assert (first[4], second[4]) == ("invoice", "told by mail")
    assert first[3] == second[3]
    assert first[3].startswith("file ")


def test_nothing_is_half_applied_and_every_wrong_line_is_named(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, _ = two_requests(database)
    file = tmp_path / "wrong.csv"
    file.write_text(f"request_id,class,quantity\n{one},output,5\n{ONE},output,5\n{TWO},reasoning,5\n")
    assert correct("--file", str(file), "--reason", "r", "--database-url", database) == 2
    shown = capsys.readouterr()
    assert f"{file}, line 3: request_id: no request {ONE} was ever admitted" in shown.err
    assert f"{file}, line 4: request_id: no request {TWO} was ever admitted" in shown.err
    assert "nothing was changed: 2 of its lines" in shown.err
    assert totals(database) == [(2, 3, 36, None, None)] * 2
    assert correct("--file", str(tmp_path / "none.csv"), "--database-url", database) == 2
    assert "none.csv cannot be read" in capsys.readouterr().err


CSV_HEAD = "request_id,class,quantity,reason,id,tenant_id\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "line 1: class: the column is missing"),
        ("request_id,class\n", "line 1: quantity: the column is missing"),
        ("request_id,class,quantity,color\n", "line 1: color: there is no such column"),
        (CSV_HEAD, "the file: has no corrections"),
        (CSV_HEAD + "x,output,1,r\n", "line 2: request_id: is no id of a request"),
        (CSV_HEAD + f"{ONE},water,1,r\n", "line 2: class: must be one of input,"),
        (
            CSV_HEAD + f"{ONE},output,-1,r\n",
            "line 2: quantity: must be a whole number from 0 to 1000000000000, not '-1'",
        ),
        (CSV_HEAD + f"{ONE},output,1.5,r\n", "line 2: quantity: must be a whole number"),
        (CSV_HEAD + f"{ONE},output,1000000000001,r\n", "line 2: quantity: must be a whole number"),
        (CSV_HEAD + f"{ONE},output,²,r\n", "line 2: quantity: must be a whole number"),
        (CSV_HEAD + f"{ONE},output,,r\n", "line 2: quantity: is missing"),
        (CSV_HEAD + f"{ONE},output,1,\n", "line 2: reason: is missing"),
        (CSV_HEAD + f"{ONE},output,1,{'r' * 501}\n", "line 2: reason: must be a text of at most 500"),
        (CSV_HEAD + f"{ONE},output,1,r,i,t,more\n", "line 2: has more cells than there are columns"),
        (CSV_HEAD + f"{ONE},output,1,r\n{ONE},output,2,r\n", "line 3: class: output is there twice for this request"),
        (CSV_HEAD + f"{ONE},output,1,r,i\n{ONE},input,2,r,j\n", "line 3: id: is another one than in line 2"),
        (CSV_HEAD + f"{ONE},output,1,r\n{ONE},input,2,s\n", "line 3: reason: is another one than in line 2"),
        (CSV_HEAD + f'{ONE},"output,1,r\n', "the file: is no CSV"),
    ],
)
def test_a_wrong_line_of_a_csv_file_is_named_with_its_field(text: str, error: str) -> None:
    assert error in errors(text.encode(), jsonl=False)[0]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "the file: has no corrections"),
        ("{", "line 1: is no JSON"),
        ("\n[]", "line 2: is no JSON object"),
        ('{"color": 1}', "line 1: color: there is no such field"),
        ('{"request_id": 7}', "line 1: request_id: must be a text"),
        (f'{{"request_id": "{ONE}", "usage": {{}}}}', "line 1: usage: names no tokens"),
        (f'{{"request_id": "{ONE}", "usage": [1]}}', "line 1: usage: names no tokens"),
        (f'{{"request_id": "{ONE}", "usage": {{}}, "class": "output"}}', "line 1: class: not beside usage"),
        (f'{{"request_id": "{ONE}", "class": "output", "quantity": true}}', "line 1: quantity: must be a whole number"),
        (f'{{"request_id": "{ONE}", "class": "output", "quantity": 1.0}}', "line 1: quantity: must be a whole number"),
        (
            f'{{"request_id": "{ONE}", "class": "output", "quantity": 1, "rate_pico": -1}}',
            "line 1: rate_pico: must be a whole number",
        ),
        ("\udcff", "byte 0: is not UTF-8"),
    ],
)
def test_a_wrong_line_of_a_jsonl_file_is_named_with_its_field(text: str, error: str) -> None:
    assert error in errors(text.encode(errors="surrogateescape"), jsonl=True)[0]


def test_every_wrong_line_is_told() -> None:
    text = CSV_HEAD + f"x,output,1,r\n{ONE},water,1,r\n{TWO},output,1,r\n"
    assert [error.split(":")[0] for error in errors(text.encode(), jsonl=False)] == ["line 2", "line 3"]


def errors(content: bytes, *, jsonl: bool) -> list[str]:
    with pytest.raises(CorrectionsRefusedError) as refused:
        read_corrections(content, jsonl=jsonl, correction_id=None, reason="r" if jsonl else None)
    return [str(error) for error in refused.value.errors]
