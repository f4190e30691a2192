"""A real Prometheus that scrapes what a test names, and its answers as plain values."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from behest_proxy.cli.preflight import free_port
from stack import process, wait_until

SCRAPE_S = 0.5


def program(name: str) -> str:
    """Where `prometheus` or `promtool` is. Skips where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: apt install prometheus)")
    return found


@dataclass
class Prometheus:
    """One that runs."""

    url: str
    targets: int

    def query(self, promql: str) -> list[tuple[dict[str, str], float]]:
        """What an expression is now: labels and value of each series."""
        answer = httpx.get(self.url + "/api/v1/query", params={"query": promql}, timeout=30)
        assert answer.status_code == 200, f"{promql}: {answer.text}"
        result: dict[str, Any] = answer.json()["data"]
        assert result["resultType"] == "vector", promql
        return [(one["metric"], float(one["value"][1])) for one in result["result"]]

    def number(self, promql: str) -> float:
        """The only value of an expression; 0 where there is none."""
        found = self.query(promql)
        assert len(found) <= 1, promql
        return found[0][1] if found else 0.0

    def by(self, label: str, promql: str) -> dict[str, float]:
        """The values of an expression by one of its labels."""
        found = self.query(promql)
        assert len({labels.get(label, "") for labels, _ in found}) == len(found), promql
        return {labels.get(label, ""): value for labels, value in found}

    def wait_for_samples(self, since_s: float) -> None:
        """Until the last look at every target came later than that (Unix seconds), and saw it.

        A look that fails leaves a sample too, of `up` and of nothing else.
        """

        def are_there() -> bool:
            return self.number("min(timestamp(up))") > since_s and self.number("sum(up)") == self.targets

        wait_until(are_there, what="a sample of every target")

    def metadata(self) -> dict[str, str]:
        """The kind of each metric that was scraped."""
        data = httpx.get(self.url + "/api/v1/metadata", timeout=30).json()["data"]
        return {name: found[0]["type"] for name, found in data.items()}


@contextmanager
def prometheus(folder: Path, jobs: dict[str, list[str]], *rules: Path) -> Generator[Prometheus]:
    """A Prometheus that scrapes these targets (`host:port`), by job, twice a second, and goes by these rules."""
    port, folder = free_port(0), folder / "prometheus"
    folder.mkdir()
    configuration: dict[str, Any] = {
        "global": {
            "scrape_interval": f"{round(SCRAPE_S * 1000)}ms",
            "scrape_timeout": f"{round(SCRAPE_S * 1000)}ms",
            "evaluation_interval": f"{round(SCRAPE_S * 1000)}ms",
        },
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": targets}]} for job, targets in jobs.items()
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    arguments = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--query.lookback-delta=1m",
    ]
    with process(arguments, environment={}, log=folder / "prometheus.log"):
        running = Prometheus(f"http://127.0.0.1:{port}", sum(map(len, jobs.values())))

        def scrapes() -> bool:
            try:
                if httpx.get(running.url + "/-/ready").status_code != 200:
                    return False
            except httpx.TransportError:
                return False
            return running.number("sum(up)") == running.targets

        wait_until(scrapes, what=f"Prometheus's first look ({folder / 'prometheus.log'})")
        yield running
