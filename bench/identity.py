"""What tokens cost: verifying them, and minting one before every call, as the published SDK does, beside streams."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Generator
from urllib.parse import urlsplit

from bench.answers import Answer, BrokenAnswer
from bench.books import Spread
from bench.cpu import snapshot, used_since_s
from bench.h2_client import H2Client
from bench.load import MODEL
from bench.peers import Peer

from behest_proxy.identity.keys import KeySet, SigningKey
from behest_proxy.identity.tokens import TokenVerifier

STREAMS = 50
CONNECTIONS = 4
INTERVAL_MS = 50
QUIET_S = 5.0
MINTS = 1000
MINTS_PER_S = 200
VERIFY_TARGET_US = 50.0
GAP_TARGET_MS = 5.0
"""By how much the gaps between a stream's chunks may grow at their 99th percentile."""
TOKENS = 500
CALLS_EACH = 20
"""How often a token is used in its hour, for what a verification costs in the mean."""


def verify() -> Generator[str]:
    """CPU of a token's first verification, of the next ones, and of both in the mean."""
    keys = [("RS256", SigningKey.generate())]
    for name, key in keys:
        now_s = time.time()
        claims = {
            "tid": "demo", "pid": "default/demo", "uid": "u", "role": "user", "iss": "behest", "aud": "behest",
            "iat": int(now_s), "nbf": int(now_s), "exp": int(now_s) + 3600, "sid": "s",
        }  # fmt: skip
        tokens = [key.sign({**claims, "jti": str(number)}) for number in range(TOKENS)]
        verifier = TokenVerifier(KeySet([key.verification_key()]))
        times_us: list[float] = []
        for _ in range(CALLS_EACH):
            begin_s = time.process_time()
            for token in tokens:
                verifier.verify(token, now_s)
            times_us.append((time.process_time() - begin_s) / TOKENS * 1e6)
        mean_us = sum(times_us) / CALLS_EACH
        met = "met" if mean_us <= VERIFY_TARGET_US else "NOT met"
        yield (
            f"identity-verify: {name} {times_us[0]:.0f} us the first time, {min(times_us[1:]):.1f} us from then on;"
            f" {mean_us:.1f} us each over {CALLS_EACH} calls (target <= {VERIFY_TARGET_US:.0f} us: {met})"
        )


class _Timed(Answer):
    """A stream that knows when each of its reads came."""

    __slots__ = ("times_s",)

    def __init__(self) -> None:
        super().__init__()
        self.times_s: list[float] = []

    def feed(self, data: bytes) -> None:
        """Body bytes."""
        self.times_s.append(time.perf_counter())
        super().feed(data)

    def gaps_s(self, begin_s: float, end_s: float) -> list[float]:
        """Between two chunks that both came in this time."""
        times_s = [at_s for at_s in self.times_s if begin_s <= at_s <= end_s]
        return [after_s - before_s for before_s, after_s in itertools.pairwise(times_s)]


async def mint(peer: Peer, say: Callable[[str], None]) -> str:
    """200 mints a second beside 50 streams: what comes of the mints, and whether the streams feel it."""
    say(f"identity: {STREAMS} streams, first alone, then with {MINTS_PER_S} mints a second")
    loop = asyncio.get_running_loop()
    address = urlsplit(peer.base_url)
    clients = [
        (await loop.create_connection(H2Client, address.hostname or "", address.port or 80))[1]
        for _ in range(2 * CONNECTIONS)
    ]
    try:
        streams = _open_streams(peer, clients[:CONNECTIONS], address.netloc)
        await asyncio.sleep(2.0)
        quiet_s, before = time.perf_counter(), snapshot([peer.pid])
        await asyncio.sleep(QUIET_S)
        quiet_cpu = used_since_s(before) / QUIET_S
        begin_s, before = time.perf_counter(), snapshot([peer.pid])
        latencies_s = await _mint_at_rate(peer, clients[CONNECTIONS:], address.netloc)
        end_s = time.perf_counter()
        cpu_s = used_since_s(before) - quiet_cpu * (end_s - begin_s)
        broken = [stream for stream in streams if stream.ended.done()]
        if broken:
            raise BrokenAnswer(f"{len(broken)} streams ended early, status {broken[0].status}")
    finally:
        for client in clients:
            client.close()
    for stream in streams:
        stream.ended.cancel()
    alone = Spread([gap for stream in streams for gap in stream.gaps_s(quiet_s, begin_s)])
    beside = Spread([gap for stream in streams for gap in stream.gaps_s(begin_s, end_s)])
    rate = MINTS / (end_s - begin_s)
    met = rate >= 0.95 * MINTS_PER_S and beside.ms(0.99) - alone.ms(0.99) <= GAP_TARGET_MS
    target = f"target: {MINTS_PER_S}/s, and p99 at most {GAP_TARGET_MS:.0f} ms longer: {'met' if met else 'NOT met'}"
    return (
        f"identity-mint: {rate:.0f} mints/s, {Spread(latencies_s)} each, {cpu_s / MINTS * 1e3:.2f} ms CPU of the"
        f" sidecar each; gap between chunks ({INTERVAL_MS} ms sent) of {STREAMS} streams: alone {alone}, beside the"
        f" mints {beside} ({target})"
    )


def _open_streams(peer: Peer, clients: list[H2Client], authority: str) -> list[_Timed]:
    asked = {"output_tokens": 100_000, "tokens_per_chunk": 1, "chunk_interval_ms": INTERVAL_MS}
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Go on."}], "sim": asked}
    streams: list[_Timed] = []
    for number in range(STREAMS):
        stream = _Timed()
        headers = [("content-type", "application/json"), ("authorization", f"Bearer {peer.tokens[number]}")]
        clients[number % len(clients)].request(
            authority, "/v1/chat/completions", headers, json.dumps(body).encode(), answer=stream
        )
        streams.append(stream)
    return streams


async def _mint_at_rate(peer: Peer, clients: list[H2Client], authority: str) -> list[float]:
    """Each is timed from when it was due, so that one slow answer is not forgotten by those that wait for it."""
    headers = [("content-type", "application/json"), ("authorization", f"Bearer {peer.api_key}")]
    begin_s = time.perf_counter()

    async def one(number: int) -> float:
        due_s = begin_s + number / MINTS_PER_S
        await asyncio.sleep(due_s - time.perf_counter())
        body = json.dumps({"user_id": f"user-{number}"}).encode()
        answer = clients[number % len(clients)].request(authority, "/v1/auth/mint", headers, body)
        await answer.ended
        if answer.status != 200:
            raise BrokenAnswer(f"mint answered {answer.status}")
        return time.perf_counter() - due_s

    return list(await asyncio.gather(*(one(number) for number in range(MINTS))))
