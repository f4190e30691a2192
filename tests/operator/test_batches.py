"""Manifests that come together: written together, judged one by one."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from behest_ledger.configuration.manifests import from_object
from behest_ledger.configuration.problems import InvalidManifestsError
from behest_ledger.store.configuration import ApplyReport, apply_manifests
from behest_ledger.store.errors import LedgerRefusedError, LedgerUnavailableError
from behest_ledger.store.pool import open_pool
from behest_operator import batches
from behest_operator.batches import Batches, Verdict
from cluster.sql import rows


def budget(name: str, namespace: str = "demo", **spec: Any) -> Any:
    return from_object(
        {
            "apiVersion": "behest.ai/v1alpha1",
            "kind": "Budget",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"limit": {"requests": 5}, "scope": {"project": "shop"}, "window": {"period": "Day"}, **spec},
        }
    )


class Counted:
    """The ledger's own function, and what it was called with."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.fault: Callable[[list[str]], Exception | None] = lambda names: None

    async def __call__(self, pool: Any, manifests: Any, **options: Any) -> ApplyReport:
        names = [manifest.name for manifest in manifests]
        self.calls.append(names)
        fault = self.fault(names)
        if fault is not None:
            raise fault
        return await apply_manifests(pool, manifests, **options)


def together(dsn: str, monkeypatch: pytest.MonkeyPatch, work: Callable[[Batches, Counted], Awaitable[None]]) -> Counted:
    counted = Counted()
    monkeypatch.setattr(batches, "apply_manifests", counted)

    async def main() -> None:
        pool = await open_pool(dsn)
        try:
            await work(Batches(pool), counted)
        finally:
            pool.terminate()

    asyncio.run(main())
    return counted


def test_those_that_come_while_one_is_written_are_one_batch(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(many: Batches, counted: Counted) -> None:
        verdicts = await asyncio.gather(*(many.apply(budget(f"b{number}"), "demo") for number in range(450)))
        assert {verdict.action for verdict in verdicts} == {"created"}
        assert verdicts[0].warnings[0].startswith("Budget demo/b0: ")
        assert await many.apply(budget("b1"), "demo") == Verdict(action="unchanged", warnings=verdicts[1].warnings)

    counted = together(database, monkeypatch, work)
    assert [len(call) for call in counted.calls] == [200, 200, 50, 1]
    assert rows(database, "SELECT count(*) AS many FROM ledger.budget") == [{"many": 450}]


def test_what_is_wrong_is_refused_alone_and_in_its_own_words(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(many: Batches, counted: Counted) -> None:
        await many.apply(budget("old"), "demo")
        bad = budget("old", limit={"tokens": 5})
        odd = budget("odd", scope={"tenant": "acme"})
        found = await asyncio.gather(
            *(many.apply(item, "demo") for item in (budget("a"), bad, budget("b"), odd)), return_exceptions=True
        )
        refused = [item for item in found if isinstance(item, InvalidManifestsError)]
        assert [error.path for item in refused for error in item.errors] == ["spec.limit", "spec.scope.tenant"]
        assert [item.action for item in found if isinstance(item, Verdict)] == ["created", "created"]

    counted = together(database, monkeypatch, work)
    assert counted.calls == [["old"], ["a", "old", "b", "odd"], ["a", "b"]]


def test_one_that_the_database_takes_offence_at_keeps_no_other_from_it(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(many: Batches, counted: Counted) -> None:
        counted.fault = lambda names: LedgerRefusedError("a check") if "bad" in names else None
        found = await asyncio.gather(
            *(many.apply(budget(name), "demo") for name in ("a", "bad", "b")), return_exceptions=True
        )
        assert [type(item) for item in found] == [Verdict, LedgerRefusedError, Verdict]

    together(database, monkeypatch, work)


def test_while_the_ledger_is_away_everybody_is_told_once(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(many: Batches, counted: Counted) -> None:
        counted.fault = lambda names: LedgerUnavailableError("away")
        found = await asyncio.gather(*(many.apply(budget(name), "demo") for name in ("a", "b")), return_exceptions=True)
        assert [type(item) for item in found] == [LedgerUnavailableError, LedgerUnavailableError]
        counted.fault = lambda names: None
        assert (await many.apply(budget("a"), "demo")).action == "created"

    assert len(together(database, monkeypatch, work).calls) == 2


def test_the_same_resource_and_another_tenant_wait_for_the_next_batch(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(many: Batches, counted: Counted) -> None:
        await asyncio.gather(
            many.apply(budget("a"), "demo"),
            many.apply(budget("a", limit={"requests": 9}), "demo"),
            many.apply(budget("c", "other"), "other"),
            many.apply(budget("d", "other"), "acme"),
            return_exceptions=True,
        )

    assert together(database, monkeypatch, work).calls == [["a"], ["a", "c"], ["d"]]
    found = rows(database, "SELECT name, limit_amount::int AS amount FROM ledger.budget ORDER BY 1")
    assert [tuple(row.values()) for row in found] == [("a", 9), ("c", 5)]
