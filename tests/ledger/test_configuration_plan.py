import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_ledger.configuration.globs import like_pattern, matches, pattern_of_like
from behest_ledger.configuration.kinds import KindName, Manifest
from behest_ledger.configuration.manifests import InvalidManifestsError, from_object
from behest_ledger.configuration.plan import (
    DeleteBudget,
    DeleteSpec,
    Plan,
    PutBudget,
    PutProject,
    PutTier,
    PutUpstream,
    plan,
    removal,
    tenants_of_namespaces,
)
from behest_ledger.configuration.records import BudgetRecord, is_tier_budget, wire_budget_spec
from behest_ledger.configuration.state import ConfigurationState, StoredBudget, StoredSpec
from behest_ledger.configuration.status import BudgetStatus


def resource(kind: str, name: str, spec: dict[str, Any], *, namespace: str = "demo") -> Manifest:
    return from_object(
        {
            "apiVersion": "behest.ai/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "namespace": namespace},
            "spec": spec,
        }
    )


def shop(**spec: Any) -> Manifest:
    return resource("Project", "shop", {"tenant": "acme", **spec})


def openai(**spec: Any) -> Manifest:
    return resource("Upstream", "openai", {"baseURL": "https://api.openai.com/v1", **spec})


def free(**spec: Any) -> Manifest:
    return resource("Tier", "free", {"number": 1, **spec})


def sessions(**changes: Any) -> Manifest:
    spec = {
        "scope": {"project": "shop"},
        "per": ["session"],
        "limit": {"amount": "0.50", "currency": "USD"},
        "window": {"period": "Day"},
    }
    return resource("Budget", "sessions", spec | changes)


ALL = [
    shop(defaultTier="free"),
    openai(),
    free(requestsPerMinute=10, requestsPerDay=100, tokensPerDay=50_000),
    sessions(),
]


def planned(manifests: Iterable[Manifest], current: ConfigurationState | None = None) -> Plan:
    return plan(current or ConfigurationState(), manifests, tenant_of_namespace=lambda _: "acme")


def after(result: Plan, before: ConfigurationState | None = None) -> ConfigurationState:
    """What is stored once a plan was applied."""
    before = before or ConfigurationState()
    specs: dict[type, dict[str, StoredSpec]] = {
        PutProject: dict(before.projects),
        PutUpstream: dict(before.upstreams),
        PutTier: dict(before.tiers),
    }
    budgets = dict(before.budgets)
    for change in result.changes:
        if isinstance(change, PutBudget):
            budgets[change.record.budget_id] = StoredBudget(record=change.record)
        elif isinstance(change, DeleteBudget):
            budgets[change.budget_id] = StoredBudget(record=budgets[change.budget_id].record, deleted=True)
        elif isinstance(change, DeleteSpec):
            put = {"Project": PutProject, "Upstream": PutUpstream, "Tier": PutTier}[change.kind]
            del specs[put][f"{change.namespace}/{change.name}"]
        else:
            stored = StoredSpec(
                tenant_id=change.tenant_id, namespace=change.namespace, name=change.name, spec=change.spec
            )
            specs[type(change)][stored.qualified_name] = stored
    return ConfigurationState(
        projects=specs[PutProject], upstreams=specs[PutUpstream], tiers=specs[PutTier], budgets=budgets
    )


def record_of(manifest: Manifest) -> BudgetRecord:
    (change,) = planned([manifest]).changes
    assert isinstance(change, PutBudget)
    return change.record


def outcomes(result: Plan) -> list[str]:
    return [str(outcome) for outcome in result.outcomes]


def refusals(manifests: Sequence[Manifest], current: ConfigurationState) -> list[str]:
    with pytest.raises(InvalidManifestsError) as caught:
        planned(manifests, current)
    return [str(error) for error in caught.value.errors]


def test_the_first_plan_creates_everything() -> None:
    result = planned(ALL)
    assert outcomes(result) == [
        "project/shop created",
        "upstream/openai created",
        "tier/free created",
        "budget/sessions created",
    ]
    assert len(result.pending) == 4 + 3  # the tier's rates are budgets
    assert result.tenants == ("acme",)
    assert result.warnings == ()


def test_planning_twice_changes_nothing() -> None:
    result = planned(ALL, after(planned(ALL)))
    assert result.pending == ()
    assert result.tenants == ()
    assert {outcome.action for outcome in result.outcomes} == {"unchanged"}


def test_the_order_of_documents_does_not_matter() -> None:
    plans = [planned(order) for order in itertools.permutations(ALL)]
    assert all(result == plans[0] for result in plans)


SPECS = st.fixed_dictionaries(
    {
        "scope": st.sampled_from([{"project": "shop"}, {"user": "a*"}, {"model": "gpt-4o_mini?"}, {"session": "100%"}]),
        "per": st.lists(st.sampled_from(["session", "user", "model", "project"]), unique=True),
        "limit": st.sampled_from(
            [{"amount": "0.000000000001", "currency": "USD"}, {"tokens": 7, "tokenKind": "Output"}, {"requests": 3}]
        ),
        "window": st.sampled_from([{"period": "Lifetime"}, {"period": "Month", "timeZone": "Europe/Berlin"}]),
        "enforcement": st.sampled_from(["Hard", "Soft"]),
        "alertThresholds": st.lists(st.integers(1, 100), unique=True, max_size=4).map(sorted),
        "suspended": st.booleans(),
    }
)


@given(st.lists(SPECS, max_size=5), st.integers())
def test_any_budgets_are_unchanged_when_planned_again_in_any_order(specs: list[dict[str, Any]], seed: int) -> None:
    manifests = [resource("Budget", f"b{number}", spec) for number, spec in enumerate(specs)]
    state = after(planned(manifests))
    random.Random(seed).shuffle(manifests)
    assert planned(manifests, state).pending == ()


@given(SPECS)
def test_a_budget_that_is_shown_can_be_applied_again(spec: dict[str, Any]) -> None:
    record = record_of(resource("Budget", "b", spec))
    assert record_of(resource("Budget", "b", wire_budget_spec(record))) == record


def test_a_changed_limit_configures_only_its_budget() -> None:
    result = planned([*ALL[:3], sessions(limit={"amount": "0.75", "currency": "USD"})], after(planned(ALL)))
    (change,) = result.pending
    assert isinstance(change, PutBudget)
    assert change.action == "configured"
    assert change.record.limit_amount == 750_000_000_000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"limit": {"tokens": 5}}, "spec.limit: is immutable: it is in USD, got in tokens"),
        ({"window": {"period": "Week"}}, "spec.window.period: is immutable: it is Day, got Week"),
        (
            {"window": {"period": "Day", "alignment": "Rolling"}},
            "spec.window.alignment: is immutable: it is Calendar, got Rolling",
        ),
        (
            {"window": {"period": "Day", "timeZone": "Asia/Tokyo"}},
            "spec.window.timeZone: is immutable: it is UTC, got Asia/Tokyo",
        ),
    ],
)
@pytest.mark.parametrize("deleted", [False, True])
def test_what_windows_depend_on_is_immutable(changes: dict[str, Any], sentence: str, deleted: bool) -> None:
    record = record_of(sessions())
    current = ConfigurationState(budgets={record.budget_id: StoredBudget(record=record, deleted=deleted)})
    assert refusals([sessions(**changes)], current) == [
        f"Budget demo/sessions: {sentence}; make a new Budget of another name"
    ]


def test_one_wrong_manifest_applies_nothing() -> None:
    current = after(planned(ALL))
    assert len(refusals([shop(suspended=True), sessions(window={"period": "Week"})], current)) == 1


def test_a_project_stays_with_its_tenant() -> None:
    current = after(planned(ALL))
    with pytest.raises(InvalidManifestsError, match=r"spec\.tenant: is immutable: namespace demo belongs to acme"):
        plan(current, [resource("Project", "shop", {"tenant": "other"})], tenant_of_namespace={"demo": "other"})


def test_a_namespace_belongs_to_one_tenant() -> None:
    assert refusals([resource("Project", "web", {"tenant": "other"})], ConfigurationState()) == [
        'Project demo/web: spec.tenant: namespace demo belongs to acme, got "other"'
    ]
    assert refusals([sessions(scope={"tenant": "other"})], ConfigurationState()) == [
        'Budget demo/sessions: spec.scope.tenant: namespace demo belongs to acme, got "other"'
    ]
    with pytest.raises(
        InvalidManifestsError, match=r"metadata\.namespace: is immutable: namespace demo belongs to acme"
    ):
        plan(after(planned(ALL)), [openai()], tenant_of_namespace={"demo": "other"})


def test_outside_a_cluster_the_tenant_is_told_by_the_project_then_the_store_then_the_default() -> None:
    stored = after(planned(ALL))
    empty = ConfigurationState()
    assert tenants_of_namespaces(empty, [shop(), sessions()], default_tenant="d") == {"demo": "acme"}
    assert tenants_of_namespaces(stored, [sessions()], default_tenant="d") == {"demo": "acme"}
    assert tenants_of_namespaces(empty, [sessions()], default_tenant="d") == {"demo": "d"}
    assert tenants_of_namespaces(empty, [sessions()], default_tenant=None) == {"demo": "demo"}


def test_a_reference_to_what_does_not_exist_is_a_warning() -> None:
    manifests = [shop(defaultTier="gold"), sessions(scope={"project": "shp", "tier": "silver"})]
    assert planned(manifests).warnings == (
        "Project demo/shop: spec.defaultTier: there is no Tier demo/gold",
        "Budget demo/sessions: spec.scope.project: there is no Project demo/shp",
        "Budget demo/sessions: spec.scope.tier: there is no Tier demo/silver",
    )
    assert planned([sessions(scope={"project": "sh*"}), shop()]).warnings == ()
    assert planned([sessions()], after(planned([shop()]))).warnings == ()


@pytest.mark.parametrize(
    ("scope", "binds"),
    [
        ({"project": "s*"}, True),
        ({"project": "x*"}, False),
        ({"project": "demo/s*"}, True),
        ({"user": "ann"}, True),
        ({"tenant": "acme"}, True),
        ({"tenant": "acme", "namespace": "dem?"}, True),
        ({"tenant": "acme", "namespace": "web*"}, False),
        ({"tenant": "acme", "namespace": "web*", "project": "sh*"}, False),
        ({"tenant": "acme", "project": "*/sh*"}, True),
    ],
)
def test_a_budget_that_matches_no_project_is_accepted_with_a_hint(scope: dict[str, str], binds: bool) -> None:
    hint = ("Budget demo/sessions: spec.scope: matches no project",)
    assert planned([sessions(scope=scope), shop()]).warnings == (() if binds else hint)
    assert planned([sessions(scope=scope)], after(planned([shop()]))).warnings == (() if binds else hint)
    assert planned([sessions(scope=scope)]).warnings == hint


def test_a_tier_is_budgets() -> None:
    rates = {"requestsPerMinute": 10, "requestsPerDay": 100, "tokensPerDay": 50_000, "concurrency": 3}
    tier, *budgets = planned([free(**rates)]).changes
    assert isinstance(tier, PutTier)
    records = [change.record for change in budgets if isinstance(change, PutBudget)]
    assert [
        (record.budget_id, record.unit, record.limit_amount, record.period, record.refusal) for record in records
    ] == [
        ("demo/tier:free:requests-per-minute", "requests", 10, "minute", "rate"),
        ("demo/tier:free:requests-per-day", "requests", 100, "day", "rate"),
        ("demo/tier:free:tokens-per-day", "tokens", 50_000, "day", "quota"),
        ("demo/tier:free:concurrency", "concurrency", 3, "lifetime", "rate"),
    ]
    for record in records:
        assert is_tier_budget(record)
        assert record.per == ["project", "user"]
        assert record.scope == {"namespace": "demo", "tier": "free"}
        assert record.token_kind == "both"
    assert not is_tier_budget(record_of(sessions()))


def test_a_rate_that_a_tier_no_longer_has_ends() -> None:
    current = after(planned(ALL))
    result = planned([free(requestsPerMinute=10, tokensPerDay=50_000)], current)
    assert [change for change in result.pending if not isinstance(change, PutTier)] == [
        DeleteBudget(tenant_id="acme", budget_id="demo/tier:free:requests-per-day", tier="free")
    ]
    current = after(result, current)
    assert planned([free(requestsPerMinute=10, tokensPerDay=50_000)], current).pending == ()
    again = planned([ALL[2]], current)
    assert "tier/free configured" in outcomes(again)
    assert [change.action for change in again.pending] == ["configured", "created"]


def test_a_budget_binds_its_own_namespace_and_names_projects_by_id() -> None:
    assert record_of(sessions()).scope == {"namespace": "demo", "project": "demo/shop"}
    assert record_of(sessions(scope={"project": "demo/shop"})).scope == {"namespace": "demo", "project": "demo/shop"}
    assert record_of(sessions(scope={})).scope == {"namespace": "demo"}
    assert record_of(sessions(scope={"tenant": "acme"})).scope == {}
    assert record_of(sessions(scope={"tenant": "acme", "namespace": "web*", "project": "shop"})).scope == {
        "namespace": "web%",
        "project": "web%/shop",
    }


def test_patterns_become_like_patterns_with_likes_own_signs_escaped() -> None:
    record = record_of(sessions(scope={"model": "gpt_4%*", "user": "a?\\b"}))
    assert record.scope == {"namespace": "demo", "model": "gpt\\_4\\%%", "user": "a_\\\\b"}


def test_the_members_of_per_are_written_in_one_order() -> None:
    assert record_of(sessions(per=["session", "user", "project"])).per == ["project", "user", "session"]
    assert record_of(sessions(per=["none"])).per == []


def test_money_is_exact() -> None:
    assert record_of(sessions(limit={"amount": "0.000000000001", "currency": "USD"})).limit_amount == 1
    assert (
        record_of(sessions(limit={"amount": "999999999999.999999999999", "currency": "USD"})).limit_amount == 10**24 - 1
    )


@given(st.text(max_size=12))
def test_a_pattern_can_be_told_from_its_like_pattern(pattern: str) -> None:
    assert pattern_of_like(like_pattern(pattern)) == pattern


@given(st.text("ab*?", max_size=8), st.text("ab", max_size=8))
def test_globs_match_what_they_say(pattern: str, text: str) -> None:
    def slow(rest: str, remaining: str) -> bool:
        if not rest:
            return not remaining
        if rest[0] == "*":
            return any(slow(rest[1:], remaining[cut:]) for cut in range(len(remaining) + 1))
        return bool(remaining) and rest[0] in ("?", remaining[0]) and slow(rest[1:], remaining[1:])

    assert matches(pattern, text) == slow(pattern, text)


@pytest.mark.parametrize(
    ("changes", "phase"),
    [
        ({}, "Active"),
        # What is held only is not spent: a hold comes and goes.
        ({"remaining": 1, "held": 499_999_999_999, "active": 2}, "Active"),
        ({"most_used": 249_999_999_999}, "Active"),
        ({"most_used": 250_000_000_000}, "Warning"),
        ({"remaining": 1, "most_used": 499_999_999_999, "active": 2, "exhausted": 1}, "Warning"),
        ({"remaining": 1, "active": 1, "exhausted": 1}, "Exhausted"),
    ],
)
def test_a_budgets_phase_is_the_first_thing_to_know(changes: dict[str, Any], phase: str) -> None:
    record = record_of(sessions(alertThresholds=[50, 80]))
    members: dict[str, Any] = {"record": record, "remaining": record.limit_amount, **changes}
    status = BudgetStatus(**members)
    assert status.phase == phase
    soft = record_of(sessions(enforcement="Soft"))
    for used, told in ((soft.limit_amount - 1, "Active"), (soft.limit_amount, "Warning"), (10**20, "Warning")):
        left = soft.limit_amount - used
        assert BudgetStatus(record=soft, remaining=left, most_used=used, active=1).phase == told
    suspended = record_of(sessions(suspended=True))
    assert BudgetStatus(record=suspended, remaining=suspended.limit_amount).phase == "Suspended"


@pytest.mark.parametrize("kind", ["Project", "Upstream", "Tier", "Budget"])
def test_what_was_removed_can_be_applied_again_and_removing_it_twice_changes_nothing(kind: KindName) -> None:
    (manifest,) = (item for item in ALL if item.kind == kind)
    there = after(planned(ALL))
    gone = removal(there, kind, manifest.namespace, manifest.name)
    assert gone.pending
    assert str(gone.outcomes[0]) == f"{kind.lower()}/{manifest.name} deleted"
    without = after(gone, there)
    assert not removal(without, kind, manifest.namespace, manifest.name).pending
    again = after(planned(ALL, without), without)
    assert again == there
