"""A sidecar whose way to the database may fail."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from faulty_wire import ThreadedWire, wire_on_a_thread
from readers import Reader
from stack import Project, Stack, running_stack, wait_until


class Away:
    """The system, and the wire between its sidecar and the database."""

    def __init__(self, stack: Stack, wire: ThreadedWire) -> None:
        self.stack = stack
        self.wire = wire

    def project(self, **what: Any) -> tuple[Project, str]:
        """A new project, and a token of it."""
        project = self.stack.project(**what)
        return project, project.mint()

    def reader(self, token: str, **sim: Any) -> Reader:
        """A client that is not started yet."""
        return Reader(self.stack.base_url, token, **sim)

    def until_ready(self) -> None:
        """Wait until the sidecar has its ledger."""

        def is_ready() -> bool:
            return httpx.get(self.stack.admin_url + "/readyz").status_code == 200

        wait_until(is_ready, what="the sidecar's readiness")

    def all_is_settled(self, project: Project, *, requests: int) -> list[dict[str, Any]]:
        """Wait until nothing is held any more and so many requests that reached the provider are in the books."""

        def unsettled() -> int:
            (row,) = self.stack.query(
                "SELECT (SELECT coalesce(sum(held + suspense + live), 0)"
                "        FROM ledger.budget_window WHERE tenant_id = $1)"
                " + (SELECT coalesce(sum(new_live - free), 0) FROM ledger.lease WHERE tenant_id = $1) AS held,"
                " (SELECT count(*) FROM ledger.hold WHERE tenant_id = $1 AND state IN ('open', 'suspense')) AS open,"
                " (SELECT count(*) FROM ledger.request WHERE tenant_id = $1 AND facts ->> 'requests' = '1') AS sent",
                project.namespace,
            )
            assert row["sent"] <= requests
            return int(row["held"]) + int(row["open"]) + requests - int(row["sent"])

        wait_until(lambda: not unsettled(), what="the settlement of everything")
        rows = project.settled(number=requests)
        assert len(rows) == len({row["request_id"] for row in rows})
        sent = [row for row in rows if row["facts"]["requests"]]
        windows = self.stack.query(
            "SELECT spent::text, overrun::text FROM ledger.budget_window WHERE tenant_id = $1", project.namespace
        )
        assert [(int(row["spent"]), int(row["overrun"])) for row in windows] == [
            (sum(row["amount_pico"] for row in sent), 0)
        ]
        assert sum(row["amount_pico"] for row in rows if row not in sent) == 0
        assert self.stack.verify().findings == []
        return sent


@contextmanager
def away_stack(dsn: str, folder: Path, **settings: str) -> Generator[Away]:
    """A running system with a journal, whose sidecar alone goes by way of the wire."""
    with (
        wire_on_a_thread(dsn) as wire,
        running_stack(
            dsn,
            folder,
            recordings=None,
            BEHEST_DATABASE_URL=wire.dsn,
            BEHEST_JOURNAL_DIR=str(folder / "journal"),
            **settings,
        ) as stack,
    ):
        yield Away(stack, wire)
