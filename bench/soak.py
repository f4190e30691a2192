"""Mixed load for half an hour: memory, descriptors and live requests must come to rest. `make soak`.

The load comes in rounds. Behind each all clients have left, and what the sidecar still holds is read: what grows from
rest to rest is lost, whatever the load did in between.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import uvloop
from bench import cancel
from bench.answers import Answer, BrokenAnswer
from bench.h1_client import H1Client
from bench.h2_client import H2Client
from bench.peers import Peer, PeerError, behest, mint, simulator

ROUND_S = 60.0
ROUNDS_LEAST = 6
MINUTES_LEAST = 2.0
REST_S = 3.0
WARM_UP_SHARE = 1 / 4
DRIFT_MOST = 0.05
DESCRIPTORS_MORE = 0.05
STREAMS = 16
"""Of each wire, one answer after the other."""
ABORTING = 4
"""Of each wire, two a second."""
SLOW = 4
THREADS = 2
WHOLE = 2
CHUNKS = 100
INTERVAL_MS = 20
SPENT_TOKENS = 16_000
"""Of one answer that spends: at 10 USD a million, seven of them end a session's budget of one dollar."""
_LIVE = "behest_streams_active{"
_numbers = count(1)


@dataclass(frozen=True)
class Rest:
    """What the sidecar holds when nobody asks it for anything."""

    rss_kib: int
    descriptors: int
    threads: int
    live: int
    """Requests that it believes to be under way."""

    def __str__(self) -> str:
        return (
            f"RSS {self.rss_kib / 1024:.1f} MiB, {self.descriptors} descriptors, {self.threads} threads,"
            f" {self.live} live requests"
        )


class Load:
    """One round of everything at once."""

    def __init__(self, peer: Peer, until_s: float, done: Counter[str]) -> None:
        self._peer, self._until_s, self._done = peer, until_s, done
        self._address = urlsplit(peer.base_url)

    async def run(self) -> None:
        """Until the round's end. Raises `BrokenAnswer` for whatever was not as asked for."""
        work: list[Callable[[], Awaitable[None]]] = [self._streams_h2, self._spends, self._mints]
        work += [self._streams_h1] * STREAMS + [self._slow] * SLOW + [self._thread] * THREADS + [self._whole] * WHOLE
        for wire in cancel.WIRES:
            work += [partial(self._aborts, wire)] * ABORTING
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(_as_coroutine(one))

    @property
    def _goes_on(self) -> bool:
        return time.monotonic() < self._until_s

    async def _connect(self, made: Callable[[], H1Client | H2Client]) -> H1Client | H2Client:
        host, port = self._address.hostname or "", self._address.port or 80
        return (await asyncio.get_running_loop().create_connection(made, host, port))[1]

    async def _token(self) -> str:
        return await asyncio.to_thread(mint, self._peer.base_url, self._peer.api_key, next(_numbers))

    async def _ask(self, client: H1Client | H2Client, token: str, body: bytes, *more: tuple[str, str]) -> Answer:
        headers = [("content-type", "application/json"), ("authorization", f"Bearer {token}"), *more]
        answer = client.request(self._address.netloc, "/v1/chat/completions", headers, body)
        await answer.ended
        return answer

    async def _stream(self, client: H1Client | H2Client, kind: str, *more: tuple[str, str]) -> None:
        token = await self._token()
        while self._goes_on:
            (await self._ask(client, token, _body(CHUNKS), *more)).check(CHUNKS)
            self._done[kind] += 1

    async def _streams_h1(self) -> None:
        client = await self._connect(H1Client)
        await self._stream(client, "HTTP/1.1")
        client.close()

    async def _streams_h2(self) -> None:
        client = await self._connect(H2Client)
        await asyncio.gather(*(self._stream(client, "HTTP/2") for _ in range(STREAMS)))
        client.close()

    async def _thread(self) -> None:
        client = await self._connect(H2Client)
        await self._stream(client, "in threads", ("x-thread-id", f"soak-{next(_numbers)}"))
        client.close()

    async def _spends(self) -> None:
        """A session after the other to the end of its budget, in the middle of a stream and before one."""
        client = await self._connect(H2Client)
        while self._goes_on:
            token, status = await self._token(), 200
            while status == 200 and self._goes_on:
                answer = await self._ask(client, token, _body(40, model="gpt-4o", tokens=SPENT_TOKENS))
                status = answer.status
            if status not in (200, 402):
                raise BrokenAnswer(f"a spender got status {status}")
            self._done["budgets ended"] += status == 402
        client.close()

    async def _mints(self) -> None:
        while self._goes_on:
            await self._token()
            self._done["mints"] += 1
            await asyncio.sleep(0.2)

    async def _aborts(self, wire: cancel.Wire) -> None:
        token = await self._token()
        while self._goes_on:
            client = await cancel.leave(wire, self._peer.base_url, token)
            await asyncio.sleep(0.5)
            client.close()
            self._done["aborts"] += 1

    async def _slow(self) -> None:
        """A client that reads 2 KiB a second of what comes much faster, then leaves."""
        token = await self._token()
        while self._goes_on:
            reader, writer = await self._raw(token, _body(100_000, interval_ms=2), limit=1024)
            for _ in range(20):
                if not await reader.read(512):
                    raise BrokenAnswer("a slow client was left")
                await asyncio.sleep(0.25)
            writer.transport.abort()
            self._done["slow"] += 1

    async def _whole(self) -> None:
        token = await self._token()
        while self._goes_on:
            reader, writer = await self._raw(token, _body(CHUNKS, stream=False), limit=2**16)
            answer = await reader.read()
            if not answer.startswith(b"HTTP/1.1 200") or b'"finish_reason"' not in answer:
                raise BrokenAnswer(f"not a whole answer: {answer[:300]!r}")
            writer.close()
            self._done["whole"] += 1

    async def _raw(self, token: str, body: bytes, *, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port, limit=limit)
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._address.netloc}\r\nauthorization: Bearer {token}\r\n"
            f"connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        return reader, writer


async def _as_coroutine(work: Callable[[], Awaitable[None]]) -> None:
    await work()


def _body(
    chunks: int, *, model: str = "gpt-4o-mini", tokens: int = 0, interval_ms: int = INTERVAL_MS, stream: bool = True
) -> bytes:
    tokens = tokens or chunks
    asked = {"output_tokens": tokens, "tokens_per_chunk": tokens // chunks, "chunk_interval_ms": interval_ms}
    body = {"model": model, "messages": [{"role": "user", "content": "Go on."}], "stream": stream, "sim": asked}
    return json.dumps({**body, **({"stream_options": {"include_usage": True}} if stream else {})}).encode()


def _rest(pid: int, admin_url: str) -> Rest:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines())
    with urlopen(admin_url + "/metrics", timeout=10) as answer:
        page = answer.read().decode()
    live = sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(_LIVE))
    return Rest(
        rss_kib=int(status["VmRSS"].split()[0]),
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=int(status["Threads"]),
        live=int(live),
    )


def verdict(rests: Sequence[Rest]) -> tuple[list[str], bool]:
    """What became of memory and descriptors after the warm-up, in words; and whether all is well.

    The median of the last third is compared with that of the first: a single rest may come at a bad moment.
    """
    warm = rests[max(1, round(len(rests) * WARM_UP_SHARE)) :]
    third = max(1, len(warm) // 3)

    def median(found: Sequence[int]) -> tuple[float, float]:
        return statistics.median(found[:third]), statistics.median(found[-third:])

    first_kib, last_kib = median([rest.rss_kib for rest in warm])
    drift = last_kib / first_kib - 1
    first, last = median([rest.descriptors for rest in warm])
    is_flat = last <= first + max(3, first * DESCRIPTORS_MORE)
    live = max(rest.live for rest in warm)
    is_steady = drift <= DRIFT_MOST
    memory = (
        f"soak-rss: {drift:+.1%} from {first_kib / 1024:.1f} to {last_kib / 1024:.1f} MiB, {len(warm)} rests after"
        f" warming up (target: at most {DRIFT_MOST:.0%}: {'met' if is_steady else 'NOT met'})"
    )
    lines = [
        memory,
        f"soak-descriptors: {first:.0f} to {last:.0f} ({'flat' if is_flat else 'NOT flat'})",
        f"soak-requests: at most {live} live at rest ({'met' if not live else 'NOT met'})",
    ]
    return lines, is_steady and is_flat and not live


def main() -> int:
    """Run it. Exit status 0: all came to rest; 1: something grows, or an answer broke."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: %(default)s)")
    minutes: float = parser.parse_args().minutes
    if minutes < MINUTES_LEAST:
        parser.error(f"{MINUTES_LEAST:g} minutes at least: a round must be longer than its rest")
    if not sys.platform.startswith("linux"):
        print("soak: needs Linux: it reads /proc", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever stops us, what we started must stop too
        signal.signal(number, signal.default_int_handler)
    rounds = max(ROUNDS_LEAST, round(minutes * 60 / ROUND_S))
    try:
        with tempfile.TemporaryDirectory(prefix="behest-soak-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            folder.chmod(0o711)  # root's PostgreSQL is somebody else's process
            with simulator(folder) as (upstream_url, _), behest(folder, upstream_url, tokens=0) as peer:
                admin_url = json.loads((folder / "ready.json").read_text(encoding="utf-8"))["admin_url"]
                rests = uvloop.run(_rounds(peer, admin_url, rounds, minutes * 60 / rounds))
    except (PeerError, BrokenAnswer, OSError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except ExceptionGroup as errors:
        print(f"soak: {errors.exceptions[0]!r}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    lines, is_well = verdict(rests)
    print("\n".join(lines))
    return 0 if is_well else 1


async def _rounds(peer: Peer, admin_url: str, rounds: int, round_s: float) -> list[Rest]:
    print(f"{os.cpu_count()} processors, {rounds} rounds of {round_s:.0f} s; the sidecar is process {peer.pid}")
    started_s = time.monotonic()
    rests: list[Rest] = []
    for number in range(rounds):
        done: Counter[str] = Counter()
        until_s = started_s + (number + 1) * round_s
        await Load(peer, until_s - REST_S - 2 * CHUNKS * INTERVAL_MS / 1e3, done).run()
        await asyncio.sleep(max(REST_S, until_s - time.monotonic()))
        rests.append(await asyncio.to_thread(_rest, peer.pid, admin_url))
        counts = ", ".join(f"{done[kind]} {kind}" for kind in sorted(done))
        print(f"[{time.monotonic() - started_s:5.0f} s] {rests[-1]}; {counts}", flush=True)
    return rests


if __name__ == "__main__":
    sys.exit(main())
