"""What must be so after every step, and at the end."""

from typing import Any
from uuid import UUID

from ledger.books import TENANT
from ledger.memory_holders import MemoryLedger
from ledger.memory_ledger import Hold
from ledger.memory_windows import Key, Posting, Window
from simulation.request import Asked
from simulation.world import WrongError

ACCOUNTS = ("funding", "available", "leased", "held", "spent", "suspense", "overrun")
_OPEN = ("open", "suspense")
_NO_FIRST_BYTE_FREE = ("upstream_error", "upstream_timeout")


class Judge:
    """Looks at the books after every statement, and knows the truth about every request."""

    def __init__(self, ledger: MemoryLedger, asked: dict[UUID, Asked], *, overshoot_is_zero: bool) -> None:
        self._ledger = ledger
        self._asked = asked
        self._overshoot_is_zero = overshoot_is_zero
        self._postings_seen = 0
        self._ended_seen = 0
        self._posted: set[tuple[Any, ...]] = set()
        self._looked_at_all: tuple[int, ...] = ()
        self._lines_seen = 0
        self._lines: dict[UUID, list[tuple[str, int, int, int]]] = {}
        """Class, quantity, rate and amount of each request's settle."""

    # --- after every statement ---------------------------------------------------------------------------------

    def look(self) -> None:
        """What has changed since the last look. Raises `WrongError`."""
        ledger = self._ledger
        postings = ledger.postings
        for number in range(self._postings_seen, len(postings)):
            self._look_at_posting(postings[number])
        self._postings_seen = len(postings)
        for window_id in ledger.touched:
            self._look_at_window(ledger.windows[window_id])
        ledger.touched.clear()
        for request_id, entry, kind, quantity, rate, amount in ledger.usage_lines[self._lines_seen :]:
            if entry == 0:
                self._lines.setdefault(request_id, []).append((kind, quantity, rate, amount))
        self._lines_seen = len(ledger.usage_lines)
        for number in range(self._ended_seen, len(ledger.ended)):
            self._look_at_end(ledger.ended[number])
        self._ended_seen = len(ledger.ended)

    def _look_at_posting(self, posting: Posting) -> None:
        key = (posting.source_id, posting.window_id, posting.seq, posting.debit, posting.credit)
        if key in self._posted:
            raise WrongError(f"posted twice: {posting}")
        self._posted.add(key)
        if posting.credit in ("held", "leased"):
            holder_id: UUID | None = posting.source_id
            if posting.credit == "held":
                holder_id = self._ledger.holds[TENANT, posting.source_id].holder_id
            holder = self._ledger.holders.get(holder_id) if holder_id is not None else None
            if holder is None or holder.fenced_at is not None:
                raise WrongError(f"a holder that was fenced, or never was, took money: {posting}")

    def _look_at_window(self, window: Window) -> None:
        if min(window.spent, window.held, window.suspense, window.overrun) < 0:
            raise WrongError(f"a balance below zero in window {window.window_id}")
        if window.ceiling is not None and window.spent + window.held + window.suspense > window.ceiling:
            raise WrongError(f"the ceiling of window {window.window_id} is passed")
        account = self._ledger.accounts.get(window.window_id, {})
        leased = sum(lease.free for lease in self._ledger.leases.get(window.window_id, {}).values())
        if account.get("leased", 0) != leased:
            raise WrongError(f"{leased} is free in leases of window {window.window_id}, its postings say {account}")
        spent, held, suspense, overrun = (account.get(name, 0) for name in ("spent", "held", "suspense", "overrun"))
        if (window.spent, window.held, window.suspense, window.overrun) != (spent, held + leased, suspense, overrun):
            raise WrongError(f"window {window.window_id} is not what its postings come to: {account}")
        if window.overrun and self._overshoot_is_zero and not self._ledger.policy_charged:
            raise WrongError(f"overshoot in window {window.window_id}, and every provider kept its word")

    def _look_at_end(self, key: Key) -> None:
        asked = self._asked.get(key[1])
        if asked is not None:
            self._look_at_charge(asked, self._ledger.holds[key], self._ledger.requests[key])

    def _look_at_charge(self, asked: Asked, hold: Hold, row: dict[str, Any]) -> None:
        """The charge against the truth: the table of `charging`, told by what the provider and the client saw."""
        counts = _counts(row)
        name = f"request {asked.number} ({row['outcome']}, by {row['source']})"
        if hold.state == "charged_by_policy":
            return
        if hold.state == "void":
            if row["amount_pico"] or (asked.sent and not asked.killed):
                raise WrongError(f"{name}: void, but sent or charged {row['amount_pico']}")
            return
        self._look_at_lines(asked, name, row)
        match row["source"]:
            case "none":
                if row["amount_pico"] or asked.handed:
                    raise WrongError(f"{name}: {asked.handed} tokens for nothing")
            case "provider":
                self._look_at_provider_charge(asked, name, counts)
            case _:
                self._look_at_local_charge(asked, name, counts, row["outcome"])

    def _look_at_lines(self, asked: Asked, name: str, row: dict[str, Any]) -> None:
        lines = self._lines.get(asked.request_id, [])
        base = asked.rates.base
        expected = 0 if row["source"] == "none" else asked.rates.request_pico
        expected += sum(quantity * base.rate_pico(kind) for kind, quantity, _, _ in lines if kind != "request")
        tokens = sum(quantity for kind, quantity, _, _ in lines if kind != "request")
        if (row["amount_pico"], sum(_counts(row))) != (expected, tokens):
            raise WrongError(f"{name}: charged {row['amount_pico']}, its {tokens} tokens cost {expected}")

    def _look_at_provider_charge(self, asked: Asked, name: str, counts: tuple[int, int]) -> None:
        usage = asked.usage
        if usage is None:
            raise WrongError(f"{name}: the provider said nothing")
        if (
            asked.usage_is_final
            and asked.script.usage == "last"
            and counts != (usage.input_tokens, usage.output_tokens)
        ):
            raise WrongError(f"{name}: charged {counts}, the provider said {usage}")
        if counts[1] < asked.handed:
            raise WrongError(f"{name}: {asked.handed} tokens were passed on, {counts[1]} charged")

    def _look_at_local_charge(self, asked: Asked, name: str, counts: tuple[int, int], outcome: str) -> None:
        if counts[0] != asked.input.best_tokens:
            raise WrongError(f"{name}: charged {counts[0]} tokens of input, not {asked.input.best_tokens}")
        if not asked.sent and not asked.killed:
            raise WrongError(f"{name}: charged, but never sent")
        if not asked.first_byte and (outcome in _NO_FIRST_BYTE_FREE or counts[1]):
            raise WrongError(f"{name}: charged {counts}, and no byte had come")
        if counts[1] < asked.handed:
            raise WrongError(f"{name}: {asked.handed} tokens were passed on, {counts[1]} charged")
        if asked.script.usage != "growing" and counts[1] > asked.delivered:
            raise WrongError(f"{name}: {counts[1]} tokens charged, {asked.delivered} came")
        exact = asked.request.stream and asked.usage is None and outcome != "crashed"
        if exact and counts[1] != asked.handed:
            raise WrongError(f"{name}: {asked.handed} tokens were passed on, {counts[1]} charged")

    # --- everything, from the beginning ------------------------------------------------------------------------

    def look_at_all(self) -> None:
        """The balances anew from postings and holds; what each ended request paid, once. Raises `WrongError`."""
        ledger = self._ledger
        looked = (len(ledger.postings), len(ledger.holds), len(ledger.ended), ledger.last_window)
        if looked == self._looked_at_all:
            return  # nothing has moved since
        self._looked_at_all = looked
        accounts: dict[int, dict[str, int]] = {window_id: dict.fromkeys(ACCOUNTS, 0) for window_id in ledger.windows}
        for _, window_id, _, debit, credit, amount in ledger.postings:
            account = accounts[window_id]
            account[debit] -= amount
            account[credit] += amount
        held: dict[int, dict[str, int]] = {window_id: {} for window_id in ledger.windows}
        for window_id, leases in ledger.leases.items():
            of = held[window_id]
            of["open"] = of["leased"] = sum(lease.free for lease in leases.values())
            of["live"] = -sum(lease.new_live for lease in leases.values())
        for hold in ledger.holds.values():
            if hold.state in _OPEN:
                for window_id, amount in hold.lines.items():
                    of = held[window_id]
                    of[hold.state] = of.get(hold.state, 0) + amount
                    of["live"] = of.get("live", 0) + 1
        for window_id, window in ledger.windows.items():
            account, holds = accounts[window_id], held[window_id]
            found = (window.spent, window.held, window.suspense, window.overrun, window.live)
            wanted = (
                account["spent"], holds.get("open", 0), holds.get("suspense", 0), account["overrun"],
                holds.get("live", 0),
            )  # fmt: skip
            if found != wanted or account["held"] + holds.get("leased", 0) != window.held:
                raise WrongError(f"window {window_id} says {found}, its postings and holds {wanted}")
        self._look_at_sums(accounts)

    def _look_at_sums(self, accounts: dict[int, dict[str, int]]) -> None:
        """`spent + overrun` is the sum of the charges, each in the unit of its window."""
        ledger = self._ledger
        charges = dict.fromkeys(ledger.windows, 0)
        for key, row in ledger.requests.items():
            paid = (row["amount_pico"], row["input_tokens"], row["output_tokens"], row["facts"]["requests"])
            for window_id in ledger.holds[key].lines:
                charges[window_id] += ledger.windows[window_id].charge(*paid)
        for window_id, charged in charges.items():
            account = accounts[window_id]
            if account["spent"] + account["overrun"] != charged:
                raise WrongError(f"window {window_id}: {account}, but the charges come to {charged}")

    # --- at the end --------------------------------------------------------------------------------------------

    def look_at_the_end(self) -> None:
        """Nothing is held any more, and every request came to one end. Raises `WrongError`."""
        self.look()
        self.look_at_all()
        for window in self._ledger.windows.values():
            if window.held or window.suspense:
                raise WrongError(f"window {window.window_id} still holds {window.held} and {window.suspense}")
        for key, hold in self._ledger.holds.items():
            asked = self._asked[key[1]]
            if hold.state in _OPEN:
                raise WrongError(f"request {asked.number} is {hold.state} at the end")
            if hold.answer is not None and key not in self._ledger.requests:
                raise WrongError(f"request {asked.number} was admitted and has no outcome")
        for asked in self._asked.values():
            self._look_at_asked(asked)

    def _look_at_asked(self, asked: Asked) -> None:
        if asked.begun and not asked.ended and not asked.killed:
            raise WrongError(f"request {asked.number} never ended")
        key = next((key for key in self._ledger.requests if key[1] == asked.request_id), None)
        row = self._ledger.requests.get(key) if key is not None else None
        if row is None:
            if asked.handed:
                raise WrongError(f"request {asked.number} got {asked.handed} tokens, and the books do not know it")
            return
        if not asked.forgotten and row["output_tokens"] < asked.handed:
            raise WrongError(f"request {asked.number} got {asked.handed} tokens and paid {row['output_tokens']}")
        hold = self._ledger.holds[key] if key is not None else None
        if asked.killed and not asked.forgotten and hold is not None and hold.state == "charged_by_policy":
            raise WrongError(f"request {asked.number} was charged by policy, though its journal was there")


def _counts(row: dict[str, Any]) -> tuple[int, int]:
    return row["input_tokens"], row["output_tokens"]
