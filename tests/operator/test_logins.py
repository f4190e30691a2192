"""The gateway's login, and what every login in a Secret does when it is old, lost, or the ledger has moved."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest

from behest_ledger.store.pool import connect
from behest_ledger.store.roles import drop_role, list_roles, session_tenants
from behest_operator.gateway_login import PREFIX, GatewayLogin
from behest_operator.logins import ROTATION
from fake_kubernetes import FakeKubernetes, FaultyConnection, Killed, Steps

PATH = "/api/v1/namespaces/behest/secrets/gateway"
NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)


class World:
    """A Secret, a ledger, and the operator that looks after the gateway's login."""

    def __init__(self, dsn: str, connection: Any) -> None:
        self.connection = connection
        self.steps = Steps()
        self.kubernetes = FakeKubernetes(self.steps)
        self.login = GatewayLogin(namespace="behest", secret="gateway", dsn=dsn)

    async def look(self, now: datetime = NOW) -> str:
        """The DSN that the Secret says then."""
        await self.login.look(self.kubernetes, FaultyConnection(self.connection, self.steps), now=now)
        return base64.b64decode(self.kubernetes.objects[PATH]["data"]["database-url"]).decode()

    async def logins(self) -> list[str]:
        return sorted(role.name for role in await list_roles(self.connection) if role.name.startswith(PREFIX))


def play(dsn: str, work: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        connection = await connect(dsn)
        world = World(dsn, connection)
        try:
            await work(world)
            for name in await world.logins():
                await drop_role(connection, name)
        finally:
            await connection.close()

    asyncio.run(main())


def test_it_acts_for_every_tenant_and_stays_what_it_is(database: str) -> None:
    async def work(world: World) -> None:
        dsn = await world.look()
        connection = await connect(dsn)
        assert await session_tenants(connection) is None
        await connection.close()
        (role,) = await list_roles(world.connection)
        assert (role.tenants, role.too_mighty) == ((), None)
        assert await world.look(NOW + timedelta(days=29)) == dsn
        assert len(await world.logins()) == 1

    play(database, work)


def test_it_is_rotated_and_the_one_before_it_works_until_the_next_time(database: str) -> None:
    async def work(world: World) -> None:
        dsns = [await world.look(NOW + number * ROTATION) for number in range(3)]
        assert len(set(dsns)) == 3
        assert await world.logins() == sorted(str(urlsplit(dsn).username) for dsn in dsns[1:])

    play(database, work)


def test_when_the_ledger_moves_the_login_goes_with_it(database: str) -> None:
    async def work(world: World) -> None:
        before = urlsplit(await world.look())
        world.login.dsn = "postgresql://owner:secret@pooler.example.com:6432/behest?sslmode=require"
        after = urlsplit(await world.look())
        assert (after.username, after.password) == (before.username, before.password)
        assert (after.hostname, after.port, after.query) == ("pooler.example.com", 6432, "sslmode=require")

    play(database, work)


def test_a_secret_of_somebody_else_is_left_alone(database: str, caplog: pytest.LogCaptureFixture) -> None:
    async def work(world: World) -> None:
        theirs = {"metadata": {"name": "gateway", "resourceVersion": "1"}, "data": {"database-url": "eA=="}}
        world.kubernetes.objects[PATH] = theirs
        assert await world.look() == "x"
        assert await world.logins() == []
        assert "was not made by the operator" in caplog.text

    play(database, work)


def test_killed_at_any_step_it_leaves_one_login_that_works(database: str) -> None:
    async def work(world: World) -> None:
        for kill_at in range(1, 60):
            world.kubernetes.objects.clear()
            world.steps.begin(kill_at)
            try:
                await world.look()
                break
            except Killed:
                pass
            world.steps.begin(None)
            name = urlsplit(await world.look()).username
            assert await world.logins() == [name], f"killed at {kill_at}"
        else:
            raise AssertionError("it has no end")
        assert kill_at > 10

    play(database, work)
