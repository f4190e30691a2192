"""How budgets stand, from a real ledger into an API server in memory: written when it changed, told once."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from behest_ledger.configuration.records import BudgetRecord
from behest_ledger.configuration.status import BudgetStatus
from behest_operator.conditions import Finding, merged
from behest_operator.kubernetes import KubernetesError
from behest_operator.status import BudgetBoard, difference, exhausted_finding, scope_line, wanted_status
from behest_operator.tenancy import TenancyError, tenant_of
from fake_kubernetes import FakeKubernetes, Killed, Steps
from ledger.books import Books, keep_books, settlement

BUDGETS = "/apis/behest.ai/v1alpha1/namespaces/demo/budgets"
EVENTS = "/api/v1/namespaces/demo/events/"


def record(**changes: Any) -> BudgetRecord:
    values: dict[str, Any] = {
        "tenant_id": "acme", "budget_id": "demo/b", "namespace": "demo", "name": "b", "scope": {"project": "demo/shop"},
        "workload_labels": None, "per": [], "unit": "usd", "token_kind": "both", "limit_amount": 10**12,
        "period": "day", "refusal": "quota",
        "alignment": "calendar", "time_zone": "UTC", "enforcement": "hard", "suspended": False,
        "alert_thresholds": [50],
    }  # fmt: skip
    known = {name: value for name, value in (values | changes).items() if name in BudgetRecord.__struct_fields__}
    return BudgetRecord(**known)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "project=shop"),
        ({"per": ["session", "user"]}, "project=shop per session,user"),
        ({"scope": {"namespace": "demo"}}, "namespace"),
        ({"scope": {}}, "tenant"),
        ({"scope": {"project": "other/shop", "model": "gpt-%"}}, "project=other/shop,model=gpt-*"),
        ({"scope": {"namespace": "demo", "tier": "demo/free"}, "workload_labels": {"app": "web"}}, "tier=free,app=web"),
    ],
)
def test_a_scope_is_one_line(changes: dict[str, Any], line: str) -> None:
    assert scope_line(record(**changes)) == line


@pytest.mark.parametrize(
    ("unit", "kind", "shown"),
    [("usd", "both", "1.00 USD"), ("tokens", "both", "1000000000000 tokens"),
     ("tokens", "input", "1000000000000 input tokens"), ("requests", "both", "1000000000000 requests")],
)  # fmt: skip
def test_a_limit_is_shown_with_its_unit(unit: str, kind: str, shown: str) -> None:
    status = BudgetStatus(record=record(unit=unit, token_kind=kind), remaining=1)
    assert wanted_status(status)["limit"] in (shown, shown.replace("1.00", "1"))


def test_members_that_have_no_value_any_more_are_taken_away() -> None:
    wanted = wanted_status(BudgetStatus(record=record(), remaining=5))
    assert wanted["windowEndsAt"] is None
    assert wanted["biggest"] is None
    found = {"windowEndsAt": "2026-01-01T00:00:00Z", **{name: value for name, value in wanted.items() if value}}
    assert difference(wanted, {**found, "conditions": [], "observedGeneration": 1}) == {"windowEndsAt": None}
    assert difference(wanted, {name: value for name, value in wanted.items() if value is not None}) == {}


@pytest.mark.parametrize(
    ("active", "exhausted", "soft", "status", "reason"),
    [(0, 0, False, "False", "MoneyLeft"), (2, 1, False, "False", "SomeSubjects"), (2, 2, False, "True", "NothingLeft")],
)
def test_exhaustion_is_a_condition(active: int, exhausted: int, soft: bool, status: str, reason: str) -> None:
    ends_at = datetime(2026, 11, 23, tzinfo=UTC)
    stands = BudgetStatus(
        record=record(), remaining=0, active=active, exhausted=exhausted, most_used=1, window_ends_at=ends_at
    )
    finding = exhausted_finding(stands)
    assert (finding.status, finding.reason) == (status, reason)
    assert (status == "True") == finding.message.endswith("before 2026-11-23T00:00:00Z")


def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    first = merged([], [Finding(type="Accepted", status="True", reason="A")], generation=1, now="t1")
    second = merged(first, [Finding(type="Accepted", status="True", reason="B")], generation=2, now="t2")
    assert (second[0]["lastTransitionTime"], second[0]["reason"], second[0]["observedGeneration"]) == ("t1", "B", 2)
    third = merged(second, [Finding(type="Accepted", status="False", reason="C")], generation=2, now="t3")
    assert third[0]["lastTransitionTime"] == "t3"


def test_conditions_of_others_stay_and_are_ordered_by_type() -> None:
    others = [{"type": "Zebra", "status": "True"}, {"no": "type"}]
    found = merged(
        others, [Finding(type="Accepted", status="True", reason="A", message="x" * 9000)], generation=1, now="t"
    )
    assert [item["type"] for item in found] == ["Accepted", "Zebra"]
    assert len(found[0]["message"]) == 4096


def test_a_namespace_is_its_own_tenant_unless_its_label_says_otherwise() -> None:
    assert tenant_of("demo", {"app": "x"}) == "demo"
    assert tenant_of("demo", {"behest.ai/tenant": "acme"}) == "acme"
    for label in ("", "UPPER", "a b", "a" * 254, "-a"):
        with pytest.raises(TenancyError, match="is no tenant's name"):
            tenant_of("demo", {"behest.ai/tenant": label})


class Wall:
    """A board, the API server that it writes to, and the books that it reads."""

    def __init__(self, books: Books) -> None:
        self.books = books
        self.steps = Steps()
        self.kubernetes = FakeKubernetes(self.steps)
        self.board = self.new_board()

    def new_board(self) -> BudgetBoard:
        """As after a restart: it knows what the API server shows."""
        self.board = BudgetBoard(self.books.connection, self.kubernetes, settle=timedelta(0))
        for path, found in self.kubernetes.objects.items():
            if path.startswith(BUDGETS):
                self.board.see(found)
        return self.board

    def show(self, name: str, created: datetime | None = None) -> None:
        metadata = {
            "name": name, "namespace": "demo", "uid": f"uid of {name}", "generation": 3, "resourceVersion": "0",
            "creationTimestamp": (created or datetime.now(UTC) - timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }  # fmt: skip
        self.kubernetes.objects[f"{BUDGETS}/{name}"] = {"metadata": metadata, "status": {}}
        self.board.see(self.kubernetes.objects[f"{BUDGETS}/{name}"])

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.kubernetes.objects[f"{BUDGETS}/{name}"]["status"]
        return found

    def told(self) -> list[str]:
        events = [found for path, found in self.kubernetes.objects.items() if path.startswith(EVENTS)]
        return sorted(f"{event['reason']} {event['message'].split(' ')[0]}" for event in events)

    async def spend(self, output: int) -> None:
        one, _ = await self.books.admit(need=0)
        await self.books.settle(settlement(one, output=output))
        await self.books.connection.fetchrow("SELECT * FROM ledger.tell_alerts_v1(100)")


def test_a_status_is_written_when_it_changed_and_only_then(database: str) -> None:
    async def work(books: Books) -> None:
        wall = Wall(books)
        await books.budget("money", 1000, thresholds=[50])
        wall.show("money")
        await wall.board.round()
        assert wall.status("money")["phase"] == "Active"
        assert wall.status("money")["conditions"][0]["type"] == "Exhausted"
        wall.kubernetes.calls.clear()
        await wall.board.round()
        await wall.new_board().round()
        assert wall.kubernetes.calls == []
        await books.admit(need=10)
        await wall.board.round()
        assert wall.kubernetes.calls == [("PATCH", f"{BUDGETS}/money/status")]
        assert wall.status("money")["held"] != wall.status("money")["spent"]

    keep_books(database, work)


def test_conditions_that_others_wrote_since_it_was_seen_are_not_lost(database: str) -> None:
    async def work(books: Books) -> None:
        wall = Wall(books)
        await books.budget("money", 1000, thresholds=[50])
        wall.show("money")
        programmed = merged([], [Finding(type="Programmed", status="True", reason="Programmed")], generation=3, now="t")
        path = f"{BUDGETS}/money/status"
        await wall.kubernetes.merge(path, {"status": {"conditions": programmed}})
        await wall.board.round()
        assert wall.status("money")["conditions"] == programmed
        wall.board.see(wall.kubernetes.objects[f"{BUDGETS}/money"])
        await wall.board.round()
        assert [item["type"] for item in wall.status("money")["conditions"]] == ["Exhausted", "Programmed"]

    keep_books(database, work)


def test_thresholds_and_exhaustion_are_told_once_whenever_the_operator_was_killed(database: str) -> None:
    async def work(books: Books) -> None:
        for number in range(1, 40):
            wall = Wall(books)
            name = f"money{number}"
            await books.budget(name, 1000, thresholds=[50, 80, 100])
            wall.show(name)
            await wall.spend(100)
            wall.steps.begin(number)
            try:
                await wall.board.round()
            except Killed:
                wall.steps.begin(None)
                await wall.new_board().round()
            else:
                assert number > 6
                return
            everything = ["BudgetExhausted nobody", "BudgetWarning 100", "BudgetWarning 50", "BudgetWarning 80"]
            assert wall.told() == everything, f"killed at step {number}"
            assert wall.status(name)["phase"] == "Exhausted"
            calls = len(wall.kubernetes.calls)
            await wall.board.round()
            assert len(wall.kubernetes.calls) == calls
            await books.connection.execute(
                "UPDATE ledger.budget SET deleted_at = now() WHERE budget_id = $1", f"demo/{name}"
            )

    keep_books(database, work)


def test_a_threshold_that_was_reached_while_the_operator_was_away_is_told(database: str) -> None:
    async def work(books: Books) -> None:
        wall = Wall(books)
        await books.budget("money", 1000, thresholds=[50, 80])
        wall.show("money")
        await wall.spend(50)
        await wall.board.round()
        assert wall.told() == ["BudgetWarning 50"]
        await wall.spend(30)
        await wall.new_board().round()
        assert wall.told() == ["BudgetWarning 50", "BudgetWarning 80"]

    keep_books(database, work)


def test_what_was_told_is_not_told_again_when_its_event_is_long_gone(database: str) -> None:
    async def work(books: Books) -> None:
        wall = Wall(books)
        await books.budget("money", 1000, thresholds=[50])
        wall.show("money")
        await wall.spend(50)
        await wall.board.round()
        for path in [path for path in wall.kubernetes.objects if path.startswith(EVENTS)]:
            del wall.kubernetes.objects[path]
        await wall.new_board().round()
        assert wall.told() == []

    keep_books(database, work)


def test_what_an_earlier_budget_of_the_name_reached_is_not_told_of_the_new_one(database: str) -> None:
    async def work(books: Books) -> None:
        wall = Wall(books)
        await books.budget("money", 1000, thresholds=[50])
        await wall.spend(50)
        wall.show("money", created=datetime.now(UTC) + timedelta(minutes=1))
        await wall.board.round()
        assert wall.told() == []

    keep_books(database, work)


def test_a_namespace_that_takes_no_events_does_not_keep_others_from_their_status(database: str) -> None:
    async def work(books: Books) -> None:
        wall = Wall(books)
        for name in ("a", "b"):
            await books.budget(name, 1000, thresholds=[50])
            wall.show(name)
        await wall.spend(100)
        wall.kubernetes.refuse[f"{BUDGETS}/a/status"] = KubernetesError(403, "being terminated")
        await wall.board.round()
        assert wall.status("a") == {}
        assert wall.status("b")["phase"] == "Exhausted"
        wall.kubernetes.refuse = {BUDGETS: KubernetesError(0, "no route to host")}
        await wall.spend(1)
        with pytest.raises(KubernetesError, match="no route"):
            await wall.new_board().round()

    keep_books(database, work)


def test_subjects_that_reach_a_threshold_together_are_one_event_whenever_the_operator_was_killed(database: str) -> None:
    async def work(books: Books) -> None:
        for number in range(1, 40):
            wall = Wall(books)
            name = f"each{number}"
            await books.budget(name, 1000, per=["session"], thresholds=[50])
            wall.show(name)
            await books.connection.execute(
                "INSERT INTO ledger.budget_alert SELECT 'acme', $2 * 1500 + i, 50, $1,"
                " jsonb_build_array(jsonb_build_array('demo/shop', 'ann', 's' || i)), 500, 1000,"
                " now() - interval '1 h' + i * interval '1 ms' FROM generate_series(1, 1500) AS i",
                f"demo/{name}",
                number,
            )
            wall.steps.begin(number)
            try:
                await wall.board.round()
            except Killed:
                wall.steps.begin(None)
                await wall.new_board().round()
            else:
                assert number > 4
                return
            (event,) = [found for path, found in wall.kubernetes.objects.items() if path.startswith(EVENTS)]
            message, _, since = event["message"].partition(" since ")
            assert message.startswith("50 % reached of demo/shop/ann/s1500: ")
            assert message.endswith(", and 1499 more")
            assert datetime.fromisoformat(since) < datetime.now(UTC)
            await books.connection.execute("UPDATE ledger.budget SET deleted_at = now()")

    keep_books(database, work)


@pytest.mark.parametrize(
    "written",
    ["2026-11-23T10:00:00z", "2026-11-23T23:59:60Z", "2026-11-23", "0001-01-01T00:00:00+01:00", "soon", ""],
)
def test_a_time_that_cannot_be_read_counts_as_none_and_is_written_anew(database: str, written: str) -> None:
    async def work(books: Books) -> None:
        wall = Wall(books)
        for name in ("a", "b"):
            await books.budget(name, 1000, thresholds=[50])
            wall.show(name)
        wall.status("a")["alertedAt"] = written
        wall.board.see(wall.kubernetes.objects[f"{BUDGETS}/a"])
        await wall.spend(50)
        await wall.board.round()
        assert wall.status("b")["phase"] == "Warning"
        assert wall.told() == ["BudgetWarning 50", "BudgetWarning 50"]
        assert wall.status("a")["alertedAt"][:10] == wall.status("b")["alertedAt"][:10]
        assert wall.status("a")["alertedAt"] != written

    keep_books(database, work)


def test_a_budget_that_is_gone_is_left_alone(database: str) -> None:
    async def work(books: Books) -> None:
        wall = Wall(books)
        await books.budget("money", 1000)
        wall.show("money")
        wall.board.forget("demo", "money")
        await wall.board.round()
        assert wall.kubernetes.calls == []
        wall.show("money")
        del wall.kubernetes.objects[f"{BUDGETS}/money"]
        await wall.board.round()

    keep_books(database, work)


def test_the_board_goes_on_while_the_ledger_is_away(caplog: pytest.LogCaptureFixture) -> None:
    class Away:
        def is_in_transaction(self) -> bool:
            raise OSError("no route to host")

    async def main() -> None:
        board = BudgetBoard(Away(), FakeKubernetes(), interval_s=0.01)
        running = asyncio.create_task(board.run())
        await asyncio.sleep(0.1)
        assert not running.done()
        running.cancel()

    asyncio.run(main())
    assert "trying again" in caplog.text
