"""Whose address it is, and that one address never spends another's requests."""

import asyncio
import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from behest_proxy.app.context import RequestContext
from behest_proxy.app.door import Door
from behest_proxy.errors import RateLimited
from behest_proxy.identity.addresses import AddressLimit, client_address, networks_in

PROXIES = networks_in("10.0.0.0/8, 2001:db8::/32, 192.0.2.1")


def told(peer: str, *values: str) -> str:
    return str(client_address(peer, [value.encode() for value in values], PROXIES))


def test_without_a_trusted_proxy_the_peer_is_the_client_whatever_it_says() -> None:
    assert told("203.0.113.7", "198.51.100.1") == "203.0.113.7"
    assert told("203.0.113.7", "for=198.51.100.1") == "203.0.113.7"
    assert told("203.0.113.7") == "203.0.113.7"


def test_the_address_nearest_to_our_proxies_counts_and_not_what_the_client_wrote_before() -> None:
    assert told("10.0.0.1", "198.51.100.1") == "198.51.100.1"
    assert told("10.0.0.1", "1.1.1.1, 198.51.100.1") == "198.51.100.1"
    assert told("10.0.0.1", "1.1.1.1, 198.51.100.1, 10.9.9.9") == "198.51.100.1"
    assert told("10.0.0.1", "1.1.1.1", "198.51.100.1, 192.0.2.1") == "198.51.100.1"
    assert told("10.0.0.1", "1.1.1.1, unknown") == "10.0.0.1"
    assert told("10.0.0.1", "10.0.0.2, 10.0.0.3") == "10.0.0.2"


@pytest.mark.parametrize(
    ("hop", "address"),
    [
        ("198.51.100.1:4711", "198.51.100.1"),
        ("[2001:db9::1]:4711", "2001:db9::1"),
        ("2001:db9::1", "2001:db9::1"),
        ("::ffff:198.51.100.1", "198.51.100.1"),
        ("for=198.51.100.1;proto=https", "198.51.100.1"),
        ('proto=https;For="[2001:db9::1]:4711";by=x', "2001:db9::1"),
        ("for=_hidden", "10.0.0.1"),
        ("for=unknown", "10.0.0.1"),
        ("", "10.0.0.1"),
        ("x" * 100_000, "10.0.0.1"),
    ],
)
def test_a_hop_may_be_written_in_many_ways(hop: str, address: str) -> None:
    assert told("10.0.0.1", hop) == address


@given(peer=st.text(), values=st.lists(st.binary(max_size=60), max_size=4))
def test_no_header_whatever_breaks_it(peer: str, values: list[bytes]) -> None:
    assert client_address(peer, values, PROXIES) is None or ipaddress.ip_address(peer)
    client_address("10.0.0.1", values, PROXIES)


@given(flood=st.integers(1, 400), others=st.lists(st.integers(0, 2**32 - 1), max_size=60), v6=st.booleans())
def test_a_flood_from_one_address_refuses_no_other_and_the_table_is_bounded(
    flood: int, others: list[int], v6: bool
) -> None:
    now_s = 0.0
    limit = AddressLimit(2.0, clock=lambda: now_s, table_max=16)
    base = ipaddress.ip_address("2001:db9::" if v6 else "203.0.113.7")
    answers = [limit.wait_s(base + (number if v6 else 0)) for number in range(flood)]
    assert answers.count(0) == min(flood, 10)
    for number in set(others):
        assert limit.wait_s(ipaddress.IPv4Address(number)) == 0 or number == int(base)
        assert len(limit) <= 16


def test_a_refused_address_may_come_back_when_it_was_told_to() -> None:
    now_s = 0.0
    limit = AddressLimit(0.5, clock=lambda: now_s)
    address = ipaddress.ip_address("203.0.113.7")
    assert [limit.wait_s(address) for _ in range(3)] == [0, 0, 1]
    now_s += 1.0
    assert limit.wait_s(address) == 0
    assert limit.wait_s(address) == 2


def test_the_door_refuses_before_a_token_is_looked_at() -> None:
    asked: list[str] = []

    async def prepare(bearer: str, _place: Any) -> None:
        asked.append(bearer)

    async def scenario() -> None:
        door = Door(prepare, address_rate=0.2, trusted_proxies=PROXIES)
        scope: dict[str, Any] = {"client": ("10.0.0.1", 1), "headers": []}
        for client, allowed in (("198.51.100.1", True), ("198.51.100.1", False), ("198.51.100.2", True)):
            scope["headers"] = [(b"x-forwarded-for", client.encode()), (b"authorization", b"Bearer " + client.encode())]
            if allowed:
                await door.enter(scope, RequestContext(scope["headers"]))
                continue
            with pytest.raises(RateLimited) as caught:
                await door.enter(scope, RequestContext(scope["headers"]))
            assert (caught.value.status, caught.value.retry_after_s) == (429, 5)
        assert asked == ["198.51.100.1", "198.51.100.2"]

    asyncio.run(scenario())
