import logging

import pytest

from behest_ledger.store.outage import REMIND_S, Outage


def test_an_outage_is_told_once_now_and_then_and_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    outage = Outage(logging.getLogger("test"), "nothing can be read", clock_s=lambda: now_s)
    outage.over()
    for tick in range(int(2 * REMIND_S) * 2):
        now_s = tick / 2
        outage.failed(RuntimeError("connection refused"))
    outage.over()
    outage.over()
    outage.failed(RuntimeError("again"))
    assert [record.getMessage() for record in caplog.records] == [
        "nothing can be read: connection refused",
        "nothing can be read: connection refused",
        "the ledger answers again, after 59.5 s",
        "nothing can be read: again",
    ]
    assert all(record.exc_info is None for record in caplog.records)
