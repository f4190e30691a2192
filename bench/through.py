"""The figures of the ledger through the whole sidecar: statements a stream, and the kill switch."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from bench.answers import Answer, BrokenAnswer
from bench.books import Spread
from bench.h2_client import H2Client
from bench.load import MODEL, Wave, play
from bench.peers import Peer

from behest_ledger.store.configuration import apply_text
from behest_ledger.store.pool import Connection, connect

STREAMS = 200
CONNECTIONS = 4
TOKENS = 1000
STATEMENTS_TARGET = 3.0
KILL_TARGET_S = 1.0
_BACKGROUND = (
    "configuration_version",
    "renew_holder_v1",
    "lease_batch_v1",
    "reap_v1",
    "charge_by_policy_v1",
    "free_concurrency_v1",
    "tell_alerts_v1",
    "seal_v1",
    "roll_usage_v1",
)
"""What sidecar and keeper ask by the clock, however many streams there are."""
_CHECKPOINT = "checkpoint_batch_v1"
_SUSPENDED = """\
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {{name: demo, namespace: default}}
spec: {{tenant: demo, defaultModel: gpt-4o-mini, suspended: {suspended}}}
"""


@dataclass(frozen=True)
class Statement:
    """A kind of statement, and how often the server ran it."""

    text: str
    calls: int


async def statements(peer: Peer, dsn: str, say: Callable[[str], None], *, stagger_s: float) -> str:
    """Statements that the server ran while 200 streams of 1,000 tokens passed, by pg_stat_statements.

    Streams that begin together share statements; spread over `stagger_s`, they have fewer to share.
    """
    wave = Wave(
        wire="h2",
        streams=STREAMS,
        connections=CONNECTIONS,
        responses=1,
        chunks=TOKENS,
        interval_ms=20,
        stagger_s=stagger_s,
    )
    say(f"ledger: statements, {STREAMS} streams of {TOKENS} tokens, {wave.expected_s:.0f} s")
    connection: Connection = await connect(dsn)
    try:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements SCHEMA public")
        warm = replace(wave, chunks=20, stagger_s=1.0)  # so that the windows are made and the plans too
        await play(warm, peer.base_url, peer.tokens)
        await asyncio.sleep(1.0)
        await connection.execute("SELECT public.pg_stat_statements_reset()")
        await play(wave, peer.base_url, peer.tokens)
        await asyncio.sleep(1.0)
        rows = await connection.fetch(
            "SELECT query, calls FROM public.pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid"
            " WHERE d.datname = current_database() AND s.toplevel ORDER BY calls DESC"
        )
    finally:
        await connection.close()
    found = [Statement(" ".join(row["query"].split()), row["calls"]) for row in rows if "ledger." in row["query"]]
    return _told(found, stagger_s)


def _told(found: list[Statement], stagger_s: float) -> str:
    background = [one for one in found if any(name in one.text for name in _BACKGROUND)]
    checkpoints = [one for one in found if _CHECKPOINT in one.text]
    streams = [one for one in found if one not in background and one not in checkpoints]
    each = sum(one.calls for one in streams) / STREAMS
    everything = sum(one.calls for one in found) / STREAMS
    kinds = ", ".join(f"{one.calls} x {_name(one.text)}" for one in streams)
    clock = ", ".join(f"{one.calls} x {_name(one.text)}" for one in (*checkpoints, *background))
    met = "met" if each <= STATEMENTS_TARGET else "NOT met"
    return (
        f"ledger-statements: {each:.2f} statements a stream over {STREAMS} streams of {TOKENS} tokens that begin"
        f" within {stagger_s:.0f} s: {kinds}"
        f" (target <= {STATEMENTS_TARGET:.0f}: {met}); with what is asked by the clock ({clock}) {everything:.2f}"
    )


def _name(text: str) -> str:
    _, _, after = text.partition("ledger.")
    return after.split("(")[0].split()[0].rstrip(";,")


class _Watched(Answer):
    """An answer that knows when its last bytes came."""

    __slots__ = ("first", "last_s")

    def __init__(self) -> None:
        super().__init__()
        self.first = asyncio.Event()
        self.last_s = 0.0

    def feed(self, data: bytes) -> None:
        """Body bytes."""
        self.last_s = time.perf_counter()
        self.first.set()
        super().feed(data)


async def kill(peer: Peer, dsn: str, say: Callable[[str], None]) -> str:
    """From the start of `apply` of a suspended project to the last bytes of each of 200 streams at the client."""
    say(f"ledger: kill switch over {STREAMS} streams")
    loop = asyncio.get_running_loop()
    address = urlsplit(peer.base_url)
    clients = [
        (await loop.create_connection(H2Client, address.hostname or "", address.port or 80))[1]
        for _ in range(CONNECTIONS)
    ]
    asked = {"output_tokens": 100_000, "tokens_per_chunk": 1, "chunk_interval_ms": 20}
    body = json.dumps(
        {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Go on."}], "sim": asked}
    ).encode()
    try:
        answers: list[_Watched] = []
        for number in range(STREAMS):
            answer = _Watched()
            headers = [("content-type", "application/json"), ("authorization", f"Bearer {peer.tokens[number]}")]
            clients[number % CONNECTIONS].request(address.netloc, "/v1/chat/completions", headers, body, answer=answer)
            answers.append(answer)
        async with asyncio.timeout(30.0):
            await asyncio.gather(*(answer.first.wait() for answer in answers))
        await asyncio.sleep(0.5)
        pulled_s = time.perf_counter()
        await apply_text(dsn, _SUSPENDED.format(suspended="true"), default_tenant="demo")
        applied_s = time.perf_counter()
        try:
            async with asyncio.timeout(15.0):
                await asyncio.gather(*(answer.ended for answer in answers))
        except TimeoutError:
            alive = sum(not answer.ended.done() for answer in answers)
            raise BrokenAnswer(f"{alive} of {STREAMS} streams live 15 s after the kill switch") from None
    finally:
        for client in clients:
            client.close()
        await apply_text(dsn, _SUSPENDED.format(suspended="false"), default_tenant="demo")
    spread = Spread([answer.last_s - pulled_s for answer in answers])
    met = "met" if spread.ms(1.0) <= KILL_TARGET_S * 1e3 else "NOT met"
    return (
        f"ledger-kill: last chunk {spread.ms(1.0):.0f} ms after `apply` began (p50 {spread.ms(0.5):.0f} ms; it took"
        f" {(applied_s - pulled_s) * 1e3:.0f} ms itself), over {STREAMS} streams"
        f" (target <= {KILL_TARGET_S:.0f} s: {met})"
    )
