"""Every check is proved: one row is changed behind the ledger's back, and that row is named."""

import json
from typing import Any
from uuid import UUID

import pytest

from behest_ledger.store.pool import connect
from behest_ledger.store.verify import CHECKS, SET_PLANNER, Finding, verify
from ledger.books import Books, granted, keep_books, settlement
from ledger.sidecars import Sidecar, charge, reap

BALANCES = "balances are the sums of their postings"
OPEN = "a window holds what its open requests and its leases hold"
FREE = "what is free in a lease is what was granted to it and is neither used nor returned"
LEASE = "a lease is of a holder that may have it and of a window, and counts its own postings"
ABOVE = "no hard window is above its ceiling"
CEILING = "a ceiling is the limit, or the balance found above a lowered one"
BUDGET = "a live window is as its budget says"
SUBJECT = "a subject's current window is its own and its last"
MOVEMENT = "every posting moves between accounts that belong together"
POSTED = "what was held for a request was posted for it"
CREDIT = "credit was granted as it was posted"
RELEASED = "an ended request holds nothing"
AMOUNT = "a request's charge is the sum of its lines"
TOKENS = "a request's tokens are the sum of its lines"
LINE = "a line's amount is its quantity at its rate"
ATTRIBUTION = "a request is attributed and priced as it was admitted"
UNSENT = "a request that was not sent was charged nothing"
CHARGED = "every window was charged what the request cost, once"
PAIRS = "every ended hold has its request, and every request its hold"
ORPHANS = "every line and posting belongs to something"
SUSPENSE = "what a holder left behind went to suspense, whole, and came out once"
CHECKPOINT = "a checkpoint is the sum of its lines"
POLICY = "a charge by policy says so and is within its hold"
CORRECTION = "a correction takes back what was charged before, and nothing else is corrected"

# Each row: the table, the change of one row of it, the checks that must notice. $1 is the window of the budget
# "money"; $2, $3 and $4 are an open, a settled and a voided request; $5, $6 and $7 one in suspense, one charged by
# policy, and one corrected.
CHANGES: list[tuple[str, str, set[str]]] = [
    ("budget_window", "SET spent = spent + 1 {window}", {BALANCES}),
    ("budget_window", "SET spent = spent + 1, held = held - 1 {window}", {BALANCES, OPEN}),
    ("budget_window", "SET held = held + 1 {window}", {BALANCES, OPEN}),
    ("budget_window", "SET suspense = suspense + 1 {window}", {BALANCES, OPEN}),
    ("budget_window", "SET overrun = overrun + 1 {window}", {BALANCES}),
    ("budget_window", "SET live = live + 1 {window}", {OPEN}),
    ("budget_window", "SET limit_amount = limit_amount + 1, ceiling = ceiling + 1 {window}", {BALANCES, BUDGET}),
    ("budget_window", "SET ceiling = ceiling + 1 {window}", {CEILING}),
    ("budget_window", "SET ceiling = spent + held - 1 {window}", {ABOVE, CEILING}),
    ("budget_window", "SET ceiling = NULL {window}", {BUDGET}),
    ("budget_window", "SET unit = 'tokens' {window}", {BUDGET, CHARGED, CREDIT}),
    ("budget_window", "SET token_kind = 'input' WHERE subject = '[\"ann\"]' AND $1 > 0", {CHARGED}),
    ("budget_window", "SET ends_at = now() + interval '1 day' {window}", {BUDGET}),
    ("budget_window", "SET subject = '[1]' {window}", {SUBJECT}),
    ("budget_window", "SET budget_id = 'demo/none' {window}", {SUBJECT}),
    ("budget_window", "DELETE {window}", {BALANCES, SUBJECT, ORPHANS}),
    ("budget_subject", "SET window_id = NULL {window}", {SUBJECT}),
    ("hold", "SET state = 'settled' {open}", {OPEN, RELEASED, PAIRS}),
    ("hold", "SET state = 'suspense' {settled}", {OPEN, PAIRS, SUSPENSE}),
    ("hold", "SET state = 'suspense' {open}", {OPEN, SUSPENSE}),
    ("hold", "SET state = 'open' {suspense}", {OPEN, SUSPENSE}),
    ("hold", "SET suspense_at = NULL {suspense}", {SUSPENSE}),
    ("hold", "SET suspense_at = now() {settled}", {SUSPENSE}),
    ("hold", "SET state = 'settled' {policy}", {POLICY}),
    ("hold", "SET state = 'charged_by_policy' {settled}", {POLICY, SUSPENSE}),
    ("hold", "SET state = 'charged_by_policy' {corrected}", {CORRECTION}),
    ("hold", "SET state = 'corrected' {policy}", {CORRECTION}),
    ("hold", "SET checkpoint_amount_pico = checkpoint_amount_pico + 1 {suspense}", {CHECKPOINT}),
    ("hold", "SET checkpoint_output_tokens = checkpoint_output_tokens + 1 {policy}", {CHECKPOINT}),
    ("hold", "SET checkpoint_lines = '[]' {policy}", {CHECKPOINT}),
    ("hold", "SET state = 'open' {settled}", {OPEN, PAIRS}),
    ("hold", "SET state = 'void' {settled}", {UNSENT}),
    ("hold", "SET state = 'settled' {void}", {UNSENT}),
    ("hold", "SET granted_output_tokens = granted_output_tokens + 1 {open}", {CREDIT}),
    ("hold", "SET output_rate_pico = output_rate_pico + 1 {open}", {CREDIT}),
    ("hold", "SET last_seq = 0 {open}", {CREDIT}),
    ("hold", "SET answer = jsonb_set(answer, '{{output_tokens}}', '1') {open}", {CREDIT}),
    ("hold", "SET price_key = 'cheaper' {settled}", {ATTRIBUTION}),
    ("hold", "SET attributes = attributes || '{{\"user\": \"eve\"}}' {settled}", {ATTRIBUTION}),
    ("hold", "DELETE {open}", {OPEN, ORPHANS}),
    ("hold", "DELETE {settled}", {PAIRS, ORPHANS}),
    ("hold_line", "SET held = held + 1 {open} AND window_id = $1", {OPEN, POSTED}),
    ("hold_line", "SET held = held + 1 {settled} AND window_id = $1", {POSTED, RELEASED}),
    ("hold_line", "SET window_id = 4711 {settled} AND window_id = $1", {ORPHANS}),
    ("hold_line", "SET held = held + 1 {suspense} AND window_id = $1", {OPEN, POSTED, SUSPENSE}),
    ("hold_line", "SET held = 1 {policy} AND window_id = $1", {POSTED, RELEASED, SUSPENSE, POLICY}),
    ("hold_line", "DELETE {open} AND window_id = $1", {OPEN, ORPHANS}),
    ("hold_line", "DELETE {settled} AND window_id = $1", {ORPHANS}),
    ("posting", "SET amount = amount + 1 WHERE source_id = $2 AND window_id = $1 AND seq = 0", {BALANCES, POSTED}),
    ("posting", "SET amount = amount + 1 WHERE source_id = $2 AND window_id = $1 AND seq = 1", {BALANCES, CREDIT}),
    ("posting", "SET amount = amount + 1 WHERE source_id = $3 AND window_id = $1 AND credit = 'spent'", {CHARGED}),
    ("posting", "SET amount = amount - 1 WHERE source_id = $3 AND window_id = $1 AND credit = 'available'", {RELEASED}),
    ("posting", "SET amount = amount + 1 WHERE window_id = $1 AND debit = 'funding' AND seq = 0", {BALANCES}),
    ("posting", "SET amount = amount + 1 WHERE $1 > 0 AND credit = 'overrun'", {BALANCES, CHARGED}),
    ("posting", "SET credit = 'suspense' WHERE source_id = $3 AND window_id = $1 AND credit = 'spent'", {MOVEMENT}),
    ("posting", "SET seq = 7 WHERE source_id = $3 AND window_id = $1 AND credit = 'spent'", {MOVEMENT}),
    ("posting", "SET seq = 7 WHERE source_id = $2 AND window_id = $1 AND seq = 1", {CREDIT}),
    ("posting", "SET window_id = 4711 WHERE source_id = $3 AND window_id = $1 AND seq = 0", {BALANCES, ORPHANS}),
    ("posting", "SET source_id = $3 WHERE source_id = $2 AND window_id = $1 AND seq = 1", {POSTED}),
    ("posting", "SET source_id = gen_random_uuid() WHERE source_id = $2 AND window_id = $1 AND seq = 0", {ORPHANS}),
    ("posting", "DELETE WHERE source_id = $3 AND window_id = $1 AND credit = 'spent'", {BALANCES, CHARGED}),
    ("posting", "DELETE WHERE source_id = $2 AND window_id = $1 AND seq = 1", {BALANCES, POSTED, CREDIT}),
    ("posting", "DELETE WHERE source_id = $5 AND window_id = $1 AND seq = 1000001", {BALANCES, SUSPENSE}),
    ("posting", "SET amount = amount - 1 WHERE source_id = $5 AND window_id = $1 AND seq = 1000001",
     {BALANCES, SUSPENSE}),
    ("posting", "SET seq = 9 WHERE source_id = $5 AND window_id = $1 AND seq = 1000001", {MOVEMENT}),
    ("posting", "SET debit = 'held' WHERE source_id = $6 AND window_id = $1 AND credit = 'spent'",
     {BALANCES, RELEASED, SUSPENSE}),
    ("posting", "DELETE WHERE source_id = $7 AND window_id = $1 AND seq = 1000002", {BALANCES, CHARGED}),
    ("posting", "SET seq = 1000003 WHERE source_id = $7 AND window_id = $1 AND seq = 1000002", {CORRECTION}),
    ("posting", "SET source_id = $6 WHERE source_id = $7 AND window_id = $1 AND seq = 1000002", {CHARGED, CORRECTION}),
    ("request", "SET outcome = 'completed' {policy}", {POLICY}),
    ("request", "SET facts = facts - 'policy' {policy}", {POLICY}),
    ("request", "SET facts = facts || '{{\"policy\": \"hold\"}}' {settled}", {POLICY}),
    ("request", "SET amount_pico = amount_pico + 1 {corrected}", {AMOUNT}),
    ("correction", "SET facts = facts || '{{\"requests\": 0}}' {corrected}", {CHARGED, UNSENT}),
    ("correction", "SET amount_pico = amount_pico + 1 {corrected}", {AMOUNT, CHARGED}),
    ("correction", "SET input_tokens = input_tokens + 1 {corrected}", {TOKENS, CHARGED}),
    ("correction", "SET number = 2 {corrected}", {AMOUNT, CORRECTION}),
    ("correction", "SET request_id = gen_random_uuid() {corrected}", {AMOUNT, CORRECTION, ORPHANS}),
    ("correction", "DELETE {corrected}", {AMOUNT, TOKENS, CHARGED, CORRECTION}),
    ("request", "DELETE {policy}", {PAIRS, ORPHANS}),
    ("request", "SET amount_pico = amount_pico + 1 {settled}", {AMOUNT, CHARGED}),
    ("request", "SET input_tokens = input_tokens + 1 {settled}", {TOKENS, CHARGED}),
    ("request", "SET input_tokens = output_tokens, output_tokens = input_tokens {settled}", {TOKENS}),
    ("request", "SET facts = facts || '{{\"requests\": 0}}' {settled}", {CHARGED, UNSENT}),
    ("request", "SET facts = facts || '{{\"requests\": 1}}' {void}", {CHARGED, UNSENT}),
    ("request", "SET amount_pico = 1 {void}", {AMOUNT, CHARGED, UNSENT}),
    ("request", "SET user_id = 'eve' {settled}", {ATTRIBUTION}),
    ("request", "SET project_id = 'demo/other' {settled}", {ATTRIBUTION}),
    ("request", "SET model = 'large' {settled}", {ATTRIBUTION}),
    ("request", "SET price_key = 'cheaper' {settled}", {ATTRIBUTION}),
    ("request", "DELETE {settled}", {PAIRS, ORPHANS}),
    ("request", "DELETE {void}", {PAIRS}),
    ("usage_line", "SET quantity = quantity + 1 {settled} AND class = 'output'", {TOKENS, LINE}),
    ("usage_line", "SET rate_pico = rate_pico + 1 {settled} AND class = 'output'", {LINE}),
    ("usage_line", "SET amount_pico = amount_pico + rate_pico, quantity = quantity + 1 {settled} AND class = 'output'",
     {AMOUNT, TOKENS}),
    ("usage_line", "SET class = 'cache' {settled} AND class = 'input'", {LINE, TOKENS}),
    ("usage_line", "SET class = 'reasoning' {settled} AND class = 'input'", {TOKENS}),
    ("usage_line", "DELETE {corrected} AND entry = 1 AND class = 'output'", {AMOUNT, TOKENS, CORRECTION}),
    ("usage_line", "SET entry = 1 {settled} AND class = 'output'", {CORRECTION}),
    ("usage_line", "SET request_id = gen_random_uuid() {settled} AND class = 'input'", {AMOUNT, ORPHANS}),
    ("usage_line", "DELETE {settled} AND class = 'input'", {AMOUNT, TOKENS}),
    ("lease", "SET free = free + 1 {lease}", {BALANCES, OPEN, FREE}),
    ("lease", "SET new_live = new_live + 1 {lease}", {OPEN}),
    ("lease", "SET seq = seq + 1 {lease}", {LEASE}),
    ("lease", "SET holder_id = gen_random_uuid() {lease}", {FREE, LEASE}),
    ("lease", "SET window_id = 4711 {lease}", {BALANCES, OPEN, FREE, LEASE}),
    ("lease", "DELETE {lease}", {BALANCES, OPEN, FREE}),
    ("posting", "SET amount = amount + 1 WHERE $1 > 0 AND credit = 'leased'", {BALANCES, FREE}),
    ("posting", "SET amount = amount + 1 WHERE $1 > 0 AND debit = 'leased'", {BALANCES, FREE, POSTED}),
    ("posting", "SET debit = 'available' WHERE $1 > 0 AND debit = 'leased'", {BALANCES, FREE}),
    ("posting", "SET seq = 0 WHERE $1 > 0 AND credit = 'leased'", {MOVEMENT, LEASE}),
]  # fmt: skip

CONSTRAINTS = [
    ("budget_window", "ceiling_holds"),
    ("usage_line", "usage_line_check"),
]


async def traffic(books: Books) -> tuple[int, UUID, UUID, UUID, UUID, UUID, UUID]:
    """An open, extended request, a settled, an overrun and a voided one, in windows of every unit; and what a sidecar
    left behind: one in suspense, one charged by policy, and one corrected after that."""
    await books.budget("calls", 100, unit="requests")
    await books.budget("money", 1000)
    await books.budget("narrow", 100, unit="tokens", scope={"user": "bob"})
    await books.budget("soft", 10, enforcement="soft")
    await books.budget("tokens", 1000, unit="tokens", per=["user"])
    live, answer = await books.admit(input=5, need=7)
    granted(answer)
    granted(await books.extend(live, 1, need=11))
    settled, _ = await books.admit(input=20, need=30)
    voided, _ = await books.admit(input=20, need=10)
    over, _ = await books.admit(need=95, rate=1, user="bob")
    suspense, policy, corrected = await left_behind(books)
    sidecar = await Sidecar.start(books)
    tokens = next(window for window in await books.windows("tokens") if window.subject == ["ann"])
    assert await sidecar.lease({tokens.window_id: 20}) == {tokens.window_id: 20}
    await sidecar.admitted(need=2, rate=0)
    results = await books.settle(
        settlement(settled, input=20, output=12), settlement(voided, sent=False), settlement(over, output=101)
    )
    assert results == ["settled", "settled", "settled!"]
    return (await books.window("money")).window_id, live, settled, voided, suspense, policy, corrected


async def left_behind(books: Books) -> tuple[UUID, UUID, UUID]:
    sidecar = await Sidecar.start(books)
    late = [await sidecar.admitted(input=2, need=3), await sidecar.admitted(input=2, need=4)]
    for one in late:
        await sidecar.checkpoint(one, input=2, output=1)
    await sidecar.die()
    assert await reap(books) == 2
    assert await charge(books, "checkpoint") == dict.fromkeys(late, 16)
    assert await books.settle(settlement(late[1], input=2, output=3)) == ["corrected"]
    sidecar = await Sidecar.start(books)
    one = await sidecar.admitted(input=1, need=2)
    await sidecar.checkpoint(one, input=1, output=1)
    await sidecar.die()
    assert await reap(books) == 1
    return one, late[0], late[1]


def test_books_that_nobody_touched_are_clean_and_say_what_they_hold(dsn: str) -> None:
    async def work(books: Books) -> None:
        await traffic(books)
        connection = await connect(dsn)
        verdict = await verify(connection)
        await connection.close()
        assert verdict.findings == []
        assert (verdict.windows, verdict.requests, verdict.overrun_windows) == (6, 5, 2)
        assert verdict.postings == await books.count("posting")

    keep_books(dsn, work)


def test_one_changed_row_is_named_by_the_check_that_is_meant_for_it(dsn: str) -> None:
    async def work(books: Books) -> None:
        keys = await traffic(books)
        window, live, settled, voided, suspense, policy, corrected = keys
        where = {
            "window": "WHERE window_id = $1",
            "open": "WHERE $1 > 0 AND request_id = $2",
            "settled": "WHERE $1 > 0 AND request_id = $3",
            "void": "WHERE $1 > 0 AND request_id = $4",
            "suspense": "WHERE $1 > 0 AND request_id = $5",
            "policy": "WHERE $1 > 0 AND request_id = $6",
            "corrected": "WHERE $1 > 0 AND request_id = $7",
            "lease": "WHERE $1 > 0 AND free = 18",
        }
        leased = await books.connection.fetchval("SELECT window_id FROM ledger.lease")
        noticed: set[str] = set()
        async with books.connection.acquire() as connection:
            for table, change, expected in CHANGES:
                undo = connection.transaction()
                await undo.start()
                await connection.execute("SET LOCAL session_replication_role = replica")
                for name, constraint in CONSTRAINTS:
                    await connection.execute(f"ALTER TABLE ledger.{name} DROP CONSTRAINT {constraint}")
                verb, rest = change.format(**where).split(" ", 1)
                statement = f"{'DELETE FROM' if verb == 'DELETE' else 'UPDATE'} ledger.{table} "
                statement += rest if verb == "DELETE" else f"SET {rest}"
                statement += " AND ($1::bigint, $2::uuid, $3::uuid, $4::uuid, $5::uuid, $6::uuid, $7::uuid) IS NOT NULL"
                done = await connection.execute(statement, *keys)
                assert done.split()[-1] in ("1", "2"), (statement, done)
                found = await findings(connection)
                await undo.rollback()
                checks = {finding.check for finding in found}
                assert checks >= expected, (table, change, found)
                named = "; ".join(finding.place for finding in found) + ";"
                places = [f"request {one}" for one in (live, settled, voided, suspense, policy, corrected)]
                places += [
                    f"window {window} ",
                    f"window {window};",
                    f"posting of {settled}",
                    f"posting of {suspense}",
                    f"posting of {corrected}",
                    "window 4711",
                    "lease of window",
                    f"window {leased} of acme",
                    "demo/money ",
                ]
                assert any(place in named for place in places), (table, change, named)
                noticed |= expected
        assert noticed == set(CHECKS)

    keep_books(dsn, work)


def test_a_finding_names_the_place_what_was_expected_and_what_was_found(dsn: str) -> None:
    async def work(books: Books) -> None:
        window, _, settled, *_ = await traffic(books)
        await books.connection.execute("UPDATE ledger.budget_window SET overrun = 470 WHERE window_id = $1", window)
        async with books.connection.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute("UPDATE ledger.request SET user_id = 'eve' WHERE request_id = $1", settled)
        found = await books.findings()
        assert Finding(BALANCES, f"window {window} of acme, account overrun", "460", "470") in found
        (other,) = [finding for finding in found if finding.check == ATTRIBUTION]
        assert other.place == f"request {settled}"
        assert " | ann | " in other.expected
        assert " | eve | " in other.found

    keep_books(dsn, work, clean=False)


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_is_a_sentence_about_what_should_be_so(check: str) -> None:
    assert check == check.strip(" .")
    assert len(check.split()) > 4


async def findings(connection: Any) -> list[Finding]:
    """What `verify` finds, inside a transaction that is undone."""
    return [
        Finding(check, place, str(expected), str(found))
        for check, query in CHECKS.items()
        for place, expected, found in await connection.fetch(query)
    ]


def test_no_check_reads_a_table_once_for_each_row_of_another_whatever_the_planner_believes(dsn: str) -> None:
    """Statistics of an empty ledger once made one check sum up all postings anew for each hold line: quadratic."""

    async def work(books: Books) -> None:
        await books.connection.execute("ANALYZE")
        await traffic(books)
        async with books.connection.acquire() as connection, connection.transaction():
            await connection.execute(SET_PLANNER)
            for check, query in CHECKS.items():
                plan = json.loads(await connection.fetchval(f"EXPLAIN (FORMAT JSON) {query}"))[0]["Plan"]
                assert not [found for found in repeated(plan) if reads_table(found)], check

    keep_books(dsn, work)


def repeated(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What is run for each row of something else: the inner side of nested loops, and correlated subplans."""
    below = plan.get("Plans", [])
    own = below[1:] if plan["Node Type"] == "Nested Loop" else []
    own += [each for each in below if each["Parent Relationship"] == "SubPlan"]
    return own + [found for each in below for found in repeated(each)]


def reads_table(plan: dict[str, Any]) -> bool:
    """Whether a plan reads rows without an index for them."""
    return plan["Node Type"] == "Seq Scan" or any(reads_table(each) for each in plan.get("Plans", []))
