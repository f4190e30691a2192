"""The sidecar without its sockets: it opens everything or nothing, and what the books refuse holds up nobody."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from behest_ledger.journal import Journal
from behest_ledger.prices.rates import ClassRates, Rates
from behest_ledger.store import holders
from behest_ledger.store.errors import LedgerRefusedError, LedgerUnavailableError
from behest_ledger.store.pool import connect
from behest_ledger.store.writer import SettlementWriter
from behest_ledger.token_counts import TokenCounts
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.settings import Settings
from behest_proxy.identity.keys import SigningKey
from ledger.books import admission, settlement


def settings_of(database: str, folder: Path) -> Settings:
    key_file = folder / "key.pem"
    key_file.write_bytes(SigningKey.generate().private_pem())
    return Settings(
        database_url=database, signing_key_file=key_file, journal_dir=folder / "journal", name="half-started"
    )


@pytest.mark.parametrize("broken", ["register", "left"])
def test_a_start_that_fails_leaves_nothing_open(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise LedgerUnavailableError("gone in the middle of the start")

    async def main() -> None:
        gateway = Gateway(settings_of(database, tmp_path))
        if broken == "register":
            monkeypatch.setattr(holders, "register", fail)
        else:
            monkeypatch.setattr(gateway.memory, "left", lambda: 1 / 0)
        with pytest.raises((LedgerUnavailableError, ZeroDivisionError)):
            await gateway.start()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        Journal.open(tmp_path / "journal").close()  # it is not locked any more
        connection = await connect(database)
        try:
            count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'half-started'"
            async with asyncio.timeout(30):
                while await connection.fetchval(count):
                    await asyncio.sleep(0.05)
        finally:
            await connection.close()

    asyncio.run(main())


def test_a_settlement_that_the_books_refuse_holds_up_nobody_and_is_sent_again_by_the_next_life(
    database: str, tmp_path: Path
) -> None:
    asked = admission()
    refused = settlement(asked.request_id, output=3)

    async def refuse(_: Any) -> None:
        raise LedgerRefusedError("numeric field overflow")

    async def main() -> None:
        gateway = Gateway(settings_of(database, tmp_path))
        gateway.writer = SettlementWriter(
            refuse,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            on_settled=gateway._on_settled,  # pyright: ignore[reportPrivateUsage]
            on_put_aside=gateway._on_put_aside,  # pyright: ignore[reportPrivateUsage]
        )
        await gateway.start()
        rates = Rates(price_key="k", base=ClassRates.of({"input": 1, "output": 1}))
        trace = gateway.memory.begin(asked, input_counts=TokenCounts(), rates=rates)
        account = gateway.desk.open(asked.tenant_id, asked.request_id, (1,))
        trace.ended(refused)
        gateway.desk.ended(account)
        gateway.writer.submit(refused)
        assert await gateway.writer.flush(30)
        assert not gateway.desk._releasing  # pyright: ignore[reportPrivateUsage]
        # Its slot is free: the same id could not get one otherwise.
        gateway.memory.begin(asked, input_counts=TokenCounts(), rates=rates).ended(refused)
        await gateway.aclose()

        again = Gateway(settings_of(database, tmp_path))
        assert again.memory.left() == [refused]
        await again.aclose()

    asyncio.run(main())
