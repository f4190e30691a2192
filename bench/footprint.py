"""How much memory a gateway takes at rest, and for each stream that is open and says nothing."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.answers import Answer, BrokenAnswer
from bench.h1_client import H1Client
from bench.h2_client import H2Client
from bench.load import Wave, Wire, body_of, pace_of, play
from bench.peers import Peer

Announce = Callable[[Mapping[str, int]], Awaitable[None]]
STALLED = Wave(wire="h1", streams=1, connections=1, responses=1, chunks=2, interval_ms=0)
"""What an open stream is asked for: it says one chunk and no more."""
_STREAMS_A_CONNECTION = 50
_OPENED_S = 60.0
_REST_S = 2.0


@dataclass(frozen=True)
class Footprint:
    """Resident memory of the serving process, its children included."""

    idle_mib: float
    """After the start, before the first request."""
    stream_kib: float
    streams: int


class _OpenAnswer(Answer):
    """One that tells when its first bytes came."""

    __slots__ = ("begun",)

    def __init__(self) -> None:
        super().__init__()
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def feed(self, data: bytes) -> None:
        super().feed(data)
        if not self.begun.done():
            self.begun.set_result(None)


async def measure(wire: Wire, streams: int, peer: Peer, announce: Announce) -> Footprint:
    """Open so many streams that stall after their first chunk. The gateway must be fresh: what it frees, it keeps.

    `announce` tells the simulator what to do where a gateway does not pass on what it is asked.
    """
    await asyncio.sleep(_REST_S)
    idle_mib = rss_kib(peer) / 1024
    load = Wave(wire=wire, streams=20, connections=2, responses=2, chunks=20, interval_ms=1)
    await announce(pace_of(load))
    await play(load, peer.base_url, peer.tokens)
    await announce({**pace_of(STALLED), "stall_after_chunks": 1})
    await asyncio.sleep(_REST_S)
    before_kib = rss_kib(peer)
    clients, answers = await _open(wire, streams, peer)
    async with asyncio.timeout(_OPENED_S):
        for answer in answers:
            await asyncio.wait([answer.begun, answer.ended], return_when=asyncio.FIRST_COMPLETED)
    await asyncio.sleep(_REST_S)
    if any(answer.ended.done() for answer in answers):
        raise BrokenAnswer(f"{peer.name} ended a stream that says nothing")
    after_kib = rss_kib(peer)
    for client in clients:
        client.close()
    await asyncio.gather(*(answer.ended for answer in answers), return_exceptions=True)
    return Footprint(idle_mib, (after_kib - before_kib) / streams, streams)


async def _open(wire: Wire, streams: int, peer: Peer) -> tuple[list[H1Client | H2Client], list[_OpenAnswer]]:
    address = urlsplit(peer.base_url)
    each = _STREAMS_A_CONNECTION if wire == "h2" else 1
    body = body_of(
        Wave(wire=wire, streams=1, connections=1, responses=1, chunks=2, interval_ms=0), stall_after_chunks=1
    )
    clients: list[H1Client | H2Client] = []
    answers: list[_OpenAnswer] = []
    for number in range(streams):
        if number % each == 0:
            clients.append(await _connected(wire, address.hostname or "", address.port or 80))
        headers = [("content-type", "application/json"), ("authorization", f"Bearer {peer.tokens[number]}")]
        answers.append(_OpenAnswer())
        clients[-1].request(address.netloc, "/v1/chat/completions", headers, body, answer=answers[-1])
        if number % each == each - 1:
            await asyncio.sleep(0.01)
    return clients, answers


async def _connected(wire: Wire, host: str, port: int) -> H1Client | H2Client:
    loop = asyncio.get_running_loop()
    if wire == "h2":
        return (await loop.create_connection(H2Client, host, port))[1]
    return (await loop.create_connection(H1Client, host, port))[1]


def rss_kib(peer: Peer) -> int:
    """Of the process and its children; of Behest only the sidecar, whose PostgreSQL is another machine's."""
    if peer.parent_pid:
        return _rss_kib(peer.pid)
    return sum(_rss_kib(pid) for pid in _family(peer.pid))


def _family(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text(encoding="ascii").split():
            found += _family(int(child))
    return found


def _rss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])
