"""A ledger with an hour of made-up traffic, for pictures and for tests that look at a full page."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

from behest_ledger.charging import Outcome
from behest_ledger.holds import Settlement, UsageLine
from behest_ledger.store import holds
from behest_ledger.store.configuration import apply_text
from behest_ledger.store.holders import Checkpoint, checkpoint
from behest_ledger.store.pool import connect
from ledger.books import Books, admission, granted

# Model, pico-USD per token in and out, how often.
MODELS = (
    ("claude-opus-4-5", 5_000_000, 25_000_000, 3),
    ("gpt-4o", 2_500_000, 10_000_000, 5),
    ("gpt-4o-mini", 150_000, 600_000, 9),
    ("llama-3.3-70b", 590_000, 790_000, 4),
)
RUNNING = 4
USERS = ("ann", "bob", "carla", "deniz", "emil", "workload:shop/reindex")
ENDS = (
    [(Outcome.COMPLETED, 1.0)] * 14
    + [(Outcome.CLIENT_CANCELLED, 0.4)] * 2
    + [(Outcome.QUOTA_EXCEEDED, 0.7), (Outcome.UPSTREAM_ERROR, 0.2)]
)

MANIFESTS = """
apiVersion: behest.ai/v1alpha1
kind: Project
metadata: {name: web, namespace: shop}
spec: {tenant: acme, defaultModel: gpt-4o, attribution: {team: search, costCenter: CC-7}}
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: project-month, namespace: shop}
spec: {scope: {project: web}, limit: {amount: "6.50", currency: USD}, window: {period: Month}, alertThresholds: [70]}
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: per-session, namespace: shop}
spec: {scope: {project: web}, per: [session], limit: {amount: "0.60", currency: USD}, window: {period: Day}}
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: opus-tokens, namespace: shop}
spec:
  scope: {project: web, model: "claude-*"}
  limit: {tokens: 420000}
  window: {period: Day}
  alertThresholds: [50]
---
apiVersion: behest.ai/v1alpha1
kind: Budget
metadata: {name: users-soft, namespace: shop}
spec:
  scope: {project: web}
  per: [user]
  limit: {amount: "4", currency: USD}
  enforcement: Soft
  window: {period: Week}
"""


async def fill(dsn: str, *, requests: int = 300) -> None:
    """Write it: requests that ended within the last hour, and a few that run."""
    await apply_text(dsn, MANIFESTS)
    draw = random.Random(7)
    connection = await connect(dsn)
    try:
        books = Books(dsn, connection)
        ended: list[tuple[Any, datetime, datetime]] = []
        now = datetime.now(UTC)
        for number in range(requests):
            minutes = 58 * (number / requests) ** 0.8
            begun = now - timedelta(minutes=58.5 - minutes, seconds=draw.uniform(3, 40))
            one, settled = await _one(books, draw)
            if settled is not None:
                await holds.settle(connection, [settled])
                ended.append((one, begun, begun + timedelta(seconds=draw.uniform(1, 30))))
        for _ in range(RUNNING):
            one, settled = await _one(books, draw, most=True)
            if settled is not None:
                await checkpoint(connection, [Checkpoint(tenant_id="acme", request_id=one, lines=settled.lines[:1])])
        async with connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.executemany(
                "UPDATE ledger.request SET admitted_at = $2, ended_at = $3 WHERE request_id = $1", ended
            )
    finally:
        await connection.close()


async def _one(books: Books, draw: random.Random, *, most: bool = False) -> tuple[Any, Settlement | None]:
    """A request: its id and how it would be settled; None where no budget pays it."""
    model, rate_in, rate_out, _ = draw.choices(MODELS, [row[3] for row in MODELS])[0]
    user = draw.choice(USERS)
    tokens_in, tokens_out = draw.randrange(200, 9000), draw.randrange(50, 4000)
    if most:
        model, rate_in, rate_out, _ = MODELS[0]
        tokens_out = 9000
    asked = admission(
        namespace="shop", project="shop/web", user=user, session=f"{user.split('/')[-1]}-{draw.randrange(1, 4)}",
        model=model, team="search", cost_center="CC-7", need=tokens_out, rate=rate_out, input=tokens_in,
    )  # fmt: skip
    answer = await holds.admit(books.connection, asked)
    if not hasattr(answer, "output_tokens"):
        return asked.request_id, None
    granted(answer)
    outcome, part = (Outcome.COMPLETED, 0.5) if most else draw.choice(ENDS)
    lines = [
        UsageLine(class_=name, quantity=quantity, rate_pico=rate, amount_pico=quantity * rate, source="provider")
        for name, quantity, rate in (("input", tokens_in, rate_in), ("output", int(tokens_out * part), rate_out))
        if quantity
    ]
    return asked.request_id, Settlement(
        tenant_id="acme", request_id=asked.request_id, state="settled", outcome=outcome, source="provider", requests=1,
        input_tokens=tokens_in, output_tokens=int(tokens_out * part),
        amount_pico=sum(line.amount_pico for line in lines), lines=lines, facts={},
    )  # fmt: skip
