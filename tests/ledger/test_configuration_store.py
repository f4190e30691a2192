import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from behest_ledger.configuration.kinds import Budget
from behest_ledger.configuration.manifests import InvalidManifestsError, parse
from behest_ledger.configuration.plan import Plan, PutBudget, plan
from behest_ledger.configuration.state import ConfigurationState
from behest_ledger.prices.book import (
    BookDocument,
    Condition,
    ModelPrices,
    PriceBook,
    PriceSheet,
    ProviderPrices,
    TieredRate,
)
from behest_ledger.prices.matching import AnyOf, Equals, Regex
from behest_ledger.store.configuration import (
    apply_plan,
    apply_text,
    configuration_version,
    connected,
    load_configuration,
    read_budgets,
    read_state,
)
from behest_ledger.store.errors import LedgerRefusedError
from behest_ledger.store.pool import open_pool
from behest_ledger.store.prices import PriceVersionError, load_book, load_current_book, store_book

EXAMPLES = """
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {name: shop, namespace: demo}
spec: {tenant: acme, defaultModel: gpt-4o-mini, defaultTier: free}
---
apiVersion: behest.ai/v1alpha1
kind: Upstream
metadata: {name: openai, namespace: demo}
spec:
  baseURL: https://api.openai.com/v1
  models: [{name: gpt-4o-mini, prices: {input: "0.15", output: "0.60"}}]
---
apiVersion: behest.ai/v1alpha1
kind: Tier
metadata: {name: free, namespace: demo}
spec: {number: 1, requestsPerMinute: 10, requestsPerDay: 100, tokensPerDay: 50000}
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: sessions, namespace: demo}
spec:
  scope: {project: shop, workloadSelector: {matchLabels: {app: web}}, model: "gpt_4*"}
  per: [session]
  limit: {amount: "999999999999.999999999999", currency: USD}
  window: {period: Day, timeZone: Europe/Berlin}
  alertThresholds: [50, 80]
"""


def with_connection(dsn: str, work: Callable[[Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with connected(dsn) as connection:
            await work(connection)

    asyncio.run(main())


def test_what_was_applied_is_read_back_and_unchanged_when_applied_again(database: str) -> None:
    async def work(connection: Any) -> None:
        before = await configuration_version(connection)
        dry = await apply_text(connection, EXAMPLES, dry_run=True)
        assert dry.lines()[0] == "project/shop created (dry run)"
        assert await read_state(connection, None) == ConfigurationState()

        report = await apply_text(connection, EXAMPLES)
        assert report.lines() == [
            "project/shop created",
            "upstream/openai created",
            "tier/free created",
            "budget/sessions created",
        ]
        assert report.warnings == ()
        version = await configuration_version(connection)
        assert version > before

        again = await apply_text(connection, EXAMPLES)
        assert {outcome.action for outcome in again.outcomes} == {"unchanged"}
        assert await configuration_version(connection) == version

        state = await read_state(connection, "acme")
        assert state.budgets["demo/sessions"].record.limit_amount == 10**24 - 1
        assert state.budgets["demo/sessions"].record.workload_labels == {"app": "web"}
        assert len(state.budgets) == 4
        assert await read_state(connection, "other") == ConfigurationState()

    with_connection(database, work)


def test_a_wrong_manifest_applies_nothing(database: str) -> None:
    async def work(connection: Any) -> None:
        await apply_text(connection, EXAMPLES)
        version = await configuration_version(connection)
        changed = EXAMPLES.replace("period: Day", "period: Week").replace("gpt-4o-mini,", "o3,")
        with pytest.raises(InvalidManifestsError, match=r"spec\.window\.period: is immutable"):
            await apply_text(connection, changed)
        assert await configuration_version(connection) == version
        assert (await read_state(connection, None)).projects["demo/shop"].spec["defaultModel"] == "gpt-4o-mini"

    with_connection(database, work)


def test_concurrent_applies_do_not_meet(database: str) -> None:
    async def main() -> None:
        reports = await asyncio.gather(*(apply_text(database, EXAMPLES) for _ in range(4)))
        actions = sorted(report.outcomes[0].action for report in reports)
        assert actions == ["created", "unchanged", "unchanged", "unchanged"]

    asyncio.run(main())


def test_a_time_zone_must_be_one_of_postgresqls(database: str) -> None:
    async def work(connection: Any) -> None:
        planned = plan(ConfigurationState(), parse(EXAMPLES), tenant_of_namespace=lambda _: "acme")
        changes = tuple(
            PutBudget(action="created", record=_in_zone(change)) for change in planned.changes if _is_session(change)
        )
        with pytest.raises(InvalidManifestsError, match='PostgreSQL does not know the time zone "Mars/Olympus"'):
            await apply_plan(connection, Plan(changes=changes, outcomes=(), warnings=()))
        assert await read_state(connection, None) == ConfigurationState()

    with_connection(database, work)


def _is_session(change: object) -> bool:
    return isinstance(change, PutBudget) and change.tier is None


def _in_zone(change: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(change.record, time_zone="Mars/Olympus")


def test_a_changed_limit_reaches_open_windows_and_a_rate_that_is_gone_ends(database: str) -> None:
    async def work(connection: Any) -> None:
        await apply_text(connection, EXAMPLES)
        await _open(connection, "demo/sessions", '["s1"]', spent=10**11)
        changed = EXAMPLES.replace('"999999999999.999999999999"', '"0.20"').replace("requestsPerDay: 100, ", "")
        report = await apply_text(connection, changed)
        assert report.lines()[2:] == ["tier/free configured", "budget/sessions configured"]
        by_name = {status.record.name: status for status in await read_budgets(connection, "acme", "demo")}
        assert by_name["sessions"].remaining == 10**11
        assert "tier:free:requests-per-day" not in by_name
        deleted = (await read_state(connection, None)).budgets["demo/tier:free:requests-per-day"]
        assert deleted.deleted

    with_connection(database, work)


async def _open(connection: Any, budget_id: str, subject: str, *, spent: int, held: int = 0) -> None:
    window = await connection.fetchval("SELECT ledger.open_window_v1('acme', $1, $2::text::jsonb)", budget_id, subject)
    await connection.execute(
        "UPDATE ledger.budget_window SET spent = $2::text::numeric, held = $3::text::numeric WHERE window_id = $1",
        window,
        str(spent),
        str(held),
    )


def test_budgets_are_read_with_their_current_windows(database: str) -> None:
    async def work(connection: Any) -> None:
        await apply_text(connection, EXAMPLES.replace('"999999999999.999999999999"', '"0.50"'))
        for number in range(7):
            await _open(connection, "demo/sessions", f'["s{number}"]', spent=number * 5 * 10**10, held=7)
        await _open(connection, "demo/sessions", '["spent"]', spent=5 * 10**11)
        await _open(connection, "demo/sessions", '["over"]', spent=4 * 10**11)
        await connection.execute(
            "UPDATE ledger.budget_window SET starts_at = starts_at - interval '9 days',"
            " ends_at = ends_at - interval '9 days' WHERE subject = '[\"over\"]'"
        )
        status = next(each for each in await read_budgets(connection, None) if each.record.name == "sessions")
        assert (status.active, status.exhausted) == (8, 1)
        assert status.spent == 21 * 5 * 10**10 + 5 * 10**11
        assert status.held == 49
        assert status.remaining == 0
        assert status.phase == "Warning"
        assert status.window_ends_at is not None
        assert [entry.subject for entry in status.biggest] == [["spent"], ["s6"], ["s5"], ["s4"], ["s3"]]
        untouched = next(each for each in await read_budgets(connection, None) if each.record.unit == "tokens")
        assert (untouched.active, untouched.remaining, untouched.phase) == (0, 50_000, "Active")

    with_connection(database, work)


def test_a_proxy_loads_its_configuration_from_a_pool_at_one_version(database: str) -> None:
    async def main() -> None:
        await apply_text(database, EXAMPLES)
        pool = await open_pool(database)
        try:
            configuration = await load_configuration(pool, "acme")
            assert configuration.version == await configuration_version(pool)
            project = configuration.project("acme", "demo/shop")
            assert project is not None
            assert configuration.upstreams_of(project)[0].spec.base_url == "https://api.openai.com/v1"
            assert configuration.tier(project, None) is not None
            assert (await load_configuration(pool, "other")).projects == {}
        finally:
            await pool.close()

    asyncio.run(main())


def test_the_ledger_itself_refuses_what_windows_depend_on(database: str) -> None:
    """A second guard: even a plan that was made from old knowledge cannot change a budget's unit."""

    async def work(connection: Any) -> None:
        await apply_text(connection, EXAMPLES)
        other = EXAMPLES.replace('{amount: "999999999999.999999999999", currency: USD}', "{requests: 5}")
        manifests = [manifest for manifest in parse(other) if isinstance(manifest, Budget)]
        blind = plan(ConfigurationState(), manifests, tenant_of_namespace=lambda _: "acme")
        with pytest.raises(LedgerRefusedError, match="immutable"):
            await apply_plan(connection, blind)

    with_connection(database, work)


# Prices


def book(rate: int, version: str) -> PriceBook:
    sheet = PriceSheet(
        rates={"input": TieredRate(base=rate, tiers=[(200_000, 2 * rate)]), "output": TieredRate(base=1)}
    )
    timed = PriceSheet(
        rates={"input": TieredRate(base=3), "output": TieredRate(base=3)},
        condition=Condition(start_time=dt.time(0, 30), end_time=dt.time(16, 30), start_date=dt.date(2026, 1, 1)),
    )
    model = ModelPrices(id="m/é", match=AnyOf([Equals("m"), Regex("^x-\\d+$")]), sheets=[sheet, timed])
    document = BookDocument(source="test", providers=[ProviderPrices(id="p", url_pattern="https://p", models=[model])])
    return PriceBook(document, version=version)


def test_a_book_comes_back_as_it_was_stored_and_the_one_in_force_is_current(database: str) -> None:
    async def work(connection: Any) -> None:
        first, second = book(10, "one"), book(20, "two")
        new_year = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
        summer = dt.datetime(2026, 7, 1, tzinfo=dt.UTC)
        assert await load_current_book(connection, summer) is None
        version = await configuration_version(connection)
        assert await store_book(connection, second, effective_from=summer)
        assert await store_book(connection, first, effective_from=new_year)
        assert await configuration_version(connection) > version
        assert await load_current_book(connection, new_year - dt.timedelta(seconds=1)) is None
        for at, wanted in ((new_year, first), (summer - dt.timedelta(seconds=1), first), (summer, second)):
            current = await load_current_book(connection, at)
            assert current is not None
            assert (current.version, current.document) == (wanted.version, wanted.document)
            assert current.resolve("p", "x-1", at=at) == wanted.resolve("p", "x-1", at=at)

    with_connection(database, work)


def test_a_version_is_never_rewritten(database: str) -> None:
    async def work(connection: Any) -> None:
        moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
        assert await store_book(connection, book(10, "one"), effective_from=moment)
        assert not await store_book(connection, book(10, "one"), effective_from=moment + dt.timedelta(days=9))
        with pytest.raises(PriceVersionError, match="one is stored with other prices"):
            await store_book(connection, book(11, "one"), effective_from=moment)
        stored = await load_book(connection, "one")
        assert stored is not None
        assert stored.document == book(10, "one").document
        assert stored.effective_from == moment

    with_connection(database, work)
