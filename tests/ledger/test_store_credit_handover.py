"""The last of a window: a hundred streams share it, and none leaves its reserve unspent."""

import asyncio
from collections.abc import Sequence
from uuid import UUID

from behest_ledger.holds import Answer, Extension, Granted, Refused, Settlement
from behest_ledger.store import holds
from behest_ledger.store.credit import CreditDesk
from behest_ledger.store.errors import LedgerError
from behest_ledger.store.holds import Settled
from behest_ledger.store.writer import SettlementWriter
from ledger.books import TENANT, Books, admission, granted, keep_books, settlement

STREAMS = 100
LIMIT_TOKENS = 12_000
RESERVE_TOKENS = 8
TRANCHE_TOKENS = 64
SHARES = 4


class Sidecar:
    """One process with its desk and its writer, on two connections."""

    def __init__(self, books: Books) -> None:
        self.books = books
        self.desk = CreditDesk(self._extend)
        self.writer = SettlementWriter(self._settle, on_settled=self._on_settled)
        self.extensions = self.settlements = self.asks = 0
        self.left = STREAMS
        self.over = asyncio.Event()

    async def _extend(self, extensions: Sequence[Extension]) -> dict[UUID, Answer]:
        self.extensions += 1
        self.asks += len(extensions)
        return await holds.extend(self.books.connection, extensions, shares=SHARES)

    async def _settle(self, settlements: Sequence[Settlement]) -> list[Settled]:
        self.settlements += 1
        return await holds.settle(self.books.connection, settlements)

    def _on_settled(self, settled: Settled) -> None:
        assert settled.result == "settled"
        assert not settled.overrun
        self.desk.settled(settled.request_id)
        self.left -= 1
        if not self.left:
            self.over.set()


class Stream:
    """Wants a token at a time for ever, and keeps a reserve on top of what it has forwarded."""

    def __init__(self, sidecar: Sidecar, request_id: UUID, grant: Granted) -> None:
        self.sidecar = sidecar
        self.request_id = request_id
        self.account = sidecar.desk.open(TENANT, request_id, grant.windows)
        self.credit = grant.output_tokens
        self.forwarded = 0

    def go_on(self) -> None:
        self.forwarded = max(self.forwarded, self.credit - RESERVE_TOKENS)
        self.sidecar.desk.ask(
            self.account, need_tokens=1, want_tokens=TRANCHE_TOKENS, may_wait=True, answer=self.on_answer
        )

    def on_answer(self, answer: Answer | LedgerError) -> None:
        if isinstance(answer, Granted):
            self.credit += answer.output_tokens
            self.go_on()
            return
        assert isinstance(answer, Refused), answer
        self.sidecar.desk.ended(self.account)
        self.sidecar.writer.submit(settlement(self.request_id, output=self.forwarded))


def test_when_all_have_ended_a_window_is_all_but_spent_and_the_database_was_asked_little(dsn: str) -> None:
    async def work(books: Books) -> None:
        await books.budget("shared", LIMIT_TOKENS, unit="tokens")
        await books.budget("wide", 10**9)
        sidecar = Sidecar(books)
        sidecar.writer.start()
        streams = list[Stream]()
        for _ in range(STREAMS):
            asked = admission(need=RESERVE_TOKENS + 1, want=TRANCHE_TOKENS, shares=SHARES)
            answer = granted(await holds.admit(books.connection, asked))
            streams.append(Stream(sidecar, asked.request_id, answer))
        for stream in streams:
            stream.go_on()
        async with asyncio.timeout(60):
            await sidecar.over.wait()
        await sidecar.writer.aclose()
        await sidecar.desk.aclose()

        window = await books.window("shared")
        assert (window.held, window.live, window.overrun) == (0, 0, 0)
        assert window.spent == sum(stream.forwarded for stream in streams)
        assert LIMIT_TOKENS * 0.97 <= window.spent <= LIMIT_TOKENS
        # Each stream that ends hands its reserve on: a few calls for each, whatever the number of tokens.
        assert sidecar.settlements <= STREAMS
        assert sidecar.extensions <= STREAMS * 4

    keep_books(dsn, work, connections=2)
