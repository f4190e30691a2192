"""The short form of the torture: sidecars and PostgreSQL die by kill -9, and the books are right afterwards."""

import asyncio
import os
import tempfile
from pathlib import Path

from torture.cluster import running_cluster
from torture.judge import Figures
from torture.plan import Scale, plan_round
from torture.rounds import Torture

SCALE = Scale(
    sidecars=2,
    streams=40,
    round_s=1.2,
    session_limit_usd=0.02,
    intervals_ms=(2, 5, 10, 20),
    tokens_per_chunk=(1, 1, 3, 7),
    chunks_max=100,
)
ROUNDS = 3


def test_no_kill_passes_a_ceiling_loses_a_token_or_charges_twice() -> None:
    seed = int(os.environ.get("BEHEST_TORTURE_SEED", "7"))
    total = Figures()

    async def scenario(folder: Path) -> None:
        async with running_cluster(folder, sidecars=SCALE.sidecars) as cluster:
            torture = Torture(cluster=cluster, scale=SCALE)
            for number in range(1, ROUNDS + 1):
                end = await torture.round(plan_round(seed, number, SCALE, kill_postgres=number == 2))
                total.add(end.figures)
                assert end.findings == [], f"seed {seed}, round {number}: {end.events}"
            assert cluster.database.stops["kill"] == 1
            torture.close()
            assert sum(len(sidecar.kills_s) + sidecar.drains for sidecar in cluster.sidecars) >= ROUNDS

    # Not pytest's own folder: that is closed to others, and root's PostgreSQL runs as somebody else.
    with tempfile.TemporaryDirectory(prefix="behest-torture-") as name:
        Path(name).chmod(0o711)
        asyncio.run(scenario(Path(name)))

    assert total.overshoot_pico == 0
    assert total.samples > 10
    assert total.killed_streams > 0, "no stream was running when its sidecar was killed"
    assert total.streams["completed"] > 0
