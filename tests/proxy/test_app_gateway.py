"""The sidecar without its sockets: it opens everything or nothing, and what the books refuse holds up nobody."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from behest_ledger.journal import Journal
from behest_ledger.store import holders
from behest_ledger.store.errors import LedgerUnavailableError
from behest_ledger.store.pool import connect
from behest_proxy.app.gateway import Gateway
from behest_proxy.app.settings import Settings
from behest_proxy.identity.keys import SigningKey


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
            left = 1
            for _ in range(100):
                count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'half-started'"
                left = await connection.fetchval(count)
                if not left:
                    break
                await asyncio.sleep(0.05)
            assert left == 0
        finally:
            await connection.close()

    asyncio.run(main())
