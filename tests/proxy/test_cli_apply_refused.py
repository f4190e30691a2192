"""Manifests that cannot be meant: told by file, document and field; nothing of them is applied; and twice the same."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from behest_ledger.configuration.manifests import parse
from behest_ledger.configuration.plan import PutBudget, plan
from behest_ledger.configuration.state import ConfigurationState
from behest_ledger.store.configuration import apply_plan, connected
from behest_ledger.store.errors import LedgerRefusedError
from behest_proxy.cli.main import main

GOOD = """
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: good, namespace: demo}
spec: {scope: {user: ann}, limit: {requests: 5}, window: {period: Day}}
"""

IT = """
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: it, namespace: demo}
spec: {scope: {user: ann}, limit: LIMIT, window: {period: Day}}
"""

MUST_BE_MONEY = 'spec.limit.amount: must be a decimal string such as "5.00", got'
MUST_BE_TOKENS = "spec.limit.tokens: must be from 1 to 1000000000000000, got"

LIMITS = [
    ('{amount: "-5.00", currency: USD}', f'{MUST_BE_MONEY} "-5.00"'),
    ("{amount: -5, currency: USD}", f"{MUST_BE_MONEY} -5"),
    ('{amount: "0", currency: USD}', "spec.limit.amount: must be more than zero; spec.suspended stops everything"),
    ('{amount: "1e400", currency: USD}', f'{MUST_BE_MONEY} "1e400"'),
    ("{amount: .inf, currency: USD}", f"{MUST_BE_MONEY} inf"),
    ('{amount: "NaN", currency: USD}', f'{MUST_BE_MONEY} "NaN"'),
    ('{amount: "٥", currency: USD}', f'{MUST_BE_MONEY} "٥"'),
    ('{amount: "", currency: USD}', f'{MUST_BE_MONEY} ""'),
    ('{amount: "1000000000000.00", currency: USD}', f'{MUST_BE_MONEY} "1000000000000.00"'),
    ('{amount: "0.0000000000001", currency: USD}', f'{MUST_BE_MONEY} "0.0000000000001"'),
    ('{amount: "5", currency: BTC}', 'spec.limit.currency: must be USD, got "BTC"'),
    ('{amount: "5", currency: usd}', 'spec.limit.currency: must be USD, got "usd"'),
    ("{tokens: 0}", f"{MUST_BE_TOKENS} 0"),
    ("{tokens: -1}", f"{MUST_BE_TOKENS} -1"),
    ("{tokens: 1000000000000001}", f"{MUST_BE_TOKENS} 1000000000000001"),
    ("{tokens: 9223372036854775808}", f"{MUST_BE_TOKENS} 9223372036854775808"),
    ("{tokens: 1.0e+3}", "spec.limit.tokens: must be a whole number, got 1000.0"),
    ("{requests: -1}", "spec.limit.requests: must be from 1 to 1000000000000, got -1"),
    ("{concurrency: 5}", 'spec.limit: has no member "concurrency"'),
    ('{amount: "5", currency: USD, tokens: 5}', "got amount and tokens"),
    ("{tokens: 5, requests: 5}", "got tokens and requests"),
    ("{}", "got none of them"),
    ("5", "spec.limit: must be a mapping, got 5"),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


class Ledger:
    """A ledger as the command sees it, and what is in it."""

    def __init__(self, dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.dsn = dsn
        self.capsys = capsys

    def apply(self, *files: str, status: int = 0) -> list[str]:
        """What the command says; on standard error where it refuses."""
        arguments = [argument for name in files for argument in ("-f", name)]
        assert main(["apply", *arguments, "--database-url", self.dsn]) == status
        out, err = self.capsys.readouterr()
        return (err if status else out).splitlines()

    def stored(self) -> tuple[int, list[str]]:
        """The configuration's version, and all budgets."""

        async def read() -> tuple[int, list[str]]:
            async with connected(self.dsn) as connection:
                version = await connection.fetchval("SELECT version FROM ledger.configuration_version")
                rows = await connection.fetch("SELECT to_jsonb(b)::text AS b FROM ledger.budget b ORDER BY budget_id")
                return version, [row["b"] for row in rows]

        return asyncio.run(read())


@pytest.fixture
def ledger(database: str, capsys: pytest.CaptureFixture[str]) -> Ledger:
    return Ledger(database, capsys)


def write(**files: str) -> None:
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)


@pytest.mark.parametrize(("limit", "reason"), LIMITS, ids=[limit for limit, _ in LIMITS])
def test_a_limit_that_cannot_be_meant_is_told_by_its_file_document_and_field(
    capsys: pytest.CaptureFixture[str], limit: str, reason: str
) -> None:
    write(it=GOOD + "---" + IT.replace("LIMIT", limit))
    verdicts = list[str]()
    for _ in range(2):
        assert main(["apply", "-f", "it.yaml"]) == 2  # before any database is needed
        out, err = capsys.readouterr()
        assert out == ""
        verdicts.append(err)
    (told,) = verdicts[0].splitlines()
    assert told.startswith("behest: Budget demo/it: spec.limit")
    assert told.endswith("(it.yaml, document 2)")
    assert reason in told
    assert verdicts[1] == verdicts[0]


def test_one_wrong_document_in_one_file_applies_nothing_of_any_file(ledger: Ledger) -> None:
    before = ledger.stored()
    write(good=GOOD, bad=IT.replace("LIMIT", "{tokens: -1}"))
    for _ in range(2):
        (told,) = ledger.apply("good.yaml", "bad.yaml", status=2)
        assert told == f"behest: Budget demo/it: {MUST_BE_TOKENS} -1 (bad.yaml, document 1)"
        assert ledger.stored() == before


def test_one_budget_in_two_files_is_told_with_both_places(ledger: Ledger) -> None:
    before = ledger.stored()
    write(one=IT.replace("LIMIT", "{requests: 1}") + "---" + GOOD, two=GOOD)
    for _ in range(2):
        (told,) = ledger.apply("one.yaml", "two.yaml", status=2)
        assert told == "behest: Budget demo/good: is there twice, first in one.yaml, document 2 (two.yaml, document 1)"
        assert ledger.stored() == before


def test_what_is_immutable_is_told_field_by_field_and_nothing_beside_it_is_applied(ledger: Ledger) -> None:
    write(it=IT.replace("LIMIT", "{requests: 5}"))
    assert ledger.apply("it.yaml") == ["budget/it created"]
    before = ledger.stored()
    changed = IT.replace("LIMIT", "{tokens: 5}").replace("period: Day", "period: Week, timeZone: Asia/Kathmandu")
    write(it=GOOD + "---" + changed)
    verdicts = [ledger.apply("it.yaml", status=2) for _ in range(2)]
    assert verdicts[0] == verdicts[1]
    changes = [
        ("spec.limit", "in requests", "in tokens"),
        ("spec.window.period", "Day", "Week"),
        ("spec.window.timeZone", "UTC", "Asia/Kathmandu"),
    ]
    cure = "make a new Budget of another name (it.yaml, document 2)"
    assert verdicts[0] == [
        f"behest: Budget demo/it: {path}: is immutable: it is {was}, got {got}; {cure}" for path, was, got in changes
    ] + ["behest: 3 errors; nothing was applied"]
    assert ledger.stored() == before


def test_a_budget_that_matches_nothing_is_applied_with_a_hint_each_time(
    database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(it=IT.replace("LIMIT", "{requests: 5}"))
    for action in ("created", "unchanged"):
        assert main(["apply", "-f", "it.yaml", "--database-url", database]) == 0
        out, err = capsys.readouterr()
        assert out == f"budget/it {action}\n"
        assert err == "behest: warning: Budget demo/it: spec.scope: matches no project\n"


def test_a_tiers_rates_are_shown_where_they_are_asked_for_and_never_as_budgets(ledger: Ledger) -> None:
    write(
        tier="""
apiVersion: behest.ai/v1alpha1
kind: Tier
metadata: {name: free, namespace: demo}
spec: {number: 1, requestsPerMinute: 10, concurrency: 3}
"""
    )
    ledger.apply("tier.yaml")

    def shown(*arguments: str) -> str:
        assert main(["get", "budgets", *arguments, "--database-url", ledger.dsn]) == 0
        return ledger.capsys.readouterr().out

    assert shown() == "There are no budgets: behest apply -f FILE\n"
    assert "3 at once" in shown("--rates")
    assert "10 requests" in shown("--rates")
    assert '"items":[]' in shown("--rates", "-o", "json").replace(" ", "").replace("\n", "")


# The database itself is the second guard: whoever writes to it, and with whatever.


def _changes(limits: list[int]) -> list[PutBudget]:
    text = "---".join(IT.replace("name: it", f"name: b{number}") for number in range(len(limits)))
    planned = plan(
        ConfigurationState(), parse(text.replace("LIMIT", "{tokens: 5}")), tenant_of_namespace=lambda _: "acme"
    )
    changes = [change for change in planned.changes if isinstance(change, PutBudget)]
    return [_limited(change, limit) for change, limit in zip(changes, limits, strict=True)]


def _limited(change: Any, limit: int) -> Any:
    from msgspec.structs import replace

    return replace(change, record=replace(change.record, limit_amount=limit))


@pytest.mark.parametrize("limit", [-1, 10**38, -(10**50)])
def test_the_database_refuses_what_no_manifest_can_say_and_keeps_nothing_of_that_plan(
    ledger: Ledger, limit: int
) -> None:
    from behest_ledger.configuration.plan import Plan

    before = ledger.stored()

    async def work() -> None:
        async with connected(ledger.dsn) as connection:
            bad = Plan(changes=tuple(_changes([7, limit, 8])), outcomes=(), warnings=())
            for _ in range(2):
                with pytest.raises(LedgerRefusedError):
                    await apply_plan(connection, bad)

    asyncio.run(work())
    assert ledger.stored() == before


def test_the_largest_limits_are_held_and_spent_to_the_last_unit(ledger: Ledger) -> None:
    write(it=IT.replace("LIMIT", '{amount: "999999999999.999999999999", currency: USD}'))
    assert ledger.apply("it.yaml") == ["budget/it created"]

    async def work() -> None:
        async with connected(ledger.dsn) as connection:
            window = await connection.fetchval("SELECT ledger.open_window_v1('demo', 'demo/it', '[]')")
            await connection.execute(
                "UPDATE ledger.budget_window SET spent = ceiling WHERE window_id = $1 AND ceiling = $2::text::numeric",
                window,
                str(10**24 - 1),
            )
            left = await connection.fetchval("SELECT limit_amount - spent FROM ledger.budget_window")
            assert left == 0

    asyncio.run(work())
    assert main(["get", "budgets", "--database-url", ledger.dsn]) == 0
    assert "999999999999.999999999999" in ledger.capsys.readouterr().out
